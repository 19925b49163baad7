"""Everything that a sweep computes with: prompts as tokens, which of them are swept, and all draws."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from hydra_jax.config import HEADS, AblationConfig, SweepConfig
from hydra_jax.core.edits import WHOLE, Ablation, Component, WriteStatistics, all_components, prompt_keys
from hydra_jax.engine.memory import Asked, BatchSizer
from hydra_jax.errors import UserError
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import Contrast
from hydra_jax.sweep.bank import Bank
from hydra_jax.sweep.draws import Pool
from hydra_jax.sweep.items import Item
from hydra_jax.sweep.readout import contrasts
from hydra_jax.weights.model import Model

BLOCK_BYTES = 2**28
"""Bytes of values that are summed at once for means and deviations."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a sweep computes with, prompts in order of length.

    Attributes:
      model: the model.
      items: the P prompts that are swept.
      tokens: [P, 2], the target and the foil of each (`readout.NONE` for no foil).
      bank: the clean runs.
      pool: the prompts that replacements, means and deviations come from.
      apart: whether these are other prompts, of which a mean leaves the ablated one out, and not the prompts swept.
      ablation: what is ablated, and how.
      ablations: each a set of components.
      options: of the result store.
      seed: of the draws.
      sizer: says how many prompts go at once.
      tolerance: how far the identity of `core.effects` may be from holding, in logits.
      non_finite: the share of interventions whose values may be no numbers.
      components: those whose values are kept, in forward order.
      start: the first cut of every cascade; None for the attention that contributes most.
    """

    model: Model
    items: Sequence[Item]
    tokens: np.ndarray
    bank: Bank
    pool: Sequence[Item]
    apart: bool
    ablation: AblationConfig
    ablations: Sequence[Ablation]
    options: frozenset[str]
    seed: int
    sizer: BatchSizer
    tolerance: float
    non_finite: float
    components: Sequence[Component]
    start: Component | None = None

    @classmethod
    def build(
        cls,
        model: Model,
        bank: Bank,
        sizer: BatchSizer,
        config: SweepConfig,
        items: Sequence[Item],
        tokens: np.ndarray,
        pool: Sequence[Item] | None = None,
        components: Sequence[Component] | None = None,
    ) -> Plan:
        """Return the plan of a sweep whose clean runs are made.

        Args:
          model: the model.
          bank: with the clean runs of all prompts below.
          sizer: says how many prompts go at once.
          config: the sweep's settings.
          items: the prompts that are swept.
          tokens: [P, 2], the target and the foil of each.
          pool: other prompts that replacements come from; None for the same.
          components: those whose values the bank has, where no ablations are made; None for the ablations'.
        """
        ablations = config.ablation.ablations(model.config) if components is None else []
        return cls(
            model=model,
            items=items,
            tokens=tokens,
            bank=bank,
            pool=items if pool is None else pool,
            apart=pool is not None,
            ablation=config.ablation,
            ablations=ablations,
            options=config.options,
            seed=config.seed,
            sizer=sizer,
            tolerance=config.identity_tolerance,
            non_finite=config.non_finite,
            components=kept(config.ablation, model.config) if components is None else components,
        )

    @functools.cached_property
    def ids(self) -> list[str]:
        """The prompts' ids."""
        return [item.prompt.id for item in self.items]

    @functools.cached_property
    def pool_keys(self) -> list[str]:
        """The names of the clean runs that replacements come from."""
        return [item.key for item in self.pool]

    @property
    def targets(self) -> np.ndarray:
        """[P], the token that is read in each."""
        return self.tokens[:, 0]

    @functools.cached_property
    def contrasts(self) -> Contrast:
        """[P, K], what is read in each."""
        return contrasts(self.tokens)

    @functools.cached_property
    def keys(self) -> jax.Array:
        """[P] keys of the prompts' draws."""
        return prompt_keys(self.seed, self.ids)

    @functools.cached_property
    def sources(self) -> np.ndarray:
        """[P, R], each replacement's index in the pool; -1 where the kind takes nothing from single prompts."""
        kind, draws = self.ablation.kind, self.ablation.draws
        if self.ablation.paired:
            return np.arange(len(self.items))[:, None]
        if kind.needs_sources:
            return Pool(self.pool, self.ablation.match).draw(self.items, draws, self.seed)
        if kind.needs_statistics and len(self.pool) < 2:
            raise UserError(f"prompts: a {kind} over one prompt says nothing; give more prompts")
        return np.full((len(self.ids), draws), -1)

    @functools.cached_property
    def places(self) -> dict[Component, slice]:
        """The ablated components' places among a prompt's values in the bank."""
        return places(self.model.config, self.components)

    @functools.cached_property
    def statistics(self) -> tuple[int, np.ndarray, np.ndarray]:
        """The number of prompts in the pool whose values are finite, and these values' mean and variance, [F]."""
        size = sum(place.stop - place.start for place in self.places.values())
        sums = [(len(block), block.sum(axis=0)) for block in self._blocks(size)]
        count = sum(length for length, _ in sums)
        mean = sum(total for _, total in sums) / count
        return count, mean, sum(np.square(block - mean).sum(axis=0) for block in self._blocks(size)) / count

    def statistics_of(self, component: Component, prompts: np.ndarray) -> WriteStatistics:
        """Return one component's statistics for N of the prompts, [N, E]: where the pool is apart, without themselves.

        For kinds that do not read them, zeros that fit any shape.

        Raises:
          UserError: if nothing is left of the pool for a prompt.
        """
        if not self.ablation.kind.needs_statistics:
            nothing = np.zeros((len(prompts), 1), np.float32)
            return WriteStatistics(nothing, nothing)
        count, mean, variance = self.statistics
        place = self.places[component]
        means, variances = (np.repeat(every[None, place], len(prompts), 0) for every in (mean, variance))
        for row, index in enumerate(prompts):
            if own := self._own.get(int(index)):
                away = self.bank.take(*self.bank.where(own), place).astype(np.float64) - mean[place]
                away = away[np.isfinite(away).all(axis=1)]
                left = count - len(away)
                if not left:
                    raise UserError(f"sources: have nothing beside prompt {self.items[index].prompt.name}; give others")
                shift = away.sum(axis=0) / left
                means[row] -= shift
                variances[row] = (count * variance[place] - np.square(away).sum(axis=0)) / left - np.square(shift)
        deviations = np.sqrt(np.maximum(variances, 0))
        return WriteStatistics(means.astype(np.float32), deviations.astype(np.float32))

    @functools.cached_property
    def _own(self) -> dict[int, list[str]]:
        """The clean runs of those in the pool that are a prompt itself, by its index, where the pool is apart."""
        if not self.apart:
            return {}
        pool = Pool(self.pool)
        found = {index: [self.pool_keys[own] for own in pool.own(item)] for index, item in enumerate(self.items)}
        return {index: own for index, own in found.items() if own}

    def _blocks(self, size: int) -> Iterator[np.ndarray]:
        """Yield the values [n, F] in float64 of those prompts in which all are finite.

        They come in order of id always, so that the order of prompts changes nothing.
        """
        ids = sorted(self.pool_keys)
        step = max(1, BLOCK_BYTES // (8 * size))
        for start in range(0, len(ids), step):
            values = self.bank.values(ids[start : start + step]).astype(np.float64)
            yield values[np.isfinite(values).all(axis=1)]


def asked(config: SweepConfig, model: ModelConfig, streamed: bool) -> Asked:
    """Return what a sweep makes of every prompt.

    Args:
      config: of the sweep.
      model: the model's.
      streamed: whether the model's layers are.
    """
    ablation, each = config.ablation, len(config.ablation.variants)
    programs = len(ablation.ablations(model)) * each
    by_head = HEADS in config.options
    return Asked(programs, ablation.draws, rows=config.rows, streamed=streamed, least=each, by_head=by_head)


def kept(ablation: AblationConfig, model: ModelConfig) -> list[Component]:
    """Return the components that are ablated, in forward order: by a cascade, any write."""
    writes = set(all_components(model.layers)) if ablation.cascade else set()
    return sorted(writes | {component for one in ablation.ablations(model) for component in one.components})


def places(config: ModelConfig, components: Sequence[Component]) -> dict[Component, slice]:
    """Return components' places in an array of all their values: of a write D numbers, of a head head_dim."""
    sizes = [config.width if component.head == WHOLE else config.head_dim for component in components]
    stops = np.cumsum(sizes).tolist()
    return {c: slice(stop - size, stop) for c, size, stop in zip(components, sizes, stops, strict=True)}
