"""The tokens that are read: targets and foils as they are asked for, and as each prompt's clean run makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hydra_jax.config import ANSWER, AUTO, FOIL, TOP
from hydra_jax.core.prefill import MOST_LIKELY
from hydra_jax.errors import UserError, shown
from hydra_jax.models.transformer import Contrast
from hydra_jax.sweep.bank import Bank
from hydra_jax.sweep.items import Item
from hydra_jax.text.tokenizer import spelled, token_of
from hydra_jax.weights.model import Model

NONE = -1
"""The id that stands for no foil."""

Spec = str | int
"""A token as it is asked for: a word of `config.ReadoutConfig`, its text, or its id."""

TARGET_WORDS, FOIL_WORDS = (AUTO, TOP, ANSWER), (AUTO, TOP, ANSWER, FOIL, "")


class Readout:
    """The target and foil that each item is asked for.

    Attributes:
      targets: [P], each a word of TARGET_WORDS or a token's id.
      foils: [P], each a word of FOIL_WORDS or a token's id.
    """

    def __init__(self, model: Model, items: Sequence[Item], target: Any = AUTO, foil: Any = AUTO) -> None:
        """Take what is asked for: one for all items, or a sequence with one for each text.

        Raises:
          UserError: if a token's text is not one token, an id is not in the vocabulary, or an item lacks what is asked.
        """
        self._model = model
        texts = list(dict.fromkeys(item.text_id for item in items))
        targets = self._each("target", target, TARGET_WORDS, len(texts))
        foils = self._each("foil", foil, FOIL_WORDS, len(texts))
        of_text = {text: number for number, text in enumerate(texts)}
        self._items = {item.prompt.id: (targets[of_text[item.text_id]], foils[of_text[item.text_id]]) for item in items}
        for item in items:
            self._check(item)

    def _each(self, argument: str, asked: Any, words: Sequence[str], count: int) -> list[Spec]:
        if asked is None:
            asked = AUTO if argument == "target" else ""
        if isinstance(asked, str | int | np.integer):
            return [self._spec(argument, asked, words)] * count
        if isinstance(asked, set | Mapping) or not hasattr(asked, "__len__"):
            raise UserError(f"{argument}: {shown(asked)} is no token; give its text, as in ' Paris', or its id")
        asked = list(asked)
        if len(asked) != count:
            raise UserError(
                f"{argument}: is {len(asked)} of them for {count} prompts; give one for all, or one for each"
            )
        return [self._spec(argument, one, words) for one in asked]

    def _spec(self, argument: str, asked: Any, words: Sequence[str]) -> Spec:
        if isinstance(asked, str):
            if asked in words:
                return asked
            return token_of(self._model.tokenizer, asked, argument, self._model.name)
        if isinstance(asked, bool) or not isinstance(asked, int | np.integer):
            raise UserError(f"{argument}: {shown(asked)} is no token; give its text, as in ' Paris', or its id")
        if not 0 <= asked < self._model.config.vocab_size:
            raise UserError(
                f"{argument}: {asked} is no token of {self._model.name}; give an id from 0 to"
                f" {self._model.config.vocab_size - 1}, or a token's text"
            )
        return int(asked)

    def _check(self, item: Item) -> None:
        target, foil = self._items[item.prompt.id]
        for argument, asked in (("target", target), ("foil", foil)):
            if asked == ANSWER and not item.answers:
                raise UserError(
                    f"{argument}: prompt {item.prompt.name} has no answer to read; give it one, or {argument}=top"
                )
        if foil == FOIL and not item.foils:
            raise UserError(f"foil: prompt {item.prompt.name} has no foil of its own; give it one, or foil=''")

    def tokens(self, items: Sequence[Item], bank: Bank) -> np.ndarray:
        """Return the target and the foil of each item whose clean run is made, [P, 2]; a foil may be NONE.

        Raises:
          UserError: if they are the same token.
        """
        found = np.array([self._tokens(item, bank) for item in items]).reshape(-1, 2)
        for item, (target, foil) in zip(items, found.tolist(), strict=True):
            if target == foil:
                raise UserError(
                    f"foil: prompt {item.prompt.name} has {shown(self._model.tokenizer.decode([target]))} as target and"
                    " foil; give it two tokens that differ, or target=answer"
                )
        return found

    def _tokens(self, item: Item, bank: Bank) -> tuple[int, int]:
        target, foil = self._items[item.prompt.id]
        top = bank.rows[item.key].top
        answer = spelled(item.answers, top) if item.answers else NONE
        other = NONE
        if item.foils:  # spelt as the answer is
            like = item.answers.index(answer) if answer in item.answers and len(item.foils) == len(item.answers) else 0
            other = item.foils[like]
            if other == answer:  # such as the space before two numbers: in another spelling they may differ
                pairs = [pair for pair in zip(item.answers, item.foils, strict=False) if pair[0] != pair[1]]
                answer, other = pairs[0] if pairs else (answer, other)
        if foil == AUTO:
            foil = other
        if target == AUTO:
            target = answer if foil == other != NONE and answer != NONE else TOP
        words = {TOP: top, ANSWER: answer, FOIL: other, "": NONE}
        found = [words[one] if isinstance(one, str) else one for one in (target, foil)]
        return found[0], found[1]


def contrasts(tokens: np.ndarray) -> Contrast:
    """Return what is read of targets and foils [P, 2]: [P, K] tokens and weights, K = 1 where no prompt has a foil."""
    targets, foils = tokens[:, :1], tokens[:, 1:]
    if (foils == NONE).all():
        return Contrast(targets.astype(np.int32), np.ones(targets.shape, np.float32))
    there = foils != NONE
    pairs = np.concatenate([targets, np.where(there, foils, targets)], axis=1)
    return Contrast(pairs.astype(np.int32), np.concatenate([np.ones(there.shape), -1.0 * there], 1).astype(np.float32))


def candidates(items: Sequence[Item]) -> np.ndarray:
    """Return the tokens whose probabilities a clean run is asked for, [P, 3]: the most likely, and the answer's."""
    return np.array([[MOST_LIKELY, *((*item.answers, *[MOST_LIKELY] * 2)[:2])] for item in items], np.int32)
