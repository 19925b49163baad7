"""A whole sweep by the code that sweeps, of made-up prompts, and where its time goes."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer, models

from hydra_jax.benchmarks.kernels import layer_products
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
      prompts: how many.
      length: T, tokens of each.
      interventions: in all.
      at_once: prompts that went at once.
      clean_seconds: of the clean pass.
      seconds: of all ablations, as a sweep makes them.
      kernel_seconds: of the kernel in them, by itself, replacements at hand.
      prefill_seconds: of the clean runs before each batch.
      sources_seconds: of bringing replacements to the device, which the kernel may hide.
      flops: of the kernel's matrix products, a second of kernel_seconds.
      gemm_flops: of bare products of the same shapes, on each device by itself, times devices.
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
                *(f"  {seconds:8.2f} s  {seconds / self.seconds:4.0%}  {what}" for what, seconds in parts.items()),
                f"  {self.sources_seconds:8.2f} s        replacements, brought by themselves",
                f"the kernel: {self.flops / 1e12:,.3g} TFLOP/s, {self.flops / self.gemm_flops:.0%} of bare products"
                f" ({self.gemm_flops / 1e12:,.3g}); {self.interventions / self.kernel_seconds:,.0f} interventions/s",
            ]
        )


def measure(params: Params, prompts: int, length: int, ablation: AblationConfig, rows: int, seed: int = 0) -> Swept:
    """Sweep twice, and measure the second time.

    Args:
      params: the model.
      prompts: how many, of random tokens.
      length: T, tokens of each.
      ablation: what is ablated.
      rows: edits at once on a device; 0 for its default.
      seed: of the tokens.
    """
    mesh, c = meshes.of(params), params.config
    model = Model("made up", params, Tokenizer(models.WordLevel({"?": 0}, unk_token="?")), "")
    tokens = np.random.default_rng(seed).integers(0, c.vocab_size, (prompts, length))
    items = [Item(Prompt(f"{n:07}", "?"), tuple(row), None) for n, row in enumerate(tokens.tolist())]
    sizer = BatchSizer(c, mesh, ablation.draws, ablation.edges, rows, free_bytes(mesh.local_devices[0]))

    def passed() -> Bank:
        clean = CleanPass(model, ablation, sizer, Bank(c.dtype), Cluster(0, 1))
        with clean.bar(prompts) as bar:
            clean.run(items, bar)
        return clean.bank

    passed()
    clean_seconds, bank = _timed(passed)
    # Random weights lose precision: what is timed does not stop for it.
    config = SweepConfig(ablation=ablation, seed=seed, identity_tolerance=0.999, non_finite=1.0)
    plan = Plan.build(model, bank, sizer, config, items)
    size = min(sizer.prompts(length), sizer.wanted)
    chunks = evenly(prompts, size)

    def sweep() -> None:
        fill(plan, chunks, lambda chunk, arrays: None, progress=False)

    sweep()
    seconds, _ = _timed(sweep)
    sources = Sources(plan)
    parts: dict[str, float] = dict.fromkeys(("prefill", "sources", "kernel"), 0.0)
    for chunk in chunks:
        spent, batch = _timed(
            functools.partial(Batch, plan, chunk, round_up(chunks[0].stop, sizer.least), sources),
            lambda made: made.clean,
        )
        parts["prefill"] += spent
        for of, component in enumerate(plan.components):
            spent, new = _timed(functools.partial(sources, batch.prompts, of))
            parts["sources"] += spent
            parts["kernel"] += _timed(functools.partial(batch.ablate, component, new))[0]
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
    """Of bare products on one device, for at least so many seconds."""
    run, operations = layer_products(params.config, max(1, rows))
    jax.block_until_ready(run())
    spent, turns = 0.0, 0
    while spent < least or turns < 3:
        once, _ = _timed(run)
        spent, turns = spent + once, turns + 1
    return operations * turns / spent


def _timed(call: Callable[[], Any], arrays: Callable[[Any], Any] = lambda found: found) -> tuple[float, Any]:
    """Seconds until a call's `arrays` are there, and what it returned."""
    start = time.perf_counter()
    found = call()
    jax.block_until_ready(arrays(found))
    return time.perf_counter() - start, found
