"""A whole sweep of made-up prompts by the code of every sweep, and the parts that its time goes into."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from tokenizers import Tokenizer, models

from hydra_jax.benchmarks.kernels import layer_products
from hydra_jax.benchmarks.timing import timed
from hydra_jax.config import AblationConfig, SweepConfig
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.batching import evenly, round_up
from hydra_jax.engine.cluster import Cluster
from hydra_jax.engine.memory import BatchSizer, free_bytes
from hydra_jax.models.transformer import Params
from hydra_jax.sweep.bank import Bank
from hydra_jax.sweep.chunks import Batch, fill
from hydra_jax.sweep.clean import CleanPass
from hydra_jax.sweep.plan import Item, Plan
from hydra_jax.sweep.roofline import intervention_flops
from hydra_jax.sweep.sources import Sources
from hydra_jax.text.prompts import Prompt
from hydra_jax.weights.model import Model


@dataclasses.dataclass(frozen=True)
class Swept:
    """A sweep's figures; seconds are of programs that are compiled already.

    Attributes:
      prompts: how many there are.
      length: T, tokens of each prompt.
      interventions: how many there are in all.
      at_once: prompts in a batch.
      clean_seconds: time of the clean pass.
      seconds: time of all ablations, as a sweep makes them.
      kernel_seconds: time of the kernel in them, measured by itself with its replacements at hand.
      prefill_seconds: time of the clean runs before each batch.
      sources_seconds: time of bringing replacements to the device, which the kernel may hide.
      flops: operations of the kernel's matrix products, per second of kernel_seconds.
      gemm_flops: rate of bare products of the same shapes, on one device by itself, times the number of devices.
    """

    prompts: int
    length: int
    interventions: int
    at_once: int
    clean_seconds: float
    seconds: float
    kernel_seconds: float
    prefill_seconds: float
    sources_seconds: float
    flops: float
    gemm_flops: float

    def __str__(self) -> str:
        rest = self.seconds - self.kernel_seconds - self.prefill_seconds
        parts = {
            "the kernel": self.kernel_seconds,
            "clean runs before each batch": self.prefill_seconds,
            "all else (replacements, reading results)": rest,
        }
        return "\n".join(
            [
                f"{self.interventions:,} interventions in {self.prompts:,} prompts of {self.length} tokens,"
                f" {self.at_once:,} at once",
                f"clean pass {self.clean_seconds:.2f} s, ablations {self.seconds:.2f} s:",
                *(f"  {seconds:8.2f} s  {seconds / self.seconds:4.0%}  {part}" for part, seconds in parts.items()),
                f"  {self.sources_seconds:8.2f} s        replacements, brought by themselves",
                f"the kernel: {self.flops / 1e12:,.3g} TFLOP/s, {self.flops / self.gemm_flops:.0%} of bare products"
                f" ({self.gemm_flops / 1e12:,.3g}); {self.interventions / self.kernel_seconds:,.0f} interventions/s",
            ]
        )


def measure(params: Params, prompts: int, length: int, ablation: AblationConfig, rows: int, seed: int = 0) -> Swept:
    """Sweep twice, and measure the second time.

    Args:
      params: the model.
      prompts: how many prompts of random tokens to sweep.
      length: T, tokens of each prompt.
      ablation: the ablations.
      rows: edits at once on a device; 0 for its default.
      seed: the seed of the tokens.
    """
    mesh, c = meshes.mesh_of(params), params.config
    model = Model("made up", params, Tokenizer(models.WordLevel({"?": 0}, unk_token="?")), "")
    tokens = np.random.default_rng(seed).integers(0, c.vocab_size, (prompts, length))
    items = [Item(Prompt(f"{n:07}", "?"), tuple(row), None) for n, row in enumerate(tokens.tolist())]
    sizer = BatchSizer(c, mesh, ablation.draws, ablation.edges, rows, free_bytes(mesh.local_devices[0]))

    def clean_pass() -> Bank:
        clean = CleanPass(model, ablation, sizer, Bank(c.dtype), Cluster(0, 1))
        with clean.bar(prompts) as bar:
            clean.run(items, bar)
        return clean.bank

    clean_pass()
    clean_seconds, bank = timed(clean_pass)
    # Random weights lose precision: what is timed does not stop for it.
    config = SweepConfig(ablation=ablation, seed=seed, identity_tolerance=0.999, non_finite=1.0)
    plan = Plan.build(model, bank, sizer, config, items)
    size = min(sizer.prompts(length), sizer.wanted)
    chunks = evenly(prompts, size)

    def sweep() -> None:
        fill(plan, chunks, lambda chunk, arrays: None, progress=False)

    sweep()
    seconds, _ = timed(sweep)
    sources = Sources(plan)
    parts: dict[str, float] = dict.fromkeys(("prefill", "sources", "kernel"), 0.0)
    for chunk in chunks:
        spent, batch = timed(
            functools.partial(Batch, plan, chunk, round_up(chunks[0].stop, sizer.least), sources),
            lambda made: made.clean,
        )
        parts["prefill"] += spent
        for unit, component in enumerate(plan.components):
            spent, new = timed(functools.partial(sources, batch.prompts, unit))
            parts["sources"] += spent
            parts["kernel"] += timed(functools.partial(batch.ablate, component, new))[0]
    draws = ablation.draws
    flops = prompts * draws * sum(intervention_flops(c, component, length) for component in plan.components)
    return Swept(
        prompts=prompts,
        length=length,
        interventions=prompts * draws * len(plan.components),
        at_once=chunks[0].stop,
        clean_seconds=clean_seconds,
        seconds=seconds,
        kernel_seconds=parts["kernel"],
        prefill_seconds=parts["prefill"],
        sources_seconds=parts["sources"],
        flops=flops / parts["kernel"],
        gemm_flops=mesh.size * _gemm_flops(params, chunks[0].stop * draws // sizer.least, parts["kernel"] / 4),
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
