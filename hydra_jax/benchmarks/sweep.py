"""A whole sweep of made-up prompts by the code of every sweep, and the parts that its time goes into."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from tokenizers import Tokenizer, models

from hydra_jax.benchmarks.kernels import layer_products, peak_gb
from hydra_jax.benchmarks.timing import apart, timed
from hydra_jax.config import AblationConfig, ReadoutConfig, SweepConfig
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.batching import evenly
from hydra_jax.engine.cluster import Cluster
from hydra_jax.engine.layers import Streamed
from hydra_jax.engine.memory import BatchSizer, left
from hydra_jax.models.transformer import Params
from hydra_jax.sweep.bank import Bank
from hydra_jax.sweep.chunks import fill
from hydra_jax.sweep.clean import CleanPass
from hydra_jax.sweep.items import Item
from hydra_jax.sweep.plan import Plan, asked, kept
from hydra_jax.sweep.readout import NONE
from hydra_jax.sweep.roofline import ablation_flops
from hydra_jax.text.padding import padded_length
from hydra_jax.text.prompts import Prompt
from hydra_jax.weights.model import Model


@dataclasses.dataclass(frozen=True)
class Swept:
    """A sweep's figures; seconds are of programs that are compiled already.

    Attributes:
      prompts: how many there are.
      length: T, tokens of each prompt.
      interventions: how many there are in all.
      at_once: prompts in a walk.
      clean_seconds: time of the clean pass.
      seconds: time of all ablations, as a sweep makes them.
      apart_seconds: the same, where every step is waited for before the next: the steps are parts of it.
      kernel_seconds: time of rows through layers in them, and of their effects.
      prefill_seconds: time of clean runs in the same walks, and of handing layers over.
      sources_seconds: time of bringing replacements to the device, which a sweep may hide behind the rest.
      operations: of the rows' matrix products.
      flops: the same per second of kernel_seconds.
      gemm_flops: rate of bare products of the same shapes, on one device by itself, times the number of devices.
      waited_seconds: time of waiting for streamed layers, part of `seconds`; 0 where layers are on the devices.
      read_bytes: of the layers that were streamed in that time.
      peak_gb: the most memory in use so far: the device's, or on a CPU this process's.
    """

    prompts: int
    length: int
    interventions: int
    at_once: int
    clean_seconds: float
    seconds: float
    apart_seconds: float
    kernel_seconds: float
    prefill_seconds: float
    sources_seconds: float
    operations: int
    flops: float
    gemm_flops: float
    waited_seconds: float
    read_bytes: int
    peak_gb: float

    def __str__(self) -> str:
        parts = {
            "the kernel: rows through layers": self.kernel_seconds,
            "clean runs in the same walks": self.prefill_seconds,
            "replacements": self.sources_seconds,
        }
        parts["all else (reading results)"] = self.apart_seconds - sum(parts.values())
        streamed = [
            f"layers streamed: {self.read_bytes / 1e9:,.3g} GB read, {self.waited_seconds:.2f} s waited for them",
        ]
        return "\n".join(
            [
                f"{self.interventions:,} interventions in {self.prompts:,} prompts of {self.length} tokens,"
                f" {self.at_once:,} at once",
                f"clean pass {self.clean_seconds:.2f} s, ablations {self.seconds:.2f} s;"
                f" {self.apart_seconds:.2f} s with every step waited for:",
                *(
                    f"  {seconds:8.2f} s  {seconds / self.apart_seconds:4.0%}  {part}"
                    for part, seconds in parts.items()
                ),
                f"the kernel: {self.flops / 1e12:,.3g} TFLOP/s, {self.flops / self.gemm_flops:.0%} of bare products"
                f" ({self.gemm_flops / 1e12:,.3g}); {self.interventions / self.kernel_seconds:,.0f} interventions/s",
                *(streamed if self.read_bytes else []),
                f"memory: {self.peak_gb:,.3g} GB in use at most",
            ]
        )


def cost_of_pairs(single: Swept, pairs: Swept) -> str:
    """Compare a sweep of single components and their pairs with one of single components, in a line.

    A pair's rows begin at the first of the two, and so go through more layers on average: rates are of rows, and of the
    operations that rows want.
    """
    rates = [(one.interventions / one.seconds, one.operations / one.seconds / 1e9) for one in (single, pairs)]
    return (
        f"with pairs: {rates[1][0]:,.0f} rows/s, without {rates[0][0]:,.0f}; useful operations {rates[1][1]:,.0f} and"
        f" {rates[0][1]:,.0f} GFLOP/s, {rates[1][1] / rates[0][1]:.0%}"
    )


def cost_of_metrics(plain: Swept, measured: Swept, params: Params) -> str:
    """Compare a sweep that reads the whole distribution with one that does not, in a line."""
    operations = 2 * params.config.width * params.config.vocab_size * measured.interventions
    computed = operations / measured.gemm_flops
    more = measured.seconds - plain.seconds
    return (
        f"metrics: {measured.seconds:.2f} s, without {plain.seconds:.2f}; {more:.2f} s more, {computed:.2f} computed"
        f" (2 D V a row, {operations / 1e12:,.3g} TFLOP, at the rate of bare products)"
    )


def cost_of_streaming(resident: Swept, streamed: Swept) -> str:
    """Compare a sweep whose layers are streamed with one whose layers are on the devices, in a line."""
    more = streamed.seconds / resident.seconds - 1
    return (
        f"streaming: ablations {streamed.seconds:.2f} s, resident {resident.seconds:.2f} ({more:+.1%}); the kernel"
        f" {streamed.kernel_seconds:.2f} s, resident {resident.kernel_seconds:.2f};"
        f" {streamed.waited_seconds / streamed.seconds:.1%} waited for layers"
    )


def measure(
    params: Params,
    prompts: int,
    length: int,
    ablation: AblationConfig,
    rows: int,
    seed: int = 0,
    layers: Streamed | None = None,
    limit: float = 0.0,
    metrics: str = "",
) -> Swept:
    """Sweep three times, and measure the second and, step by step, the third time.

    Args:
      params: the model; where its layers are streamed, what is not in a layer.
      prompts: how many prompts of random tokens to sweep.
      length: T, tokens of each prompt.
      ablation: the ablations.
      rows: of a block on a device; 0 for its default.
      seed: the seed of the tokens.
      layers: what streams them; None where they are among `params`.
      limit: GB that a device may use in all; 0 for no limit.
      metrics: as of `ReadoutConfig`.
    """
    mesh, c = meshes.mesh_of(params), params.config
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    model = Model("made up", params, tokenizer, "", streamed=layers)
    tokens = np.random.default_rng(seed).integers(0, c.vocab_size, (prompts, length))
    items = [Item(Prompt(f"{n:07}", f"{n:07}"), tuple(row), text_id=f"{n:07}") for n, row in enumerate(tokens.tolist())]
    streamed = model.layers.streamed
    # Random weights lose precision: what is timed does not stop for it.
    config = SweepConfig(
        ablation=ablation,
        readout=ReadoutConfig(metrics=metrics),
        seed=seed,
        rows=rows,
        identity_tolerance=0.999,
        non_finite=1.0,
    )
    sizer = BatchSizer(c, mesh, asked(config, c, streamed), left(limit, c, mesh, streamed))

    def clean_pass() -> Bank:
        clean = CleanPass(model, ablation.kind, kept(ablation, c), sizer, Bank(c.dtype), Cluster(0, 1))
        with clean.bar(prompts) as bar:
            clean.run(items, bar)
        return clean.bank

    clean_pass()
    clean_seconds, bank = timed(clean_pass)
    tops = [[bank.rows[item.key].top, NONE] for item in items]
    plan = Plan.build(model, bank, sizer, config, items, np.array(tops))
    longest = padded_length(length, c.context)
    chunks = evenly(prompts, sizer.chunk(longest))

    def sweep() -> None:
        fill(plan, chunks, lambda chunk, arrays: None, progress=False)

    sweep()
    waited, read = (layers.waited, layers.read_bytes) if layers else (0.0, 0)
    seconds, _ = timed(sweep)
    waited, read = (layers.waited - waited, layers.read_bytes - read) if layers else (0.0, 0)
    with apart() as spent:
        apart_seconds, _ = timed(sweep)
    draws = ablation.draws
    at_once = min(chunks[0].stop, sizer.prompts(longest))
    block = min(sizer.asked.texts, -(-at_once // sizer.least)) * draws
    operations = prompts * draws * sum(ablation_flops(c, one, length) for one in plan.ablations)
    return Swept(
        prompts=prompts,
        length=length,
        interventions=prompts * draws * len(plan.ablations),
        at_once=at_once,
        clean_seconds=clean_seconds,
        seconds=seconds,
        apart_seconds=apart_seconds,
        kernel_seconds=spent.kernel,
        prefill_seconds=spent.clean,
        sources_seconds=spent.sources,
        flops=operations / spent.kernel,
        operations=operations,
        gemm_flops=mesh.size * _gemm_flops(params, block, spent.kernel / 4),
        waited_seconds=waited,
        read_bytes=read,
        peak_gb=peak_gb(),
    )


def _gemm_flops(params: Params, rows: int, least: float) -> float:
    """Measure the rate of bare products on one device, for at least `least` seconds."""
    run, operations = layer_products(params.config, max(1, rows))
    jax.block_until_ready(run())
    spent, turns = 0.0, 0
    while spent < least or turns < 3:
        once, _ = timed(run)
        spent, turns = spent + once, turns + 1
    return operations * turns / spent
