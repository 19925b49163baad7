"""Ablations of a plan's prompts: chunk by chunk into labelled arrays, each chunk in as few walks as memory allows."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import xarray as xr
from tqdm import tqdm

from hydra_jax.engine.batching import evenly
from hydra_jax.errors import UserError
from hydra_jax.store import variables
from hydra_jax.sweep.ablations import ablate
from hydra_jax.sweep.cascades import cascade
from hydra_jax.sweep.plan import Plan
from hydra_jax.sweep.readout import NONE
from hydra_jax.sweep.sources import Sources
from hydra_jax.text.padding import padded_length

LONG_WAIT = 0.2
"""The share of a chunk's time above which waiting for its layers is said."""

Write = Callable[[slice, dict[str, np.ndarray]], None]
"""Stores a chunk's variables."""


def ablate_chunk(
    plan: Plan, chunk: slice, sources: Sources, size: int, progress: Callable[[float], object] = lambda done: None
) -> dict[str, np.ndarray]:
    """Make every ablation in one chunk's prompts; returns the variables of a result store.

    Args:
      plan: the sweep.
      chunk: which of its prompts.
      sources: of replacements.
      size: prompts at once, a multiple of the data axis; fewer are filled up.
      progress: told of how many more interventions are done.

    Raises:
      UserError: if the identity of `core.effects` fails in a prompt.
    """
    sizes = variable_sizes(plan, chunk.stop - chunk.start)
    columns = variables.empty(sizes, plan.options)
    for part in evenly(sizes["prompt"], size):
        prompts = slice(chunk.start + part.start, chunk.start + part.stop)
        found = ablate(plan, prompts, size, sources, progress) if plan.ablations else {}
        if plan.ablation.cascade:
            found = cascade(plan, prompts, size, sources, progress) | found
        for name, values in found.items():
            columns[name][part] = values
    _leave_out(columns, plan.ablation.draws)
    return columns


def _leave_out(columns: dict[str, np.ndarray], draws: int) -> None:
    """Count every ablation in a prompt as lost if its clean run is not finite."""
    clean = [columns[name].reshape(len(columns[name]), -1) for name in variables.CLEAN]
    broken = ~np.isfinite(np.concatenate(clean, axis=1)).all(axis=1)
    for name in columns.keys() - set(variables.CLEAN) - {variables.NON_FINITE}:
        if columns[name].dtype.kind == "f":
            columns[name][broken] = np.nan
    columns[variables.NON_FINITE][broken] = draws


def fill(
    plan: Plan,
    chunks: Sequence[slice],
    write: Write,
    progress: bool,
    finished: Sequence[slice] = (),
    lost: int = 0,
) -> None:
    """Compute chunks of prompts, handing each one's variables to `write`.

    Chunks are written by a thread while the next is computed, one at a time. Where a device's memory is
    exhausted, a chunk begins anew with fewer prompts at once.

    Args:
      plan: the sweep.
      chunks: those of its prompts that are left to this worker.
      write: stores a chunk.
      progress: whether to show a bar.
      finished: chunks that are computed already.
      lost: interventions in them whose values are not finite.

    Raises:
      UserError: as `ablate_chunk`, and if too many values are not finite.
    """
    of_prompt = (len(plan.ablations) + plan.ablation.cascade) * plan.ablation.draws
    every = of_prompt * sum(chunk.stop - chunk.start for chunk in (*chunks, *finished))
    sources = Sources(plan)
    bar = tqdm(
        total=of_prompt * sum(chunk.stop - chunk.start for chunk in chunks),
        desc=f"{plan.ablation.kind} ablation",
        unit=" interventions",
        unit_scale=True,
        smoothing=0,
        disable=not progress,
    )
    say = functools.partial(bar.write, file=sys.stderr)
    reading = plan.model.streamed
    largest = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    with bar, ThreadPoolExecutor(1) as writer:
        writing: Future | None = None
        said = False
        for chunk in chunks:
            before = bar.n

            def attempt(size: int, chunk: slice = chunk, before: float = before) -> dict[str, np.ndarray]:
                bar.update(before - bar.n)
                return ablate_chunk(plan, chunk, sources, size, bar.update)

            longest = padded_length(len(plan.items[chunk.stop - 1].tokens), plan.model.config.context)
            # The same for all chunks, the last and smaller one too, so that they share a compilation.
            parts = evenly(largest, plan.sizer.prompts(longest))
            size = plan.sizer.fill_up(parts[0].stop)
            began, waited = time.perf_counter(), reading.waited if reading else 0.0
            columns = plan.sizer.run(attempt, size, say)
            if reading and not said:
                said = _report_waiting(reading.waited - waited, time.perf_counter() - began, say)
            lost += _report_lost(plan, chunk, columns[variables.NON_FINITE], say)
            if lost > plan.non_finite * every:
                raise UserError(
                    f"{lost:,} of {every:,} interventions are no numbers, more than"
                    f" non_finite={plan.non_finite:g} allows; sweep in float32, or leave out what overflows"
                )
            if writing:
                writing.result()
            writing = writer.submit(write, chunk, columns)
        if writing:
            writing.result()


