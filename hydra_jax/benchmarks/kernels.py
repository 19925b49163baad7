"""The rate of a walk's rows, against the machine's matrix products and against whole forward passes.

Rows through a layer and bare products are measured in turns of about one length, layer by layer, so that whatever else
the machine does slows both alike. A ratio is one of times summed over the turns.
"""

from __future__ import annotations

import dataclasses
import functools
import resource
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hydra_jax.benchmarks.timing import apart, timed
from hydra_jax.benchmarks.walks import last_alike, others, random_tokens, walk
from hydra_jax.core.edits import all_components
from hydra_jax.models import transformer
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.layers import product
from hydra_jax.models.transformer import Edits, Params
from hydra_jax.sweep.roofline import Roofline, bandwidth, intervention_bytes, intervention_flops


@dataclasses.dataclass(frozen=True)
class Measured:
    """One prompt length's figures; rates are per second.

    Attributes:
      length: tokens of a prompt.
      rows: of a block.
      interventions: interventions by a walk's rows; clean runs do not count.
      kernel_flops: useful arithmetic of the rows, matrix products only.
      gemm_flops: bare matrix products of the shapes of one layer's weights, at as many rows.
      kernel_to_gemm: the ratio of the two.
      kernel_bytes: bytes that the rows move at least.
      bandwidth: bytes of a large copy.
      forwards: interventions by batched whole forward passes, each with its edit.
      speedup: the ratio of interventions to forwards.
      prefill_prompts: clean runs, in the walk.
      compile_seconds: time to compile all that a walk takes.
      peak_gb: the most memory in use so far: the device's, or on a CPU this process's.
    """

    length: int
    rows: int
    interventions: float
    kernel_flops: float
    gemm_flops: float
    kernel_to_gemm: float
    kernel_bytes: float
    bandwidth: float
    forwards: float
    speedup: float
    prefill_prompts: float
    compile_seconds: float
    peak_gb: float

    @property
    def roofline(self) -> Roofline:
        """The kernel's roofline."""
        return Roofline(self.kernel_flops, self.gemm_flops, self.kernel_bytes, self.bandwidth)


def layer_products(config: ModelConfig, rows: int) -> tuple[Callable[[], Any], int]:
    """Return a function that makes bare products [rows, in] x [in, out], one for each weight of a layer.

    Returns:
      The function, and the operations of one call.
    """
    c = config
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    shapes = [(c.width, queries), (c.width, keys), (c.width, keys), (queries, c.width)]
    shapes += [(c.width, c.mlp_width)] * (2 if c.gated else 1) + [(c.mlp_width, c.width)]
    random_keys = jax.random.split(jax.random.key(0), len(shapes))
    kernels = [jax.random.normal(key, shape, c.dtype) for key, shape in zip(random_keys, shapes, strict=True)]
    inputs = [jnp.ones((rows, shape[0]), c.dtype) for shape in shapes]
    run = jax.jit(lambda xs, ws: [product(c, "ri,io->ro", x, w) for x, w in zip(xs, ws, strict=True)])
    return lambda: run(inputs, kernels), sum(2 * rows * a * b for a, b in shapes)


@jax.jit
def forward_batch(params: Params, tokens: jax.Array, component: jax.Array, value: jax.Array) -> jax.Array:
    """Run the baseline: whole forward passes of tokens [B, T], with a component's write at the last token replaced.

    It is a strong one: batched, compiled once for all components, and unembedding the last token alone.

    Args:
      params: the model.
      tokens: [B, T].
      component: [2], its layer and site.
      value: [B, D], the values in place of its writes.

    Returns:
      Logits [B, V] of the last token.
    """

    def forward(tokens: jax.Array, value: jax.Array) -> jax.Array:
        c = params.config
        mask = jnp.zeros((c.layers, 2, len(tokens)), bool).at[component[0], component[1], -1].set(True)
        edits = Edits(mask, jnp.broadcast_to(value, (c.layers, 2, 1, c.width)))
        _, trace = transformer.forward(params, tokens, edits)
        return transformer.unembed(params, trace.resid_post[-1, -1])

    return jax.vmap(forward)(tokens, value)


