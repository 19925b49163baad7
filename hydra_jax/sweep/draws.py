"""The prompts whose writes take the place of ablated ones: which each may draw from, and which it draws."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

from hydra_jax.config import LENGTH, RELATION, AblationConfig
from hydra_jax.core.edits import check_enough, draw_ranks, prompt_keys
from hydra_jax.errors import UserError
from hydra_jax.sweep.items import Item


class Pool:
    """The prompts that replacements come from, in groups of prompts alike.

    Attributes:
      items: the prompts.
    """

    def __init__(self, items: Sequence[Item], match: str = "") -> None:
        """Sort `items` into groups by relation or length, as `match` says, or into one."""
        self.items, self._match = items, match
        groups: dict[object, list[int]] = collections.defaultdict(list)
        for index in sorted(range(len(items)), key=lambda index: items[index].prompt.id):
            groups[self._key(items[index])].append(index)
        self._groups = {key: np.array(indices) for key, indices in groups.items()}
        # A prompt is not replaced by itself: neither at another token of its text, nor under another id.
        self._ranks: dict[tuple[object, str], list[int]] = collections.defaultdict(list)
        for key, indices in self._groups.items():
            for rank, index in enumerate(indices.tolist()):
                for name in _names(items[index]):
                    self._ranks[key, name].append(rank)

    def _key(self, item: Item) -> object:
        return {RELATION: item.prompt.relation, LENGTH: len(item.tokens)}.get(self._match)

    def own(self, item: Item) -> list[int]:
        """Return the indices of the prompts that are the item itself, where nothing is matched."""
        return self._groups[None][self._own_ranks(item)].tolist() if len(self.items) else []

    def others(self, item: Item) -> int:
        """Return the number of prompts that an item may draw from."""
        if self._match == RELATION and not item.prompt.relation:  # nothing says what it is like
            return 0
        return len(self._groups.get(self._key(item), ())) - len(self._own_ranks(item))

    def _own_ranks(self, item: Item) -> list[int]:
        key = self._key(item)
        return sorted({rank for name in _names(item) for rank in self._ranks.get((key, name), ())})

    def draw(self, items: Sequence[Item], draws: int, seed: int) -> np.ndarray:
        """Draw different prompts for each item; returns their indices [P, R].

        The draw is over prompts in order of id, by a key made of the seed and the item's id: the order that either
        come in changes nothing.

        Raises:
          UserError: if there are too few for an item.
        """
        counts = np.array([self.others(item) for item in items])
        if (few := np.flatnonzero(counts < draws)).size:
            if not self._match:
                check_enough(int(counts[few[0]]) + 1, draws)
            raise UserError(
                f"config.ablation.match: prompt {items[few[0]].prompt.name} has {counts[few[0]]} others of its"
                f" {self._match} to draw from, not {draws}; lower ablation.replacements, or give more prompts alike"
            )
        ranks = draw_ranks(prompt_keys(seed, [item.prompt.id for item in items]), counts, draws)
        drawn = np.empty_like(ranks)
        for row, item in enumerate(items):
            chosen = ranks[row]
            for own in self._own_ranks(item):
                chosen = np.where(chosen >= own, chosen + 1, chosen)
            drawn[row] = self._groups[self._key(item)][chosen]
        return drawn


def few(pool: Pool, items: Sequence[Item], ablation: AblationConfig) -> int:
    """Return R where prompts are drawn from a pool of one's own: as many as each has, if that is less.

    Raises:
      UserError: if one has none.
    """
    if not ablation.kind.needs_sources and not ablation.kind.needs_statistics:
        return ablation.draws
    alone = next((item for item in items if not pool.others(item)), None)
    if alone is not None:
        raise UserError(f"sources: have nothing beside prompt {alone.prompt.name} itself to draw from; give others")
    return min(ablation.draws, *(pool.others(item) for item in items))


def _names(item: Item) -> set[str]:
    """Return the names under which an item is known: the id of its text, and the text."""
    return {f"id {item.text_id}", f"text {item.prompt.text}"} - {"text "}