def _report_waiting(waited: float, spent: float, say: Callable[[str], None]) -> bool:
    """Say a line if a chunk waited long for its layers to be read; returns whether it did."""
    long = waited > LONG_WAIT * spent
    if long:
        say(
            f"reading layers is not hidden by the arithmetic: {waited:,.1f} of {spent:,.1f} s were spent waiting for"
            " them; more prompts at once would hide it: raise --config.memory, or sweep more prompts"
        )
    return long


def _report_lost(plan: Plan, chunk: slice, counts: np.ndarray, say: Callable[[str], None]) -> int:
    """Say a line on a chunk's interventions that are no numbers; returns how many, of `counts` [prompts, A]."""
    prompts, ablated = np.nonzero(counts)
    if not len(prompts):
        return 0
    first = plan.items[chunk.start + prompts[0]].prompt.name
    others = len(prompts) - 1
    say(
        f"not finite, recorded and left out of averages: prompt {first}, {plan.ablations[ablated[0]]}"
        + (f" and {others:,} more" if others else "")
    )
    return int(counts.sum())


def variable_sizes(plan: Plan, prompts: int) -> dict[Hashable, int]:
    """Return the sizes, by dimension, of the variables of some prompts."""
    c = plan.model.config
    return {
        "prompt": prompts,
        "ablated": len(plan.ablations),
        "replacement": plan.ablation.draws,
        "component": c.components,
        "attn_layer": c.layers,
        "head": c.heads,
        "cut": plan.ablation.cascade,
    }


def frame(plan: Plan) -> xr.Dataset:
    """Return the result's coordinates and sources."""
    decode, items, foils = plan.model.tokenizer.decode, plan.items, plan.tokens[:, 1]
    prompts: dict[str, Any] = {
        "prompt_id": plan.ids,
        "text": [item.prompt.text for item in items],
        "relation": [item.prompt.relation for item in items],
        "answer_text": [item.prompt.answer for item in items],
        "target_id": plan.targets,
        "target_text": [decode([target]) for target in plan.targets.tolist()],
        "foil_id": foils,
        "foil_text": ["" if foil == NONE else decode([foil]) for foil in foils.tolist()],
        "length": [len(item.tokens) for item in items],
        "position": [item.position for item in items],
        "token_text": [decode([item.tokens[-1]]) for item in items],
        "text_id": [item.text_id for item in items],
        "source_text": [item.prompt.source if plan.ablation.paired else "" for item in items],
    }
    # An index in the pool is one in the store only where the two are the same prompts.
    source = np.full_like(plan.sources, -1) if plan.apart else plan.sources
    return variables.frame(prompts, plan.ablations, plan.model.config.layers, source)


def in_memory(plan: Plan) -> xr.Dataset:
    """Return the result with arrays for what is to be computed."""
    return variables.in_memory(frame(plan), variable_sizes(plan, len(plan.items)), plan.options)
