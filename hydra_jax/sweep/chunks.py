"""Ablations of a plan's prompts: chunk by chunk into labelled arrays, in batches that go to the devices at once."""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from tqdm import tqdm

from hydra_jax.core.edits import SITES, Component, WriteStatistics, all_components
from hydra_jax.core.effects import Effects
from hydra_jax.core.prefill import Clean
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.batched import (
    AblationSummary,
    CleanSummary,
    ablate_program,
    ablation_summary_program,
    clean_summary_program,
    prefill_program,
)
from hydra_jax.engine.batching import evenly, fill_up, round_up
from hydra_jax.errors import UserError
from hydra_jax.store import variables
from hydra_jax.sweep.plan import Plan, batch_of
from hydra_jax.sweep.sources import Sources
from hydra_jax.text.padding import padded_length

AHEAD = 2
"""Components whose work is handed to the devices before the first one's results are waited for."""

Write = Callable[[slice, dict[str, np.ndarray]], None]
"""Stores a chunk's variables."""


class Batch:
    """A batch of prompts on the devices: `clean` holds their clean runs, `prompts` their indices in the plan.

    Args:
      plan: the sweep.
      part: which of its prompts.
      size: how many they are filled up to, so that all of a sweep's batches share a compilation.
      sources: of replacements.
    """

    def __init__(self, plan: Plan, part: slice, size: int, sources: Sources):
        self.plan, self.items, self._sources = plan, plan.items[part], sources
        self.params = plan.model.params
        mesh = meshes.mesh_of(self.params)
        over = functools.partial(meshes.put, mesh, spec=meshes.Spec(meshes.DATA))
        self.prompts = np.array(fill_up(range(part.start, part.stop), size))
        tokens, lengths = batch_of(self.items, size, plan.model.config.context)
        targets = plan.targets[self.prompts].astype(np.int32)
        self.clean: Clean = prefill_program(self.params)(self.params, over(tokens), over(lengths), over(targets))
        self._keys = over(plan.keys[self.prompts])

    def clean_summary(self) -> CleanSummary:
        """Return its clean runs as the host reads them."""
        return self._host(clean_summary_program(self.params)(self.params, self.clean))

    def ablate(self, component: Component, sources: jax.Array | None = None) -> tuple[Effects, jax.Array | None]:
        """Begin one component's ablations; effects and direct edges are on the devices, and perhaps not yet there.

        Args:
          component: which.
          sources: its replacements' values, where they are at hand.
        """
        plan = self.plan
        unit = plan.components.index(component)
        statistics = WriteStatistics(*(jnp.asarray(array[unit]) for array in plan.statistics))
        values = self._sources(self.prompts, unit) if sources is None else sources
        run = ablate_program(self.params, plan.ablation.kind, plan.ablation.edges)
        return run(self.params, self.clean, component.arrays(), values, statistics, self._keys)

    def summaries(self, components: Sequence[Component]) -> Iterator[AblationSummary]:
        """Yield each component's ablations, in order, with the devices kept busy meanwhile.

        Raises:
          UserError: if the identity of `core.effects` fails in a prompt.
        """
        summarise = ablation_summary_program(self.params)
        begun: deque[tuple[Component, AblationSummary]] = deque()
        for component in components:
            begun.append((component, summarise(*self.ablate(component))))
            if len(begun) > AHEAD:
                yield self._finish(*begun.popleft())
        while begun:
            yield self._finish(*begun.popleft())

    def _finish(self, component: Component, begun: AblationSummary) -> AblationSummary:
        """Wait for one component's ablations, and check the identity."""
        summary: AblationSummary = self._host(begun)
        wrong = np.flatnonzero(summary.residual > self.plan.tolerance)
        if wrong.size:
            raise UserError(
                f"prompt {self.items[wrong[0]].prompt.name}, {component}: total effect is not direct effect less"
                f" compensation, by {summary.residual[wrong[0]]:.2g} logits (more than {self.plan.tolerance:g}); the"
                " activations lose precision: use float32 and precision=highest, or raise identity_tolerance"
            )
        return summary

    def _host(self, tree: Any) -> Any:
        return jax.tree.map(lambda array: array[: len(self.items)], jax.device_get(tree))


