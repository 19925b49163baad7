"""Any programs over any prompts, in memory: what each row changes, read after any tokens of each text."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import xarray as xr
from tqdm import tqdm

from hydra_jax.config import HEADS, LAYERS, AblationConfig, SweepConfig
from hydra_jax.core.edits import ATTN, Component, Kind, all_components
from hydra_jax.core.effects import Effects
from hydra_jax.core.prefill import MOST_LIKELY
from hydra_jax.core.programs import Program, Word, first_clamp, together
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.batching import evenly, fill_up
from hydra_jax.engine.cluster import Cluster
from hydra_jax.engine.memory import Asked, BatchSizer, left
from hydra_jax.engine.rows import Rows
from hydra_jax.engine.walk import Texts, clean_runs
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import Contrast
from hydra_jax.store import variables
from hydra_jax.sweep.ablations import Walked
from hydra_jax.sweep.bank import Bank
from hydra_jax.sweep.clean import CleanPass
from hydra_jax.sweep.items import Item, batch_of, by_length
from hydra_jax.sweep.plan import Plan
from hydra_jax.sweep.sources import Sources
from hydra_jax.text.padding import padded_length
from hydra_jax.weights.model import Model


@dataclasses.dataclass(frozen=True)
class Question:
    """A question that every prompt is asked.

    Attributes:
      programs: by name.
      kind: of the values that clamps take.
      draws: R.
      tokens: [K] what is read: a linear combination of the centred logits of these tokens (MOST_LIKELY for the clean
        run's most likely next one).
      weights: [K].
      metrics: those of `config.METRICS` that are wanted.
      responders: LAYERS, or HEADS to record what each head changes, too.
      seed: of the draws.
      rows: in a block; 0 for the device's default.
    """

    programs: Mapping[str, Program]
    kind: Kind
    draws: int
    tokens: np.ndarray
    weights: np.ndarray
    metrics: Sequence[str] = ()
    responders: str = LAYERS
    seed: int = 0
    rows: int = 0

    def clamped(self, config: ModelConfig) -> list[Component]:
        """Return every component that a program clamps, in forward order."""
        found = set()
        for one in self.programs.values():
            found |= {c for c in all_components(config.layers) if one.writes[c.layer, c.site] == Word.CLAMP}
            found |= {Component(int(layer), ATTN, int(head)) for layer, head in np.argwhere(one.heads == Word.CLAMP)}
        return sorted(found)


def intervene(
    model: Model,
    question: Question,
    items: Sequence[Item],
    pool: Sequence[Item] | None,
    places: Sequence[Sequence[int]],
    progress: bool = False,
) -> xr.Dataset:
    """Run every program in every prompt, and return what it does.

    Args:
      model: the model.
      question: what is asked.
      items: the prompts.
      pool: other prompts that the values of clamps come from; None for the same.
      places: of each prompt, the tokens after which it is read.
      progress: whether to show bars.

    Raises:
      UserError: if something is asked for that cannot be.
    """
    c, mesh, streamed = model.config, meshes.mesh_of(model.params), model.layers.streamed
    readings = max(len(each) for each in places)
    by_head = question.responders == HEADS
    asked = Asked(len(question.programs), question.draws, readings, question.rows, streamed, by_head=by_head)
    sizer = BatchSizer(c, mesh, asked, left(model.memory, c, mesh, streamed))
    ablation, clamped = AblationConfig(question.kind, question.draws, edges=False), question.clamped(c)
    clean = CleanPass(model, question.kind, clamped, sizer, Bank(c.dtype), Cluster(0, 1), progress)
    if clamped and (question.kind.needs_sources or question.kind.needs_statistics):
        drawn_from = items if pool is None else pool
        with clean.bar(len(drawn_from)) as bar:
            clean.run(drawn_from, bar)
    config, nothing = SweepConfig(ablation=ablation, seed=question.seed), np.zeros((len(items), 2), int)
    plan = Plan.build(model, clean.bank, sizer, config, items, nothing, pool, clamped)
    order = sorted(range(len(items)), key=lambda index: by_length(items[index]))
    sources = Sources(plan)
    size = min(sizer.fill_up(len(items)), sizer.prompts(padded_length(len(items[order[-1]].tokens), c.context)))
    ran: list[tuple[int, xr.Dataset]] = []
    interventions = len(question.programs) * question.draws * sum(len(each) for each in places)
    with tqdm(total=interventions, desc="walk", unit=" rows", unit_scale=True, disable=not progress) as bar:
        for part in evenly(len(order), size):
            chosen = order[part]
            of_chunk = interventions * len(chosen) / len(order)

            def told(done: float, of_chunk: float = of_chunk) -> None:
                bar.update(done * of_chunk)

            filled = np.array(fill_up(chosen, sizer.fill_up(len(chosen))))
            found = _walked(plan, question, filled, places, sources, told)
            ran += [(index, found.isel(prompt=[number])) for number, index in enumerate(chosen)]
    dataset = xr.concat([one for _, one in sorted(ran, key=lambda pair: pair[0])], "prompt")
    return dataset.assign_coords(_coordinates(plan, question, places)).assign_attrs(
        {"kind": str(question.kind), "units": variables.LOGITS}
    )


def _walked(
    plan: Plan,
    question: Question,
    prompts: np.ndarray,
    places: Sequence[Sequence[int]],
    sources: Sources,
    progress: Any,
) -> xr.Dataset:
    """Walk some prompts, and return what is found in them; readings that a text does not have are NaN."""
    readings = max(len(each) for each in places)
    at = np.array([fill_up(list(places[index]), readings) for index in prompts], np.int32)
    there = np.array([[number < len(places[index]) for number in range(readings)] for index in prompts])
    tokens, weights = (np.tile(given, (*at.shape, 1)) for given in (question.tokens, question.weights))
    if (tokens == MOST_LIKELY).any():
        tokens = np.where(tokens == MOST_LIKELY, _most_likely(plan, prompts, at)[..., None], tokens)
    contrasts = Contrast(tokens.astype(np.int32), weights.astype(np.float32))
    names = sorted(question.programs, key=lambda name: first_clamp(question.programs[name]))
    longest = padded_length(max(len(plan.items[index].tokens) for index in prompts), plan.model.config.context)
    parts = evenly(len(names), plan.sizer.programs(longest, len(prompts)))
    read = functools.partial(_read, plan, question, prompts, sources, at, contrasts)
    found = [
        read(names[some], lambda done, some=some: progress(done * len(names[some]) / len(names))) for some in parts
    ]
    dataset = xr.concat(found, "program", data_vars="minimal", coords="minimal", compat="override")
    dataset = dataset.sel(program=list(question.programs))
    return dataset if there.all() else dataset.where(xr.DataArray(there, dims=("prompt", "reading")))


def _read(
    plan: Plan,
    question: Question,
    prompts: np.ndarray,
    sources: Sources,
    at: np.ndarray,
    contrasts: Contrast,
    names: Sequence[str],
    progress: Any,
) -> xr.Dataset:
    """Walk some prompts with some programs, and return what is found of all that is read."""
    programs = together([question.programs[name] for name in names])
    by_head = question.responders == HEADS
    walked = Walked(plan, prompts, programs, sources, progress, at, contrasts, by_head)
    effects: Effects = walked.each(Rows.effects)
    reading = walked.reading
    rows = ("prompt", "program", "reading", "replacement")
    found: dict[str, tuple[tuple[str, ...], Any]] = {
        name: (rows, getattr(effects, name)) for name in (*variables.EFFECTS, "residual")
    }
    change = effects.compensation
    found["change"] = ((*rows, "component"), change.reshape(*change.shape[:-2], -1))
    if by_head:
        found["head_change"] = ((*rows, "attn_layer", "head"), walked.each(Rows.head_changes))
    if question.metrics:
        at_once = plan.sizer.sizes(int(at.max()) + 1).logits
        metrics = walked.each(lambda rows, reading: rows.metrics(reading, at_once))
        found |= {
            variable: (rows, getattr(metrics, variable))
            for variable in (variables.METRICS[name][0] for name in question.metrics)
        }
    read = ("prompt", "reading")
    found |= {
        "clean_logit": (read, reading.centred_logit),
        "clean_probability": (read, reading.probability),
        "final_scale": (read, reading.final_scale),
        "top_id": (read, reading.top),
        "target_id": (read, reading.target),
        "delta_unembed": ((*read, "component"), walked.contributions),
    }
    return xr.Dataset(found, {"program": list(names)})


def _most_likely(plan: Plan, prompts: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Find the most likely next token after each of the tokens `at` [P, Q] of prompts."""
    model = plan.model
    tokens, _ = batch_of([plan.items[index] for index in prompts], len(prompts), model.config.context)
    sizes, parts = plan.sizer.sizes(tokens.shape[1]), np.split(np.arange(len(prompts)), plan.sizer.parts(len(prompts)))
    every = [Texts(model.params, tokens[some], at[some], sizes) for some in parts]
    collections.deque(clean_runs(model.layers, every), maxlen=0)
    tops = [texts.read(Contrast.target(np.zeros(texts.positions.shape, np.int32))).top for texts in every]
    return np.concatenate(jax.device_get(tops))


def _coordinates(plan: Plan, question: Question, places: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Label what is found."""
    readings = max(len(each) for each in places)
    decode = functools.partial(_token, plan)
    position = np.array([fill_up(list(each), readings) for each in places])
    for row, each in zip(position, places, strict=True):
        row[len(each) :] = -1
    token = [[decode(item, at) for at in row] for item, row in zip(plan.items, position.tolist(), strict=True)]
    labels: dict[str, Any] = {
        "prompt_id": ("prompt", np.array(plan.ids, object)),
        "text": ("prompt", np.array([item.prompt.text for item in plan.items], object)),
        "position": (("prompt", "reading"), position),
        "token": (("prompt", "reading"), np.array(token, object)),
    }
    return labels | variables.labels("component", all_components(plan.model.config.layers))


def _token(plan: Plan, item: Item, at: int) -> str:
    return plan.model.tokenizer.decode([item.tokens[at]]) if at >= 0 else ""
