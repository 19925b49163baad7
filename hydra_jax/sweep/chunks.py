"""Ablations of a plan's prompts: in batches on the devices, chunk by chunk into labelled arrays."""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from tqdm import tqdm

from hydra_jax.core.edits import SITES, WHOLE, Component, WriteStatistics, all_components
from hydra_jax.core.effects import Effects
from hydra_jax.core.prefill import Clean
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.batched import AblationSummary, CleanSummary, ablate_batch, prefill_batch, read_batch, summarise
from hydra_jax.engine.batching import evenly, fill_up, round_up
from hydra_jax.errors import UserError
from hydra_jax.store import effects as store
from hydra_jax.sweep.plan import Item, Plan, batch_of, places
from hydra_jax.sweep.sources import Sources
from hydra_jax.text.padding import padded_length

AHEAD = 2
"""Components whose work is handed to the devices before the first one's results are waited for."""

Write = Callable[[slice, dict[str, np.ndarray]], None]
"""Stores a chunk's variables."""


class Batch:
    """As many prompts as go at once, on the devices: their clean runs are `clean`.

    Args:
      plan: the sweep.
      part: which of its prompts.
      size: what they are filled up to, so that all of a sweep's pieces share a compilation.
      sources: of replacements.
    """

    def __init__(self, plan: Plan, part: slice, size: int, sources: Sources):
        self.plan, self.items, self._sources = plan, plan.items[part], sources
        mesh = meshes.of(plan.model.params)
        over = functools.partial(meshes.put, mesh, spec=meshes.Spec(meshes.DATA))
        self.places = np.array(fill_up(range(part.start, part.stop), size))
        tokens, lengths = batch_of(self.items, size, plan.model.config.context)
        self.clean: Clean = prefill_batch(
            plan.model.params, over(tokens), over(lengths), over(plan.targets[self.places].astype(np.int32))
        )
        self._keys = meshes.put(mesh, plan.keys[self.places], meshes.Spec(meshes.DATA))

    def read(self) -> CleanSummary:
        """Its clean runs."""
        return self._host(read_batch(self.plan.model.params, self.clean))

    def ablated(self, component: Component, sources: jax.Array | None = None) -> tuple[Effects, jax.Array | None]:
        """The effects of one component's ablations, still on the devices, and perhaps not yet there.

        Args:
          component: which.
          sources: its replacements' values, where they are at hand.
        """
        plan = self.plan
        of = plan.components.index(component)
        statistics = WriteStatistics(*(jnp.asarray(each[of]) for each in plan.statistics))
        head = None if component.head == WHOLE else jnp.int32(component.head)
        return ablate_batch(
            plan.model.params,
            self.clean,
            (jnp.int32(component.layer), jnp.int32(component.site), head),
            self._sources(self.places, of) if sources is None else sources,
            statistics,
            self._keys,
            kind=plan.ablation.kind,
            edges=plan.ablation.edges,
        )

    def summary(self, component: Component) -> Callable[[], AblationSummary]:
        """Begin one component's ablations; what is returned waits for them.

        Raises:
          UserError: there, if the identity of `effects` fails in a prompt.
        """
        begun = summarise(self.plan.model.params, *self.ablated(component))

        def end() -> AblationSummary:
            found = self._host(begun)
            self._check_identity(component, found.residual)
            return found

        return end

    def _host(self, tree: Any) -> Any:
        return jax.tree.map(lambda array: array[: len(self.items)], jax.device_get(tree))

    def _check_identity(self, component: Component, worst: np.ndarray) -> None:
        wrong = np.flatnonzero(worst > self.plan.tolerance)
        if wrong.size:
            raise UserError(
                f"prompt {self.items[wrong[0]].prompt.name}, {component}: total effect is not direct effect less"
                f" compensation, by {worst[wrong[0]]:.2g} logits (more than {self.plan.tolerance:g}); the activations"
                " lose precision: use float32 and precision=highest, or raise identity_tolerance"
            )