def measure(params: Params, length: int, rows: int, draws: int, step: int, seed: int = 0) -> Measured:
    """Measure one prompt length.

    Args:
      params: the model.
      length: tokens of a prompt.
      rows: in a block, about.
      draws: replacements of each prompt.
      step: ablate every `step`-th component.
      seed: the seed of the tokens.
    """
    config = params.config
    prompts = max(1, rows // draws)
    tokens = random_tokens(config, prompts, length, seed)
    components = all_components(config.layers)[::step]
    replacements = functools.partial(others, draws=draws)
    ablated = functools.partial(walk, params, tokens, tokens[:, -1], draws=draws, at_once=rows, sources=replacements)
    little = functools.partial(ablated, components=last_alike(config, components))
    compiled_too, _ = timed(little)
    with apart() as spent:
        compiled_before, _ = timed(little)
    prefill_seconds = spent.clean

    gemm, gemm_operations = layer_products(config, prompts * draws)
    batch = max(1, rows // length)
    whole = jnp.asarray(tokens[np.arange(batch) % prompts]), jnp.array([0, 0]), jnp.ones((batch, config.width))
    timed(gemm), timed(lambda: forward_batch(params, *whole))
    gemm_seconds = forward_seconds = 0.0
    gemms = 0

    def catch_up() -> None:
        """Make bare products until they have taken as long as the rows so far, so that both see the same machine."""
        nonlocal gemm_seconds, gemms
        while gemm_seconds < spent.kernel:
            gemm_seconds += timed(gemm)[0]
            gemms += 1

    with apart() as spent:
        ablated(components=components, turn=catch_up)
    catch_up()
    kernel_operations = prompts * draws * sum(intervention_flops(config, each, length) for each in components)
    kernel_bytes = sum(intervention_bytes(config, each, length, prompts, draws) for each in components)
    turns = max(3, len(components) // 10)
    for _ in range(turns):
        forward_seconds += timed(lambda: forward_batch(params, *whole))[0]
    interventions = prompts * draws * len(components) / spent.kernel
    forwards = batch * turns / forward_seconds
    kernel_flops = kernel_operations / spent.kernel
    gemm_flops = gemm_operations * gemms / gemm_seconds
    return Measured(
        length=length,
        rows=prompts * draws,
        interventions=interventions,
        kernel_flops=kernel_flops,
        gemm_flops=gemm_flops,
        kernel_to_gemm=kernel_flops / gemm_flops,
        kernel_bytes=kernel_bytes / spent.kernel,
        bandwidth=bandwidth(),
        forwards=forwards,
        speedup=interventions / forwards,
        prefill_prompts=prompts / prefill_seconds,
        compile_seconds=max(0.0, compiled_too - compiled_before),
        peak_gb=peak_gb(),
    )


def table(rows: Sequence[Measured]) -> str:
    """Return the figures as a table, a line for each length."""
    lines = [
        f"{'tokens':>6} {'rows':>5} {'interventions/s':>16} {'kernel GFLOP/s':>15} {'GEMM GFLOP/s':>13}"
        f" {'ratio':>6} {'forwards/s':>11} {'speed-up':>9} {'prefills/s':>11} {'compile s':>10} {'peak GB':>8}"
    ]
    lines += [
        f"{m.length:6} {m.rows:5} {m.interventions:16,.0f} {m.kernel_flops / 1e9:15,.0f} {m.gemm_flops / 1e9:13,.0f}"
        f" {m.kernel_to_gemm:6.0%} {m.forwards:11,.1f} {m.speedup:8.0f}x {m.prefill_prompts:11,.1f}"
        f" {m.compile_seconds:10.1f} {m.peak_gb:8.2f}"
        for m in rows
    ]
    lines += ["", *(f"roofline, {m.length} tokens: {m.roofline}" for m in rows)]
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Describe the devices that the figures are taken on."""
    device = jax.devices()[0]
    return {"backend": jax.default_backend(), "device": device.device_kind, "devices": jax.device_count()}


def peak_gb() -> float:
    """Return the most memory in use so far: the device's, or on a CPU this process's."""
    statistics = jax.devices()[0].memory_stats() or {}
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return statistics.get("peak_bytes_in_use", kilobytes * 1024) / 1e9
