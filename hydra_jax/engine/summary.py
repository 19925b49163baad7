"""Effects summed up on the devices, so that the host reads no more of them than a result store has."""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hydra_jax.core.effects import Effects


class Summary(flax.struct.PyTreeNode):
    """The ablations of A components in P prompts, as a result store has them: values that are not finite are NaN.

    Attributes:
      total_effect: [P, A, R].
      direct_effect: [P, A, R].
      attn_compensation: [P, A, R].
      mlp_compensation: [P, A, R].
      norm_compensation: [P, A, R].
      compensation: [P, A, 2L], mean over the replacements whose values are finite.
      direct_edge: [P, A, 2L], the same; None where it is not asked for.
      non_finite: [P, A] int, the number of replacements whose values are not finite.
      residual: [P, A], the largest difference between the identity's two sides among the finite ones.
    """

    total_effect: jax.Array
    direct_effect: jax.Array
    attn_compensation: jax.Array
    mlp_compensation: jax.Array
    norm_compensation: jax.Array
    compensation: jax.Array
    direct_edge: jax.Array | None
    non_finite: jax.Array
    residual: jax.Array


def summarise(every: Effects, edges: bool) -> Summary:
    """Summarise [P, A * (1 or 2), 1, R] as a result store has it."""
    apart = jax.tree.map(lambda leaf: leaf[:, :, 0].reshape(len(leaf), -1, 2 if edges else 1, *leaf.shape[3:]), every)
    caused: Effects = jax.tree.map(lambda leaf: leaf[:, :, 0], apart)
    probed = apart.compensation[:, :, 1] if edges else None
    parts = [caused.total_effect, caused.direct_effect, caused.norm_compensation, caused.residual]
    finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, parts))
    for change in [caused.compensation, *([] if probed is None else [probed])]:
        finite &= jnp.isfinite(change).all(axis=(-2, -1))

    def known(values: Float[Array, "P A R"]) -> Float[Array, "P A R"]:
        return jnp.where(finite, values, jnp.nan)

    def mean(values: Float[Array, "P A R L 2"]) -> Float[Array, "P A C"]:
        kept = jnp.where(finite[..., None, None], values, 0).sum(axis=2).reshape(*values.shape[:2], -1)
        return kept / finite.sum(axis=2).astype(kept.dtype)[..., None]

    return Summary(
        total_effect=known(caused.total_effect),
        direct_effect=known(caused.direct_effect),
        attn_compensation=known(caused.attn_compensation),
        mlp_compensation=known(caused.mlp_compensation),
        norm_compensation=known(caused.norm_compensation),
        compensation=mean(caused.compensation),
        direct_edge=None if probed is None else mean(probed),
        non_finite=(~finite).sum(axis=2),
        residual=jnp.where(finite, jnp.abs(caused.residual), 0).max(axis=2),
    )
