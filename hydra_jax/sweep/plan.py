"""Everything that a sweep computes with: prompts as tokens, which of them are swept, and all draws."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from hydra_jax.config import AblationConfig, SweepConfig
from hydra_jax.core.edits import WHOLE, Component, WriteStatistics, draw_sources, prompt_keys
from hydra_jax.engine.batching import fill_up
from hydra_jax.engine.memory import Asked, BatchSizer
from hydra_jax.errors import UserError
from hydra_jax.models.config import ModelConfig
from hydra_jax.sweep.bank import Bank
from hydra_jax.text import prompts as prompt_sets
from hydra_jax.text.padding import padded
from hydra_jax.text.prompts import Prompt
from hydra_jax.text.tokenizer import answer_tokens, encode
from hydra_jax.weights.model import Model

POOL = 64
"""Built-in facts that replacements for a single prompt come from."""

BLOCK_BYTES = 2**28
"""Bytes of values that are summed at once for means and deviations."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt as the model reads it: its tokens, and its answer's first (None without an answer)."""

    prompt: Prompt
    tokens: tuple[int, ...]
    answer: int | None


def itemise(model: Model, prompts: Sequence[Prompt]) -> list[Item]:
    """Return every prompt with its tokens.

    Raises:
      UserError: if a prompt is longer than the model's context, or has a token that the model has no row for.
    """
    items = []
    for prompt in prompts:
        tokens = tuple(encode(model.tokenizer, prompt.text))
        if not 0 < len(tokens) <= model.config.context:
            raise UserError(
                f"prompt {prompt.name}: has {len(tokens):,} tokens, {model.name} takes 1 to"
                f" {model.config.context:,}; shorten or remove it"
            )
        if max(tokens) >= model.config.vocab_size:
            raise UserError(
                f"prompt {prompt.name}: token {model.tokenizer.id_to_token(max(tokens))} has no row in the embedding of"
                f" {model.name}; reword or remove it"
            )
        answer = answer_tokens(model.tokenizer, prompt.text, prompt.answer)[0] if prompt.answer else None
        items.append(Item(prompt, tokens, answer))
    return items


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


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a sweep computes with, prompts in order of length.

    Attributes:
      model: the model.
      items: the P prompts that are swept.
      targets: [P], the token that is read in each.
      bank: the clean runs.
      pool: ids of the prompts that replacements, means and deviations come from.
      ablation: what is ablated, and how.
      seed: of the draws.
      sizer: says how many prompts go at once.
      tolerance: how far the identity of `core.effects` may be from holding, in logits.
      non_finite: the share of interventions whose values may be no numbers.
      components: those that are ablated, in forward order.
    """

    model: Model
    items: Sequence[Item]
    targets: np.ndarray
    bank: Bank
    pool: Sequence[str]
    ablation: AblationConfig
    seed: int
    sizer: BatchSizer
    tolerance: float
    non_finite: float
    components: Sequence[Component]

    @classmethod
    def build(
        cls,
        model: Model,
        bank: Bank,
        sizer: BatchSizer,
        config: SweepConfig,
        items: Sequence[Item],
        pool: Sequence[Item] | None = None,
        targets: np.ndarray | None = None,
        components: Sequence[Component] | None = None,
    ) -> Plan:
        """Return the plan of a sweep whose clean runs are made.

        Args:
          model: the model.
          bank: with the clean runs of all prompts below.
          sizer: says how many prompts go at once.
          config: the sweep's settings.
          items: the prompts that are swept.
          pool: the prompts that replacements come from; None for the same.
          targets: [P], the token to read in each; None for what the bank says.
          components: those whose values the bank has; None for the ablation's.
        """
        if targets is None:
            targets = np.array([bank.rows[item.prompt.id].target for item in items])
        return cls(
            model=model,
            items=items,
            targets=targets,
            bank=bank,
            pool=[item.prompt.id for item in (items if pool is None else pool)],
            ablation=config.ablation,
            seed=config.seed,
            sizer=sizer,
            tolerance=config.identity_tolerance,
            non_finite=config.non_finite,
            components=config.ablation.components(model.config) if components is None else components,
        )

    @functools.cached_property
    def ids(self) -> list[str]:
        """The prompts' ids."""
        return [item.prompt.id for item in self.items]

    @functools.cached_property
    def keys(self) -> jax.Array:
        """[P] keys of the prompts' draws."""
        return prompt_keys(self.seed, self.ids)

    @functools.cached_property
    def sources(self) -> np.ndarray:
        """[P, R], each replacement's index in the pool; -1 where the kind takes nothing from single prompts."""
        kind = self.ablation.kind
        if kind.needs_sources:
            index_of = {name: index for index, name in enumerate(self.pool)}
            if not set(self.ids) <= set(index_of):
                return self._drawn_from_others(index_of)
            drawn = draw_sources(prompt_keys(self.seed, self.pool), self.pool, self.ablation.draws)
            return drawn[[index_of[name] for name in self.ids]]
        if kind.needs_statistics and len(self.pool) < 2:
            raise UserError(f"prompts: a {kind} over one prompt says nothing; give more prompts")
        return np.full((len(self.ids), self.ablation.draws), -1)

    def _drawn_from_others(self, index_of: dict[str, int]) -> np.ndarray:
        """Draw where prompts are not among those drawn from: each as if it alone were."""
        found = []
        for name in self.ids:
            there = [other for other in self.pool if other != name]
            pool = [*there, name]
            drawn = draw_sources(prompt_keys(self.seed, pool), pool, self.ablation.draws)[-1]
            found.append([index_of[there[index]] for index in drawn])
        return np.array(found)

    @functools.cached_property
    def places(self) -> dict[Component, slice]:
        """The ablated components' places among a prompt's values in the bank."""
        return places(self.model.config, self.components)

    @functools.cached_property
    def statistics(self) -> WriteStatistics:
        """[F] over the prompt set, placed as in the bank; zeros for the kinds that do not read them."""
        size = sum(place.stop - place.start for place in self.places.values())
        if not self.ablation.kind.needs_statistics:
            return WriteStatistics(np.zeros(size, np.float32), np.zeros(size, np.float32))
        sums = [(len(block), block.sum(axis=0)) for block in self._blocks(size)]
        count = sum(length for length, _ in sums)
        mean = sum(total for _, total in sums) / count
        deviation = np.sqrt(sum(np.square(block - mean).sum(axis=0) for block in self._blocks(size)) / count)
        return WriteStatistics(mean.astype(np.float32), deviation.astype(np.float32))

    def statistics_of(self, component: Component) -> WriteStatistics:
        """Return one component's statistics, [E]."""
        return WriteStatistics(*(array[self.places[component]] for array in self.statistics))

    def _blocks(self, size: int) -> Iterator[np.ndarray]:
        """Yield the values [n, F] in float64 of those prompts in which all are finite.

        They come in order of id always, so that the order of prompts changes nothing.
        """
        ids = sorted(self.pool)
        step = max(1, BLOCK_BYTES // (8 * size))
        for start in range(0, len(ids), step):
            values = self.bank.values(ids[start : start + step]).astype(np.float64)
            yield values[np.isfinite(values).all(axis=1)]


def asked(ablation: AblationConfig, config: ModelConfig, rows: int, streamed: bool) -> Asked:
    """Return what a sweep makes of every prompt.

    Args:
      ablation: of the sweep.
      config: the model's.
      rows: in a block; 0 for the device's default.
      streamed: whether the model's layers are.
    """
    each = 2 if ablation.edges else 1
    programs = len(ablation.components(config)) * each
    return Asked(programs, ablation.draws, rows=rows, streamed=streamed, least=each)


def places(config: ModelConfig, components: Sequence[Component]) -> dict[Component, slice]:
    """Return components' places in an array of all their values: of a write D numbers, of a head head_dim."""
    sizes = [config.width if component.head == WHOLE else config.head_dim for component in components]
    stops = np.cumsum(sizes).tolist()
    return {c: slice(stop - size, stop) for c, size, stop in zip(components, sizes, stops, strict=True)}
