"""The rate of a training step, against bare matrix products of its shapes on the same machine."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hydra_jax.benchmarks.kernels import layer_products
from hydra_jax.models.config import ModelConfig
from hydra_jax.training.config import TrainConfig
from hydra_jax.training.step import computing, initial, update


@dataclasses.dataclass(frozen=True)
class MeasuredStep:
    """A run's figures; rates are per second.

    Attributes:
      arm: the run's arm.
      preset: the run's preset.
      parameters: how many the model has.
      tokens: tokens trained on.
      step_flops: useful arithmetic of matrix products: forward, and twice that backward.
      gemm_flops: bare products of the shapes of one layer's weights, at as many rows as a step has tokens.
      step_to_gemm: their ratio.
    """

    arm: str
    preset: str
    parameters: int
    tokens: float
    step_flops: float
    gemm_flops: float
    step_to_gemm: float


def step_flops(config: ModelConfig, tokens: int) -> int:
    """Return the matrix-product operations of a step over `tokens`, in rows of the config's context."""
    c = config
    projections = 2 * c.width * (c.heads + c.kv_heads) * c.head_dim + (3 if c.gated else 2) * c.width * c.mlp_width
    attention = 2 * c.heads * c.head_dim * c.context
    return 6 * tokens * (c.layers * (projections + attention) + c.vocab_size * c.width)


def measure(config: TrainConfig, turns: int = 5, seed: int = 0) -> MeasuredStep:
    """Measure steps on random tokens of the config's whole vocabulary, taking turns with bare products.

    Args:
      config: the run's settings.
      turns: steps that are timed.
      seed: the seed of the tokens.
    """
    vocab_size, context = config.data.vocab_size, config.model.context
    state = initial(config, vocab_size)
    shape = config.accumulate, config.batch // config.accumulate, context + 1
    rows = jax.random.randint(jax.random.key(seed), shape, 0, vocab_size, jnp.int32)
    step = jax.jit(functools.partial(update, config=config))
    decoder = computing(config, state.weights, vocab_size).config
    tokens = config.batch * context
    gemm, operations = layer_products(decoder, tokens // config.accumulate)
    calls: dict[str, Callable[[], Any]] = {"step": lambda: step(state, rows, jnp.int32(0)), "gemm": gemm}
    seconds, times = dict.fromkeys(calls, 0.0), dict.fromkeys(calls, 0)
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(turns):
        for name, call in calls.items():
            spent = 0.0
            # Bare products take as long as the step, so that both see the same machine.
            while spent == 0 or (name == "gemm" and seconds["gemm"] + spent < seconds["step"]):
                start = time.perf_counter()
                jax.block_until_ready(call())
                spent += time.perf_counter() - start
                times[name] += 1
            seconds[name] += spent
    step_rate = step_flops(decoder, tokens) * times["step"] / seconds["step"]
    gemm_rate = operations * times["gemm"] / seconds["gemm"]
    return MeasuredStep(
        arm=config.arm,
        preset=config.preset,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.weights)),
        tokens=tokens * times["step"] / seconds["step"],
        step_flops=step_rate,
        gemm_flops=gemm_rate,
        step_to_gemm=step_rate / gemm_rate,
    )


def table(rows: list[MeasuredStep]) -> str:
    """Return the figures as a table, a line for each arm."""
    lines = [f"{'arm':18} {'parameters':>12} {'tokens/s':>10} {'step GFLOP/s':>13} {'GEMM GFLOP/s':>13} {'ratio':>6}"]
    lines += [
        f"{m.arm:18} {m.parameters:12,} {m.tokens:10,.0f} {m.step_flops / 1e9:13,.0f} {m.gemm_flops / 1e9:13,.0f}"
        f" {m.step_to_gemm:6.0%}"
        for m in rows
    ]
    return "\n".join(lines)
