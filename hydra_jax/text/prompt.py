"""A prompt: its text or tokens, its answers, and where it is read; sets of them checked, hashed and written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from hydra_jax.errors import UserError, shown

TEXTS = ("id", "text", "answer", "relation", "foil", "source")
LATER = ("foil", "source", "position", "tokens")
"""Fields that leave a set's hash as it is, and are not written, where they are not given."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text that ends right before its answer.

    Attributes:
      id: unique in its set; randomness follows it.
      text: what the model reads.
      answer: what is right; "" where there is none. With space before it only if it has to be written so.
      relation: the kind of fact; "" where it is not known.
      foil: the wrong answer that the answer is compared with; "" where there is none.
      source: the counterfactual text; "" where there is none.
      position: the token after which it is read: an index from 0, negative from the end, or a part of the text, whose
        last token is meant. None: the last token.
      tokens: token ids, given in place of a text; `text` may then be "".
    """

    id: str
    text: str
    answer: str = ""
    relation: str = ""
    foil: str = ""
    source: str = ""
    position: int | str | None = None
    tokens: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The id as errors quote it, a long one cut."""
        return repr(self.id if len(self.id) <= 60 else f"{self.id[:57]}...")


def content_hash(prompts: Iterable[Prompt]) -> str:
    """Return the SHA-256 (hex) of a set of prompts, whatever their order."""
    rows = []
    for prompt in prompts:
        row: list[object] = [prompt.id, prompt.text, prompt.answer, prompt.relation]
        if later := _later(prompt):
            row.append(later)
        rows.append(json.dumps(row))
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


def json_lines(prompts: Iterable[Prompt]) -> str:
    """Return prompts as the text of a file that `read` reads."""
    records = (
        {"id": prompt.id, "prompt": prompt.text, "answer": prompt.answer, "relation": prompt.relation} | _later(prompt)
        for prompt in prompts
    )
    return "".join(json.dumps(record) + "\n" for record in records)


def checked(prompts: Sequence[Prompt], where: str) -> list[Prompt]:
    """Return a set of prompts, their numbers as Python's own.

    Args:
      prompts: the set.
      where: its name in error messages.

    Raises:
      UserError: if a field is not of its type, a prompt has neither a text nor tokens, or an id occurs twice.
    """
    seen: set[str] = set()
    found = []
    for prompt in prompts:
        prompt = _typed(prompt, where)
        if not prompt.text.strip() and not prompt.tokens:
            raise UserError(f"{where}: prompt {prompt.name} is empty; remove it or write its text")
        try:
            "".join(str(getattr(prompt, field)) for field in (*TEXTS, "position")).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: prompt {prompt.id!r} is not Unicode ({error.reason}); mend its text") from error
        if prompt.id in seen:
            raise UserError(f"{where}: id {prompt.name} occurs twice; give each prompt an id of its own")
        seen.add(prompt.id)
        found.append(prompt)
    return found


def of_tokens(tokens: Sequence[int]) -> Prompt:
    """Return a prompt of token ids, which are its id as well."""
    return Prompt(f"tokens {' '.join(map(str, tokens))}", "", tokens=tuple(tokens))


def integer(value: object) -> int | None:
    """Return a whole number of any library as Python's; None for anything else, True and False among it."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    dimensions: Any = getattr(value, "ndim", 0)
    if dimensions:  # an array of one number is an array all the same
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]  # whatever is no number raises
    except TypeError:
        return None


def _later(prompt: Prompt) -> dict[str, object]:
    values = {field: getattr(prompt, field) for field in LATER}
    return {field: value for field, value in values.items() if value not in ("", None, ())}


def _typed(prompt: Prompt, where: str) -> Prompt:
    for field in TEXTS:
        if not isinstance(value := getattr(prompt, field), str):
            raise UserError(f"{where}: {field} of prompt {shown(prompt.id)} is {shown(value)}; give a string")
    position, tokens = prompt.position, prompt.tokens
    if position is not None and not isinstance(position, str):
        position = integer(position)
        if position is None:
            raise UserError(
                f"{where}: position of prompt {prompt.name} is {shown(prompt.position)}; give an index or a part of the"
                " text"
            )
    ids = [integer(token) for token in tokens]
    if isinstance(tokens, str | bytes) or not all(token is not None and token >= 0 for token in ids):
        raise UserError(f"{where}: tokens of prompt {prompt.name} are {shown(tokens)}; give ids from 0")
    given = tuple(token for token in ids if token is not None)
    if type(position) is type(prompt.position) and type(tokens) is tuple and all(type(t) is int for t in tokens):
        return prompt
    return dataclasses.replace(prompt, position=position, tokens=given)