def _ahead(begun: Iterable[Callable[[], AblationSummary]]) -> Iterator[AblationSummary]:
    """The ends of what was begun, in order, the devices kept busy meanwhile."""
    waiting: deque[Callable[[], AblationSummary]] = deque()
    for end in begun:
        waiting.append(end)
        if len(waiting) > AHEAD:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def ablate_chunk(
    plan: Plan, chunk: slice, sources: Sources, size: int, progress: Callable[[int], object] = lambda done: None
) -> dict[str, np.ndarray]:
    """Every ablation in one chunk's prompts, as a result store has them.

    Args:
      plan: the sweep.
      chunk: which of its prompts.
      sources: of replacements.
      size: prompts at once, a multiple of the data axis; fewer are filled up.
      progress: told of how many more interventions are done.

    Raises:
      UserError: if the identity of `effects` fails in a prompt.
    """
    count, draws, c = chunk.stop - chunk.start, plan.ablation.draws, plan.model.config
    parts = evenly(count, size)
    # Early layers cost more than late ones: first and last in turn keep the bar's ETA true.
    turns = sorted(range(len(plan.components)), key=lambda i: (min(i, len(plan.components) - 1 - i), i))
    sizes: dict[Hashable, int] = {
        "prompt": count,
        "ablated": len(turns),
        "replacement": draws,
        "component": c.components,
    }
    columns = store.empty(sizes, plan.ablation.edges)
    own_places = places(plan.components, c.heads)
    for part in parts:
        here = slice(chunk.start + part.start, chunk.start + part.stop)
        batch = Batch(plan, here, size, sources)
        read = batch.read()
        own = read.head_unembed if plan.ablation.by_head else read.delta_unembed
        for name in ("clean_logit", "clean_probability", "final_scale", "delta_unembed"):
            columns[name][part] = getattr(read, name)
        columns["ablated_delta_unembed"][part] = own[:, own_places]
        begun = (batch.summary(plan.components[turn]) for turn in turns)
        for turn, found in zip(turns, _ahead(begun), strict=True):
            for name in columns.keys() - store.CLEAN.keys():
                columns[name][part, turn] = getattr(found, name)
            progress((part.stop - part.start) * draws)
    _leave_out(columns, draws)
    return columns


def _leave_out(columns: dict[str, np.ndarray], draws: int) -> None:
    """Count everything of a prompt as lost whose clean run is not finite."""
    clean = [columns[name].reshape(len(columns[name]), -1) for name in store.CLEAN]
    broken = ~np.isfinite(np.concatenate(clean, axis=1)).all(axis=1)
    for name in columns.keys() - store.CLEAN.keys() - {store.NON_FINITE}:
        columns[name][broken] = np.nan
    columns[store.NON_FINITE][broken] = draws


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
      chunks: which of its prompts are left to this worker.
      write: stores a chunk.
      progress: whether to show a bar.
      finished: chunks that are computed already.
      lost: interventions in them whose values are not finite.

    Raises:
      UserError: as `ablate_chunk`, and if too many values are not finite.
    """
    each = len(plan.components) * plan.ablation.draws
    every = each * sum(chunk.stop - chunk.start for chunk in (*chunks, *finished))
    sources = Sources(plan)
    bar = tqdm(
        total=each * sum(chunk.stop - chunk.start for chunk in chunks),
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
            lost += _lost(plan, chunk, columns[store.NON_FINITE], say)
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


def _lost(plan: Plan, chunk: slice, counts: np.ndarray, say: Callable[[str], None]) -> int:
    """How many of a chunk's interventions are no numbers, of which a line is said; `counts` [prompts, A]."""
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
    """The result's coordinates and sources."""
    prompts: dict[str, Any] = {
        "prompt_id": plan.ids,
        "text": [item.prompt.text for item in plan.items],
        "relation": [item.prompt.relation for item in plan.items],
        "answer_text": [item.prompt.answer for item in plan.items],
        "target_id": plan.targets,
        "target_text": [plan.model.tokenizer.decode([target]) for target in plan.targets.tolist()],
        "length": [len(item.tokens) for item in plan.items],
    }
    # Places in the bank are places in the store only where the two are the same prompts.
    source = plan.sources if list(plan.bank_ids) == plan.ids else np.full_like(plan.sources, -1)
    return store.frame(prompts, plan.components, plan.model.config.layers, source)


def ablate_one(plan: Plan, place: int, component: Component) -> xr.Dataset:
    """Everything about one ablation in one prompt: a dataset of (replacement, component)."""
    batch = Batch(plan, slice(place, place + 1), plan.sizer.least, Sources(plan, resident=False))
    read: CleanSummary = jax.tree.map(lambda array: array[0], batch.read())
    found: Effects = jax.tree.map(lambda array: array[0], jax.device_get(batch.ablated(component)[0]))
    compensation = found.compensation.reshape(len(found.compensation), -1)
    # The ablated component's own change is its direct effect: it is not among the compensations.
    ablated = read.delta_unembed + compensation
    ablated[:, component.place] -= found.direct_effect
    item: Item = plan.items[place]
    return xr.Dataset(
        {
            "delta_unembed": ("component", read.delta_unembed, {"long_name": "contribution, clean run"}),
            "ablated_unembed": (("replacement", "component"), ablated, {"long_name": "contribution, ablated run"}),
            "compensation": (("replacement", "component"), compensation),
            **{name: ("replacement", getattr(found, name)) for name in store.EFFECTS},
        },
        store.labels("component", all_components(plan.model.config.layers)),
        {
            "prompt_id": item.prompt.id,
            "text": item.prompt.text,
            "target_text": plan.model.tokenizer.decode([int(plan.targets[place])]),
            "clean_logit": float(read.clean_logit),
            "clean_probability": float(read.clean_probability),
            "ablated_layer": component.layer,
            "ablated_site": SITES[component.site],
            "ablated_head": component.head,
            "kind": plan.ablation.kind,
            "units": store.LOGITS,
        },
    )