def ablate_chunk(
    plan: Plan, chunk: slice, sources: Sources, size: int, progress: Callable[[int], object] = lambda done: None
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
    components, draws, c = plan.components, plan.ablation.draws, plan.model.config
    # Early layers cost more than late ones: first and last in turn keep the bar's ETA true.
    turns = sorted(range(len(components)), key=lambda i: (min(i, len(components) - 1 - i), i))
    sizes: dict[Hashable, int] = {
        "prompt": chunk.stop - chunk.start,
        "ablated": len(components),
        "replacement": draws,
        "component": c.components,
    }
    columns = variables.empty(sizes, plan.ablation.edges)
    of_ablations = columns.keys() - set(variables.CLEAN)
    units = [component.unit(c.heads) for component in components]
    for part in evenly(sizes["prompt"], size):
        batch = Batch(plan, slice(chunk.start + part.start, chunk.start + part.stop), size, sources)
        clean = batch.clean_summary()
        for name in ("clean_logit", "clean_probability", "final_scale", "delta_unembed"):
            columns[name][part] = getattr(clean, name)
        own = clean.head_unembed if plan.ablation.by_head else clean.delta_unembed
        columns["ablated_delta_unembed"][part] = own[:, units]
        summaries = batch.summaries([components[turn] for turn in turns])
        for turn, summary in zip(turns, summaries, strict=True):
            for name in of_ablations:
                columns[name][part, turn] = getattr(summary, name)
            progress((part.stop - part.start) * draws)
    _leave_out(columns, draws)
    return columns


def _leave_out(columns: dict[str, np.ndarray], draws: int) -> None:
    """Count every ablation in a prompt as lost if its clean run is not finite."""
    clean = [columns[name].reshape(len(columns[name]), -1) for name in variables.CLEAN]
    broken = ~np.isfinite(np.concatenate(clean, axis=1)).all(axis=1)
    for name in columns.keys() - set(variables.CLEAN) - {variables.NON_FINITE}:
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
    of_prompt = len(plan.components) * plan.ablation.draws
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
    largest = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    with bar, ThreadPoolExecutor(1) as writer:
        writing: Future | None = None
        for chunk in chunks:
            before = bar.n

            def attempt(size: int, chunk: slice = chunk, before: float = before) -> dict[str, np.ndarray]:
                bar.update(before - bar.n)
                return ablate_chunk(plan, chunk, sources, size, bar.update)

            longest = padded_length(len(plan.items[chunk.stop - 1].tokens), plan.model.config.context)
            # The same for all chunks, the last and smaller one too, so that they share a compilation.
            parts = evenly(largest, plan.sizer.prompts(longest))
            size = round_up(parts[0].stop, plan.sizer.least)
            columns = plan.sizer.run(attempt, size, say)
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


def _report_lost(plan: Plan, chunk: slice, counts: np.ndarray, say: Callable[[str], None]) -> int:
    """Say a line on a chunk's interventions that are no numbers; returns how many, of `counts` [prompts, A]."""
    prompts, ablated = np.nonzero(counts)
    if not len(prompts):
        return 0
    first = plan.items[chunk.start + prompts[0]].prompt.name
    others = len(prompts) - 1
    say(
        f"not finite, recorded and left out of averages: prompt {first}, {plan.components[ablated[0]]}"
        + (f" and {others:,} more" if others else "")
    )
    return int(counts.sum())


def frame(plan: Plan) -> xr.Dataset:
    """Return the result's coordinates and sources."""
    prompts: dict[str, Any] = {
        "prompt_id": plan.ids,
        "text": [item.prompt.text for item in plan.items],
        "relation": [item.prompt.relation for item in plan.items],
        "answer_text": [item.prompt.answer for item in plan.items],
        "target_id": plan.targets,
        "target_text": [plan.model.tokenizer.decode([target]) for target in plan.targets.tolist()],
        "length": [len(item.tokens) for item in plan.items],
    }
    # An index in the pool is one in the store only where the two are the same prompts.
    source = plan.sources if list(plan.pool) == plan.ids else np.full_like(plan.sources, -1)
    return variables.frame(prompts, plan.components, plan.model.config.layers, source)


def ablate_one(plan: Plan, index: int, component: Component) -> xr.Dataset:
    """Ablate one component in one prompt; returns everything about it, a dataset of (replacement, component)."""
    batch = Batch(plan, slice(index, index + 1), plan.sizer.least, Sources(plan, resident=False))
    clean: CleanSummary = jax.tree.map(lambda array: array[0], batch.clean_summary())
    effects: Effects = jax.tree.map(lambda array: array[0], jax.device_get(batch.ablate(component)[0]))
    compensation = effects.compensation.reshape(len(effects.compensation), -1)
    # The ablated component's own change is its direct effect: it is not among the compensations.
    ablated = clean.delta_unembed + compensation
    ablated[:, component.index] -= effects.direct_effect
    prompt = plan.items[index].prompt
    return xr.Dataset(
        {
            "delta_unembed": ("component", clean.delta_unembed, {"long_name": "contribution, clean run"}),
            "ablated_unembed": (("replacement", "component"), ablated, {"long_name": "contribution, ablated run"}),
            "compensation": (("replacement", "component"), compensation),
            **{name: ("replacement", getattr(effects, name)) for name in variables.EFFECTS},
        },
        variables.labels("component", all_components(plan.model.config.layers)),
        {
            "prompt_id": prompt.id,
            "text": prompt.text,
            "target_text": plan.model.tokenizer.decode([int(plan.targets[index])]),
            "clean_logit": float(clean.clean_logit),
            "clean_probability": float(clean.clean_probability),
            "ablated_layer": component.layer,
            "ablated_site": SITES[component.site],
            "ablated_head": component.head,
            "kind": str(plan.ablation.kind),
            "units": variables.LOGITS,
        },
    )
