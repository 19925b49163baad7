"""Bootstrap: draws of prompts, of their replacements and of training seeds, and intervals from them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LEVEL = 0.95
"""Share of the bootstrap distribution inside an interval."""

GROUP, AGAIN = 10, 4
"""In `nested`, the samples that share draws of replacements, and the draws of each prompt's that they share."""

BLOCK = 100
"""Samples that are looked at together where each sorts its prompts."""

RowsFunction = Callable[[jax.Array, Any], Any]
StatisticsFunction = Callable[[Any, Any], dict[str, jax.Array]]


def interval(samples: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of [S, ...] resamples; NaN where a resample has no value."""
    tail = (1 - level) / 2
    # Two infinities have no value between them.
    finite = np.where(np.isfinite(samples), samples, np.nan)
    low, high = np.quantile(finite, [tail, 1 - tail], axis=0)
    return low, high


def clearly_above_0(samples: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """Return whether the interval of [S, ...] resamples lies above 0, [...]; what has no interval does not."""
    low, _ = interval(samples, level)
    return low > 0


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return the quotient; NaN where there is none."""
    above, below = np.broadcast_arrays(np.asarray(above, float), np.asarray(below, float))
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its bootstrap interval."""

    value: float
    low: float
    high: float

    @classmethod
    def resampled(cls, value: float | np.ndarray, samples: np.ndarray) -> Estimate:
        """A value with the 95 % interval of its resamples [S]."""
        low, high = interval(samples)
        return cls(float(value), float(low), float(high))

    @classmethod
    def in_row(cls, row: Mapping[Hashable, Any], name: str) -> Estimate:
        """The statistic `name` in a row of a table that has columns `name`, `name_low` and `name_high`."""
        return cls(row[name], row[f"{name}_low"], row[f"{name}_high"])

    def text(self, form: str = "{:.2f}") -> str:
        """The value and its interval, as in "0.30 (0.25 to 0.36)"; the value alone where it has no interval."""
        if not (np.isfinite(self.low) and np.isfinite(self.high)):
            return form.format(self.value)
        return f"{form.format(self.value)} ({form.format(self.low)} to {form.format(self.high)})"


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Draws with replacement, made once for all that is compared, so that sums and differences have intervals too.

    Attributes:
      prompts: [S, P], how often each of S samples draws each prompt. Where whole texts are drawn, with all that is
        read of each, samples may differ in how many they have.
      replacements: [P, S, R], how often a sample draws each replacement of a prompt; None where they are not drawn
        here.
      seeds: [S, M], how often a sample draws each of M training seeds; None where they are not drawn.
      all_first: whether the first sample is no resample but everything once: its mean is the estimate itself.
      dtype: of the weights. Arrays of [P, S, ...] are large: they want float32.
    """

    prompts: np.ndarray
    replacements: np.ndarray | None = None
    seeds: np.ndarray | None = None
    all_first: bool = False
    dtype: type[np.floating] = np.float64

    @classmethod
    def draw(cls, prompts: int, samples: int, random: np.random.Generator) -> Bootstrap:
        """Draw `samples` resamples of prompts alone."""
        return cls(_counts(prompts, samples, random))

    @classmethod
    def draw_all(cls, prompts: int, replacements: int, samples: int, random: np.random.Generator) -> Bootstrap:
        """Draw `samples` resamples of prompts and, for each prompt, of replacements, after a first sample of all."""
        of_replacements = _counts(replacements, (prompts, samples + 1), random)
        of_prompts = _counts(prompts, samples + 1, random)
        of_replacements[:, 0], of_prompts[0] = 1, 1
        return cls(of_prompts, of_replacements, all_first=True, dtype=np.float32)

    def with_seeds(self, seeds: int, random: np.random.Generator) -> Bootstrap:
        """Return the same draws with draws of as many training seeds."""
        counts = _counts(seeds, len(self.prompts), random)
        if self.all_first:
            counts[0] = 1
        return dataclasses.replace(self, seeds=counts)

    @functools.cached_property
    def prompt_weights(self) -> np.ndarray:
        """[S, P], each prompt's weight in a sample's mean."""
        return (self.prompts / self.prompts.sum(axis=1, keepdims=True)).astype(self.dtype)

    @functools.cached_property
    def replacement_weights(self) -> np.ndarray:
        """[P, S, R], each replacement's weight in a sample's mean for its prompt."""
        assert self.replacements is not None
        return (self.replacements / self.replacements.shape[2]).astype(self.dtype)

    def seed_weights(self, present: list[int] | None = None) -> np.ndarray:
        """[S, M], each seed's weight in a sample's mean over those `present` (all, if None).

        A sample that has drawn none of them takes all of them.
        """
        assert self.seeds is not None
        counts = (self.seeds if present is None else self.seeds[:, present]).astype(np.float64)
        counts = np.where(counts.sum(axis=1, keepdims=True) > 0, counts, 1)
        return counts / counts.sum(axis=1, keepdims=True)

    def mean(self, array: np.ndarray) -> np.ndarray:
        """Means [S, ...] of [P, ...] over the prompts of each sample."""
        means = self.prompt_weights @ array.reshape(len(array), -1)
        return means.reshape(len(means), *array.shape[1:])

    def mean_of_drawn(self, array: np.ndarray) -> np.ndarray:
        """Means [S, ...] over prompts of what already differs between samples, [P, S, ...]."""
        return np.einsum("sp,ps...->s...", self.prompt_weights, array, optimize=True)

    def mean_over_replacements(self, array: np.ndarray) -> np.ndarray:
        """Means [P, S, A] of [P, A, R] over the replacements that each sample draws."""
        return np.einsum("psr,par->psa", self.replacement_weights, array, optimize=True)

    def mean_over_seeds(self, array: np.ndarray) -> np.ndarray:
        """Means [S, A] of [M, P, A] over the seeds and prompts of each sample."""
        return np.einsum("sn,sp,npa->sa", self.seed_weights(), self.prompt_weights, array, optimize=True)

    def median(self, array: np.ndarray) -> np.ndarray:
        """Medians [S, A] of [P, A] over the prompts of each sample."""
        total = self.prompts.sum(axis=1, keepdims=True)
        middles = [(total - 1) // 2, total // 2]
        medians = np.empty((len(self.prompts), array.shape[1]), np.float32)
        for column, values in enumerate(array.T):
            order = np.argsort(values)
            reached = np.cumsum(self.prompts[:, order], axis=1)
            ranks = [(reached > middle).argmax(axis=1) for middle in middles]
            medians[:, column] = values[order][np.stack(ranks)].mean(axis=0)
        return medians

    def kept(self, share: float) -> np.ndarray:
        """Return how many prompts a share of each sample's is, [S]: at least one."""
        return np.maximum(np.ceil(share * self.prompts.sum(axis=1) * (1 - 1e-12)), 1)

    def mean_of_top(self, arrays: Sequence[np.ndarray], share: float) -> list[np.ndarray]:
        """Means [S, A] of arrays [P, A] over the share of each sample's prompts in which the first array is largest."""
        kept = self.kept(share)[:, None]
        means = [np.empty((len(self.prompts), array.shape[1])) for array in arrays]
        for column, leading in enumerate(arrays[0].T):
            order = np.argsort(-leading, kind="stable")
            for start in range(0, len(self.prompts), BLOCK):  # so that memory does not grow with the samples
                block = slice(start, start + BLOCK)
                counts = self.prompts[block][:, order]
                before = np.cumsum(counts, axis=1) - counts
                weights = np.clip(kept[block] - before, 0, counts) / kept[block]
                for mean, array in zip(means, arrays, strict=True):
                    mean[block, column] = weights @ array[order, column]
        return means


def nested(
    drawn: np.ndarray,
    given: Any,
    rows: RowsFunction,
    statistics: StatisticsFunction,
    samples: int,
    seed: int,
    texts: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Bootstrap]:
    """Statistics of prompts with replacements, and of nested resamples: prompts, then each one's replacements.

    Args:
      drawn: [P, R, V], the variables that differ between replacements.
      given: a tree of arrays that `rows` and `statistics` use besides.
      rows: the function of means over replacements [P, V] and `given` that returns a tree of [P, ...]: what each
        prompt adds to the sums that statistics are made of.
      statistics: the function of means of that tree over prompts, [N, ...] for N samples, and `given` that returns
        statistics by name, [N, ...].
      samples: S.
      seed: of the draws.
      texts: [P], from 0, the text that each prompt is a position of, if there are fewer: texts are drawn then, with
        all their positions, as what is read of one text is no evidence about others. From `clusters`.

    Returns:
      The statistics of all, [...]; those of resamples, [S, ...]; and the prompts that these drew.
    """
    keys = jax.random.split(jax.random.key(seed), -(-samples // GROUP))
    arrays = jnp.asarray(drawn), jax.tree.map(jnp.asarray, given), keys
    number = 0 if texts is None else int(texts.max()) + 1
    program = _nested(*arrays, rows, statistics, None if texts is None else jnp.asarray(texts), number)
    values, resamples, counts = jax.device_get(program)

    def flat(groups: np.ndarray) -> np.ndarray:
        return groups.reshape(-1, groups.shape[-1])[:samples]

    return values, {name: flat(groups) for name, groups in resamples.items()}, Bootstrap(flat(counts))


def clusters(text_ids: np.ndarray | None) -> np.ndarray | None:
    """Return the text of each prompt, [P], from 0; None where prompts are drawn one by one.

    That is where every prompt is a text of its own, and where all are of one: other texts are then beyond what can be
    told, and an interval is of the positions of this one.

    Args:
      text_ids: [P]; None where there are none.
    """
    if text_ids is None:
        return None
    names, texts = np.unique(list(map(str, text_ids)), return_inverse=True)
    return texts.astype(np.int32) if 1 < len(names) < len(texts) else None


@functools.partial(jax.jit, static_argnames=("rows", "statistics", "number"))
def _nested(
    drawn: jax.Array,
    given: Any,
    keys: jax.Array,
    rows: RowsFunction,
    statistics: StatisticsFunction,
    texts: jax.Array | None,
    number: int,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], jax.Array]:
    """Statistics, those of resamples [G, GROUP, ...], and how often each drew which prompt [G, GROUP, P].

    A group of GROUP samples has a key. It draws replacements AGAIN times for each prompt, and the n-th time that a
    sample has a prompt it takes the n-th of these draws: then a group's sums are products of matrices, and no sample
    has a prompt twice with the same replacements (but beyond AGAIN times).
    """
    prompts, replacements, _ = drawn.shape

    def sums(means: jax.Array, weights: jax.Array) -> Any:
        """Means of the rows under weights [N, P]."""
        return jax.tree.map(lambda row: weights @ row, rows(means, given))

    def group(key: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        of_prompts, of_replacements = jax.random.split(key)
        items = prompts if texts is None else number
        chosen = jax.random.randint(of_prompts, (GROUP, items), 0, items)
        counts = jax.vmap(lambda row: jnp.bincount(row, length=items))(chosen)
        counts = counts if texts is None else counts[:, texts]
        picked = jax.random.randint(of_replacements, (prompts, AGAIN, replacements), 0, replacements)
        share = (picked[..., None] == jnp.arange(replacements)[None, None, None]).sum(axis=2) / replacements
        means = jnp.einsum("pjr,pra->jpa", share, drawn)
        times = (counts[None] + AGAIN - 1 - jnp.arange(AGAIN)[:, None, None]) // AGAIN
        size = prompts if texts is None else counts.sum(axis=1)[None, :, None].astype(jnp.float32)
        parts = jax.lax.map(lambda part: sums(*part), (means, times.astype(jnp.float32) / size))
        return statistics(jax.tree.map(lambda part: part.sum(axis=0), parts), given), counts

    whole = statistics(sums(drawn.mean(axis=1), jnp.full((1, prompts), 1 / prompts)), given)
    values = {name: value[0] for name, value in whole.items()}
    return values, *jax.lax.map(group, keys)


def _counts(items: int, samples: int | tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """[*samples, items], how often each item is among as many draws with replacement as there are items."""
    return random.multinomial(items, np.full(items, 1 / items), size=samples)
