"""Effects summed up on the devices, so that the host reads no more of them than a result store has."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hydra_jax.config import EDGES, FREE, METRICS
from hydra_jax.core.effects import Effects
from hydra_jax.core.metrics import Metrics


class Summary(flax.struct.PyTreeNode):
    """A ablations in P prompts, as a result store has them: values that are not finite are NaN.

    Attributes:
      total_effect: [P, A, R].
      direct_effect: [P, A, R].
      attn_compensation: [P, A, R].
      mlp_compensation: [P, A, R].
      norm_compensation: [P, A, R].
      free_total_effect: [P, A, R], with nothing frozen; None where it is not asked for, as all that follow.
      metrics: [P, A, R] each.
      compensation: [P, A, 2L], mean over the replacements whose values are finite.
      direct_edge: [P, A, 2L], the same.
      head_compensation: [P, A, L, H], the same.
      non_finite: [P, A] int, the number of replacements whose values are not finite.
      residual: [P, A], the largest difference between the identity's two sides among the finite ones.
    """

    total_effect: jax.Array
    direct_effect: jax.Array
    attn_compensation: jax.Array
    mlp_compensation: jax.Array
    norm_compensation: jax.Array
    free_total_effect: jax.Array | None
    metrics: Metrics | None
    compensation: jax.Array
    direct_edge: jax.Array | None
    head_compensation: jax.Array | None
    non_finite: jax.Array
    residual: jax.Array

    def variables(self, options: Collection[str]) -> dict[str, Any]:
        """Return the variables of a store of these options, by name."""
        fields = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("metrics", "residual")
        }
        if self.metrics is not None:
            # A metric's field has the name of its variable, in the order of METRICS.
            named = zip(METRICS, self.metrics.__dataclass_fields__, strict=True)
            fields |= {field: getattr(self.metrics, field) for name, field in named if name in options}
        return {name: values for name, values in fields.items() if values is not None}


def summarise(
    every: Effects, metrics: Metrics | None, heads: Float[Array, "P A 1 R L H"] | None, variants: Sequence[str]
) -> Summary:
    """Summarise [P, A * V, 1, R] as a result store has it.

    Args:
      every: of V programs for each ablation.
      metrics: of the first of them, [P, A, 1, R].
      heads: the changes of heads under the first of them.
      variants: names of the V programs, "" first.
    """
    count = len(variants)
    apart = jax.tree.map(lambda leaf: leaf[:, :, 0].reshape(len(leaf), -1, count, *leaf.shape[3:]), every)
    caused, *others = (jax.tree.map(lambda leaf, index=index: leaf[:, :, index], apart) for index in range(count))
    named: dict[str, Effects] = dict(zip(variants[1:], others, strict=True))
    probed = named[EDGES].compensation if EDGES in named else None
    free = named[FREE].total_effect if FREE in named else None
    parts = [caused.total_effect, caused.direct_effect, caused.norm_compensation, caused.residual]
    finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, [*parts, *([] if free is None else [free])]))
    for change in [caused.compensation, *([] if probed is None else [probed])]:
        finite &= jnp.isfinite(change).all(axis=(-2, -1))

    def known(values: Float[Array, "P A R"]) -> Float[Array, "P A R"]:
        return jnp.where(finite, values, jnp.nan)

    def mean(values: Float[Array, "P A R L S"]) -> Float[Array, "P A L S"]:
        kept = jnp.where(finite[..., None, None], values, 0).sum(axis=2)
        return kept / finite.sum(axis=2).astype(kept.dtype)[..., None, None]

    def components(values: Float[Array, "P A R L 2"]) -> Float[Array, "P A C"]:
        return mean(values).reshape(*values.shape[:2], -1)

    return Summary(
        total_effect=known(caused.total_effect),
        direct_effect=known(caused.direct_effect),
        attn_compensation=known(caused.attn_compensation),
        mlp_compensation=known(caused.mlp_compensation),
        norm_compensation=known(caused.norm_compensation),
        free_total_effect=None if free is None else known(free),
        metrics=jax.tree.map(lambda leaf: known(leaf[:, :, 0].astype(jnp.float32)), metrics),
        compensation=components(caused.compensation),
        direct_edge=None if probed is None else components(probed),
        head_compensation=None if heads is None else mean(heads[:, :, 0]),
        non_finite=(~finite).sum(axis=2),
        residual=jnp.where(finite, jnp.abs(caused.residual), 0).max(axis=2),
    )
