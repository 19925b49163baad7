"""Prompts as the model reads them: tokens, the one after which each is read, and what is right there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from hydra_jax.config import ALL, LAST
from hydra_jax.engine.batching import fill_up
from hydra_jax.errors import UserError, shown
from hydra_jax.text import prompts as prompt_sets
from hydra_jax.text.padding import padded
from hydra_jax.text.positions import place_of
from hydra_jax.text.prompts import Prompt
from hydra_jax.text.tokenizer import answer_tokens, encode
from hydra_jax.weights.model import Model

POOL = 64
"""Built-in facts that replacements for a single prompt come from."""

Positions = str | int | Sequence[Any]
"""The tokens after which texts are read: LAST, ALL, a place, a substring whose last token is meant, a list of these for
every text, or for each text a list of its own."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt as the model reads it.

    Attributes:
      prompt: the prompt; where a text is read at several tokens, each has an id of its own.
      tokens: those of its text up to the one after which it is read: nothing that comes later matters.
      answers: the first tokens of its answer, in the spellings that it may have, the likelier first.
      foils: the same of its foil.
      text_id: the id of its text, the same for all tokens that it is read at.
    """

    prompt: Prompt
    tokens: tuple[int, ...]
    answers: tuple[int, ...] = ()
    foils: tuple[int, ...] = ()
    text_id: str = ""

    @property
    def key(self) -> str:
        """The name of its clean run: a text may be read after one token, and drawn from after another."""
        return f"{self.prompt.id}\0{self.position}"

    @property
    def position(self) -> int:
        """The place of the token after which it is read."""
        return len(self.tokens) - 1


def itemise(model: Model, prompts: Sequence[Prompt], positions: Positions = LAST) -> list[Item]:
    """Return every prompt with its tokens, once for each token that it is read at.

    Args:
      model: the model.
      prompts: those with a position of their own are read there, unless `positions` says other than LAST.
      positions: where all are read.

    Raises:
      UserError: if a prompt is longer than the model's context, has a token that the model has no row for, or no token
        at a position.
    """
    whole = uncut(model, prompts)
    every = _asked_places(model, whole, positions)
    own = isinstance(positions, str) and positions == LAST
    several = not own and (positions == ALL or any(len(places) > 1 for places in every))
    return [
        _cut(item, place, own, several, asked)
        for item, places in zip(whole, every, strict=True)
        for place, asked in places.items()
    ]


def uncut(model: Model, prompts: Sequence[Prompt]) -> list[Item]:
    """Return every prompt with all of its tokens; for errors see `itemise`."""
    found = []
    for prompt in prompts:
        tokens = _tokens(model, prompt)
        if not prompt.text:
            prompt = dataclasses.replace(prompt, text=model.tokenizer.decode(list(tokens)))
        answers, foils = (_first_tokens(model, prompt, name) for name in (prompt.answer, prompt.foil))
        found.append(Item(prompt, tokens, answers, foils, prompt.id))
    return found


def places_of(model: Model, items: Sequence[Item], positions: Positions) -> list[list[int]]:
    """Return the places in each of some uncut texts after which it is read, as `itemise` is asked.

    Raises:
      UserError: if a text has no such place, or the same one twice.
    """
    return [list(places) for places in _asked_places(model, items, positions)]


def _asked_places(model: Model, items: Sequence[Item], positions: Positions) -> list[dict[int, Any]]:
    """Return the places in each text and, by them, how each was asked for: see `places_of`."""
    if isinstance(positions, str | int) and not isinstance(positions, bool):
        positions = [positions]
    elif not isinstance(positions, Sequence):
        raise UserError(
            f"positions: is {shown(positions)}; give 'last', 'all', a place, a substring, or a list of them"
        )
    elif any(not isinstance(one, str) and isinstance(one, Sequence) for one in positions):
        if len(positions) != len(items):
            raise UserError(f"positions: are given for {len(positions)} prompts of {len(items)}; give a list for each")
        return [_asked_places(model, [item], [*one])[0] for item, one in zip(items, positions, strict=True)]
    if not positions:
        raise UserError("positions: are none; give 'last', 'all', a list of places, or a substring")
    return [_places(model, item, positions) for item in items]


def _places(model: Model, item: Item, positions: Sequence[int | str]) -> dict[int, Any]:
    if positions == [ALL]:
        return {place: place for place in range(len(item.tokens))}
    asked = [item.prompt.position if one == LAST else one for one in positions]
    found = [place_of(model.tokenizer, dataclasses.replace(item.prompt, position=one), item.tokens) for one in asked]
    if len(set(found)) < len(found):
        raise UserError(f"positions: mean a token of prompt {item.prompt.name} twice; give each once")
    return dict(zip(found, asked, strict=True))


def _cut(whole: Item, place: int, own: bool, several: bool, position: int | str | None) -> Item:
    """Return the item that is read after a token.

    Where it is read is the prompt's `own` affair, or asked of all: then before the last token what is right is the
    text's next one. Of `several` tokens each has an id of its own.
    """
    last = place == len(whole.tokens) - 1
    name = f"{whole.prompt.id}@{place}" if several else whole.prompt.id
    return dataclasses.replace(
        whole,
        prompt=dataclasses.replace(whole.prompt, id=name, position=position),
        tokens=whole.tokens[: place + 1],
        answers=whole.answers if last or own else (whole.tokens[place + 1],),
        foils=whole.foils if last or own else (),
    )


def _first_tokens(model: Model, prompt: Prompt, answer: str) -> tuple[int, ...]:
    """Return the first tokens of the prompt's answer, or foil, in its spellings; none where there is no answer."""
    return answer_tokens(model.tokenizer, prompt.text, answer) if answer else ()


