"""Places in a prompt: the token after which it is read."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from hydra_jax.errors import UserError, shown
from hydra_jax.text.prompt import Prompt, integer
from hydra_jax.text.tokenizer import encoded


def place_of(tokenizer: Tokenizer, prompt: Prompt, tokens: Sequence[int]) -> int:
    """Return the index of the token that a prompt's position means.

    Args:
      tokenizer: the model's.
      prompt: with the position: None is the last token; an index counts from 0, or from the end if it is negative; a
        part of the text means its last token.
      tokens: the prompt's, as `encode` returns them.

    Raises:
      UserError: if there is no such token, or the part of the text is not there, or is there more than once.
    """
    position, name = prompt.position, f"prompt {prompt.name}"
    if position is None:
        return len(tokens) - 1
    if isinstance(position, str):
        return _last_of(tokenizer, prompt, position, tokens)
    index = integer(position)
    if index is None:
        raise UserError(f"{name}: position {shown(position)} is no position; give an index or a part of the text")
    if not -len(tokens) <= index < len(tokens):
        end = "past its end" if index >= 0 else "before its beginning"
        has = f"tokens 0-{len(tokens) - 1}" if tokens else "no tokens"
        raise UserError(f"{name}: position {index} is {end}; it has {has}")
    return index % len(tokens)


def _last_of(tokenizer: Tokenizer, prompt: Prompt, part: str, tokens: Sequence[int]) -> int:
    """Return the index of the last token of a part of a prompt's text."""
    name = f"prompt {prompt.name}: position {shown(part)}"
    if not prompt.text:
        raise UserError(f"{name} is text, and the prompt is given as tokens; give an index")
    begins = [index for index in range(len(prompt.text)) if prompt.text.startswith(part, index)]
    if not part or not begins:
        raise UserError(f"{name} is not in its text; give a part of the text, or an index")
    if len(begins) > 1:
        raise UserError(f"{name} occurs {len(begins)} times in its text; give more of it, or an index")
    ids, offsets = encoded(tokenizer, prompt.text)
    if ids != list(tokens):
        raise UserError(f"{name} is text, and the prompt's tokens are not those of its text; give an index")
    last = begins[0] + len(part) - 1
    covering = [index for index, (start, stop) in enumerate(offsets) if start <= last < stop]
    if covering:
        return covering[-1]
    # No token says that it has this character: a space that is counted to no token, and belongs to the next; or what
    # a normalizer takes to the character before.
    after = [index for index, (_, stop) in enumerate(offsets) if stop > last]
    before = [index for index, (start, stop) in enumerate(offsets) if start < stop <= last]
    if after and (prompt.text[last].isspace() or not before):
        return after[0]
    if before:
        return before[-1]
    raise UserError(f"{name} has no token of its own in this model; give an index")
