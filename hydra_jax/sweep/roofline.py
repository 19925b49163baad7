"""The arithmetic and the memory traffic of a walk's rows, and which of the two bounds them on a machine."""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp

from hydra_jax.core.edits import ATTN, WHOLE, Ablation, Component
from hydra_jax.models.config import ModelConfig

COPIED_BYTES = 2**28
"""Size of the copy that bandwidth is measured by: no cache holds it."""

TURNS = 5


@dataclasses.dataclass(frozen=True)
class Roofline:
    """A measured rate under the two bounds of a machine; all per second.

    Attributes:
      flops: of matrix products.
      gemm_flops: of bare products of the same shapes.
      bytes: at least, to and from memory, as `intervention_bytes`.
      bandwidth: bytes of a large copy.
    """

    flops: float
    gemm_flops: float
    bytes: float
    bandwidth: float

    @property
    def bound(self) -> str:
        """Whichever takes longer where the two overlap: "arithmetic" or "memory"."""
        return "arithmetic" if self.flops / self.gemm_flops >= self.bytes / self.bandwidth else "memory"

    def __str__(self) -> str:
        return (
            f"{self.flops / 1e9:,.0f} GFLOP/s, {self.flops / self.gemm_flops:.0%} of the GEMM rate; moves at least"
            f" {self.bytes / 1e9:,.2g} GB/s, {self.bytes / self.bandwidth:.0%} of a copy's {self.bandwidth / 1e9:,.3g};"
            f" {self.flops / self.bytes:,.0f} operations a byte, balance at {self.gemm_flops / self.bandwidth:,.0f}:"
            f" bound by {self.bound}"
        )


def intervention_flops(config: ModelConfig, component: Component, length: int) -> int:
    """Return the matrix-product operations of one edit: all layers downstream of it, for one token."""
    attention, mlp = _weights(config)
    mixing = 2 * config.heads * config.head_dim * length
    layers = config.layers - 1 - component.layer
    return 2 * (layers * (attention + mixing + mlp) + (mlp if _same_layer(config, component) else 0))


def ablation_flops(config: ModelConfig, ablation: Ablation, length: int) -> int:
    """Return the matrix-product operations of one ablation of a set: of all downstream of the first but the others."""
    attention, mlp = _weights(config)
    first, *others = ablation.components
    mixing = 2 * config.heads * config.head_dim * length
    clamped = sum(attention + mixing if one.site == ATTN else mlp for one in others if one.head == WHOLE)
    return intervention_flops(config, first, length) - 2 * clamped


def intervention_bytes(config: ModelConfig, component: Component, length: int, prompts: int, draws: int) -> int:
    """Return the bytes that a block of rows moves at least: weights and caches once a block, products' operands once.

    Args:
      config: the model's.
      component: that is ablated in all of them.
      length: T, tokens of a prompt.
      prompts: P, each with a cache.
      draws: R, edits of a prompt.
    """
    c, item = config, jnp.dtype(config.dtype).itemsize
    attention, mlp = _weights(c)
    cache = prompts * 2 * c.kv_heads * c.head_dim * length
    heads = (2 * c.heads + 2 * c.kv_heads) * c.head_dim
    # Products read in the weights' type and write in float32.
    of_attention = (c.width + c.heads * c.head_dim) * item + (heads + c.width) * 4
    of_mlp = (c.width + c.mlp_width) * item + ((2 if c.gated else 1) * c.mlp_width + c.width) * 4
    rows, layers = prompts * draws, c.layers - 1 - component.layer
    whole = (attention + mlp + cache) * item + rows * (of_attention + of_mlp)
    return layers * whole + (mlp * item + rows * of_mlp if _same_layer(c, component) else 0)


def bandwidth() -> float:
    """Measure a device's bandwidth: bytes a second, read and written, of the fastest of a few large copies."""
    array = jnp.zeros(COPIED_BYTES // 4, jnp.float32)
    copy = jax.jit(lambda array: array + 1)
    jax.block_until_ready(copy(array))
    times = []
    for _ in range(TURNS):
        start = time.perf_counter()
        jax.block_until_ready(copy(array))
        times.append(time.perf_counter() - start)
    return 2 * COPIED_BYTES / min(times)


def _weights(config: ModelConfig) -> tuple[int, int]:
    """Return the weights in the products of a layer's attention and of its MLP."""
    c = config
    return 2 * c.width * (c.heads + c.kv_heads) * c.head_dim, (3 if c.gated else 2) * c.width * c.mlp_width


def _same_layer(config: ModelConfig, component: Component) -> bool:
    """Return whether the layer's own MLP is downstream."""
    return component.site == ATTN and not config.parallel