def _tokens(model: Model, prompt: Prompt) -> tuple[int, ...]:
    tokens = prompt.tokens or tuple(encode(model.tokenizer, prompt.text))
    if not 0 < len(tokens) <= model.config.context:
        raise UserError(
            f"prompt {prompt.name}: has {len(tokens):,} tokens, {model.name} takes 1 to"
            f" {model.config.context:,}; shorten or remove it"
        )
    if min(tokens) < 0 or max(tokens) >= model.config.vocab_size:
        wrong = min(tokens) if min(tokens) < 0 else max(tokens)
        raise UserError(
            f"prompt {prompt.name}: token {wrong if prompt.tokens else model.tokenizer.id_to_token(wrong)} has no row"
            f" in the embedding of {model.name}; reword or remove it"
        )
    return tokens


def counterfactuals(model: Model, items: Sequence[Item]) -> list[Item]:
    """Return each item's own source: its counterfactual text, read where the item is.

    That is at the same place where both texts have as many tokens, else where the position that is asked for says.

    Raises:
      UserError: if an item has none, or it is the prompt itself, or cannot be read there.
    """
    found = []
    for item in items:
        prompt = item.prompt
        if not prompt.source.strip():
            raise UserError(f"prompt {prompt.name}: has no source; give each the counterfactual text to draw from")
        if prompt.source == prompt.text:
            raise UserError(f"prompt {prompt.name}: its source is the prompt itself; give it another text")
        other = Prompt(f"{prompt.id} (source)", prompt.source, position=prompt.position)
        tokens, whole = _tokens(model, other), _tokens(model, prompt)
        place = item.position if len(tokens) == len(whole) else place_of(model.tokenizer, other, tokens)
        found.append(Item(other, tokens[: place + 1], text_id=other.id))
    return found


def batch_of(items: Sequence[Item], size: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens [size, T] and lengths [size]; the last item fills what is left over."""
    return padded([item.tokens for item in fill_up(items, size)], context)


def facts_beside(text: str, replacements: int, seed: int) -> list[Prompt]:
    """Draw, by seed, the built-in facts that replacements for a prompt of one's own come from."""
    facts = [fact for fact in prompt_sets.builtin() if fact.text != text]
    drawn = np.random.default_rng(seed).choice(len(facts), min(len(facts), max(POOL, replacements + 1)), replace=False)
    return [facts[index] for index in drawn]


def by_length(item: Item) -> tuple[int, str]:
    """Return the key that sorts prompts in a sweep: those of like length are padded little beside each other."""
    return len(item.tokens), item.prompt.id


def places_from(setting: str) -> Positions:
    """Return the positions of a setting: LAST, ALL, places separated by commas, or a substring."""
    parts = [part.strip() for part in setting.split(",")]
    if all(part.removeprefix("-").isdecimal() for part in parts):
        return [int(part) for part in parts]
    return setting
