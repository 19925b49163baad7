"""The main job: a sweep from its config into a working directory, resumable, by one process or several."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jax.sharding import Mesh

from hydra_jax.config import SweepConfig
from hydra_jax.core.edits import ATTN, SITES, check_enough
from hydra_jax.engine import memory
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.batching import evenly
from hydra_jax.engine.cluster import Cluster
from hydra_jax.engine.memory import BatchSizer
from hydra_jax.errors import UserError, shown
from hydra_jax.store import effects as store
from hydra_jax.store import files
from hydra_jax.sweep.bank import DIRECTORY, Bank
from hydra_jax.sweep.chunks import ablate_one, fill, frame
from hydra_jax.sweep.clean import CleanPass, choose
from hydra_jax.sweep.plan import Item, Plan, facts_beside, itemise
from hydra_jax.text import prompts as prompt_sets
from hydra_jax.text.prompts import Prompt
from hydra_jax.version import __version__
from hydra_jax.weights import hub
from hydra_jax.weights.load import Model, load, read_config

BLOCK = 256
"""Prompts whose effects are in memory at once, where all are looked through."""

SINGLE = "prompt"
"""Id of the prompt of `config.prompts.text`."""

EXAMINED = "prompts.csv"
EXAMPLES = 4
EXAMPLE_COORDINATES = (
    *("prompt_id", "text", "target_text", "clean_logit", "clean_probability"),
    *("ablated_layer", "ablated_site", "ablated_head"),
)


def protocol(config: SweepConfig, model: Model, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """All that a sweep's results depend on, as a JSON tree."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    return {
        "model": {
            "name": config.model,
            "step": config.model_step,
            "sha256": model.weights_hash,
            "dropout": model.dropout,
        },
        "dtype": config.dtype,
        "precision": config.precision,
        "prompts": {
            "source": "one prompt" if config.prompts.text else Path(config.prompts.path).name or "built-in facts",
            "sha256": prompt_sets.content_hash(prompts),
            "kind": config.prompts.kind,
            "correct_only": config.prompts.filtered,
            "limit": config.prompts.limit,
            "target": config.prompts.target,
        },
        "ablation": dataclasses.asdict(config.ablation) | {"replacements": config.ablation.draws},
        "seed": config.seed,
        "versions": {"hydra_jax": __version__, **versions},
    }


def run(config: SweepConfig, workdir: Path, progress: bool = True) -> xr.Dataset:
    """Sweep into `<workdir>/effects.zarr`, going on from what is finished there.

    Beside the store stand `prompts.csv`, every prompt that was examined and whether it was kept, and
    `examples.zarr`, a few prompts' ablations with every replacement. Several processes share the work, as
    workers that write chunks of their own; the first one does the rest.

    Args:
      config: the sweep.
      workdir: made if it is not there.
      progress: whether to show bars.

    Returns:
      The store's dataset, all of it finished.

    Raises:
      UserError: if anything asked for cannot be; then nothing half-written is left behind.
    """
    cluster = Cluster.joined()
    with files.directory(workdir), contextlib.ExitStack() as held:
        failure, sweep = None, None
        try:
            if cluster.first:
                held.enter_context(files.exclusive(workdir))
            sweep = _Sweep(config, workdir, cluster, progress and cluster.first)
        except UserError as error:
            failure = error
        cluster.agree(failure, sweep.agreed if sweep else "", "other models, prompts or settings")
        assert sweep is not None
        return sweep.go()


class _Sweep:
    """One process' part of a sweep in its directory."""

    def __init__(self, config: SweepConfig, workdir: Path, cluster: Cluster, progress: bool):
        self.workdir, self.cluster, self.progress = workdir, cluster, progress
        self.mesh = mesh = meshes.make(config.mesh)
        prompts = _prompts(config)  # before the weights, as mistakes are found in a moment
        self.model: Model = _load(config, mesh)
        self.config = config = dataclasses.replace(config, dtype=self.model.config.dtype)
        _check(config, self.model, prompts)
        self.protocol = protocol(config, self.model, prompts)
        self.digest = store.protocol_attributes(self.protocol)["protocol_sha256"]
        self.items = itemise(self.model, prompts)
        self.resumed = store.exists(workdir)
        if self.resumed:
            store.check_protocol(store.open_effects(workdir), self.protocol, workdir)
        self.bank = Bank(self.model.config.dtype, workdir / DIRECTORY, self.digest)
        self.worker = meshes.worker(mesh)

    def _sizer(self) -> BatchSizer:
        """How many prompts go at once, the same in all processes: they divide the work by it."""
        config = self.config
        free = min(self.cluster.gather(memory.left(config.memory, self.model.config, self.mesh)))
        return BatchSizer(self.model.config, self.mesh, config.ablation.draws, config.ablation.edges, config.rows, free)

    @property
    def agreed(self) -> str:
        """What has to be the same in all processes."""
        config = self.config
        return json.dumps([self.digest, vars(config.mesh), config.rows, config.memory, config.example])

    def go(self) -> xr.Dataset:
        """Whatever is left to do."""
        left = self._left() if self.resumed else None
        if left == [] and store.has_examples(self.workdir, self.config.example):
            self._end()
            return store.open_effects(self.workdir)
        self.sizer = self._sizer()
        if self.progress:
            print(self._layout(), flush=True)
        self.bank.refresh(self.cluster)
        try:
            plan = self._plan()
        except (UserError, OSError):
            if self.cluster.first and not self.resumed:
                self.bank.remove()  # nothing half-written
            raise
        files.await_path(self.workdir / store.NAME)
        every = store.chunks(self.workdir)
        left = every if left is None else left
        finished = [chunk for chunk in every if chunk not in left]
        lost = store.lost(self.workdir, finished)
        try:
            fill(plan, self.worker.share(left), self._write, self.progress, finished, lost)
        except UserError:
            if self.cluster.count == 1 and not store.open_effects(self.workdir)["finished"].values.any():
                store.discard(self.workdir, [EXAMINED])
                self.bank.remove()
            raise
        self.cluster.wait()
        if self.worker.number == 0:
            made = examples(plan, store.open_effects(self.workdir), self.config.example)
            if self.cluster.first:
                store.write_examples(self.workdir, made)
        self._end()
        return store.open_effects(self.workdir)

    def _layout(self) -> str:
        """On what it runs, in words."""
        shape, c = self.mesh.shape, self.model.config
        several = f"process {self.cluster.process} of {self.cluster.count}: " if self.cluster.count > 1 else ""
        return (
            f"{several}{self.mesh.size} {self.mesh.devices.flat[0].platform} devices, data {shape[meshes.DATA]} x model"
            f" {shape[meshes.MODEL]}, {c.dtype}; up to {self.sizer.wanted:,} prompts at once"
        )

    def _end(self) -> None:
        """All is written: what was only for the work goes."""
        self.cluster.wait()
        if self.cluster.first:
            self.bank.remove()
            store.seal(self.workdir)
        self.cluster.wait()

    def _write(self, chunk: slice, arrays: Mapping[str, np.ndarray]) -> None:
        if self.worker.leads:
            store.write(self.workdir, chunk, arrays)

    def _left(self) -> list[slice]:
        """The chunks that are not finished, or damaged; each process looks at some."""
        effects = store.open_effects(self.workdir)
        every = store.chunks(self.workdir)
        looked = self.cluster.share(list(range(len(every))))
        bad = [number for number in looked if not store.sound(effects, every[number])]
        for number in bad:
            store.forget(self.workdir, every[number])
        return [every[number] for number in sorted(itertools.chain(*self.cluster.gather(bad)))]

    def _plan(self) -> Plan:
        """The clean pass, if it is still to be done, and the store, made if it is not there."""
        config = self.config
        clean = CleanPass(self.model, config.ablation, self.sizer, self.bank, self.cluster, self.progress)
        if self.resumed:
            old = store.open_effects(self.workdir)
            by_id = {item.prompt.id: item for item in self.items}
            kept = [by_id[name] for name in old["prompt_id"].values]
            examined, pool = kept, self.items if config.prompts.text else kept
            with clean.bar(len(pool)) as bar:
                clean.run(pool, bar, target=config.prompts.target)
            targets = old["target_id"].values
        elif config.prompts.text:
            with clean.bar(len(self.items)) as bar:
                clean.run(self.items, bar)
            pool = self.items
            kept = examined = [item for item in self.items if item.prompt.id == SINGLE]
        else:
            kept, examined = choose(clean, self.items, config.prompts, config.seed)
            pool = kept
        if not self.resumed:
            targets = np.array([self.bank.rows[item.prompt.id].target for item in kept])
        plan = Plan(
            model=self.model,
            items=kept,
            targets=targets,
            bank=self.bank,
            bank_ids=[item.prompt.id for item in pool],
            ablation=config.ablation,
            seed=config.seed,
            sizer=self.sizer,
            tolerance=config.identity_tolerance,
            non_finite=config.non_finite,
        )
        if config.example and config.example not in plan.ids:
            raise UserError(f"config.example: {shown(config.example)} is not among the prompts swept; choose another")
        if not self.resumed:
            failure = None
            try:
                self._create(plan, examined)
            except UserError as error:
                failure = error
            self.cluster.agree(failure)
        return plan

    def _create(self, plan: Plan, examined: Sequence[Item]) -> None:
        dataset = frame(plan).assign_attrs(store.protocol_attributes(self.protocol))
        if not self.cluster.first:
            return
        table = examined_table(plan, examined)
        beside = {EXAMINED: lambda part: table.to_csv(part, index=False)}
        # As many as fill a worker's devices, but so that every worker has some.
        most = min(self.sizer.wanted, -(-len(plan.items) // self.worker.count))
        chunk = evenly(len(plan.items), most)[0].stop
        store.create(self.workdir, dataset, chunk, self.config.ablation.edges, beside)


def _load(config: SweepConfig, mesh: Mesh) -> Model:
    """The model, if it fits."""
    switches = {"dtype": config.dtype, "precision": config.precision}
    _, described = read_config(hub.locate(config.model), **switches)
    limit = config.memory * 1e9 or memory.free_bytes(mesh.local_devices[0])
    memory.check_model(described, mesh.shape[meshes.MODEL], limit)
    return load(config.model, step=config.model_step, mesh=mesh, **switches)


def _prompts(config: SweepConfig) -> list[Prompt]:
    """The prompts to examine; of a single one, with the facts that replacements come from."""
    asked = config.prompts
    if asked.text:
        return [Prompt(SINGLE, asked.text), *facts_beside(asked.text, config.ablation.draws, config.seed)]
    return prompt_sets.read(asked.path, asked.kind, asked.limit, config.seed)


def _check(config: SweepConfig, model: Model, prompts: Sequence[Prompt]) -> None:
    """Refuse at once what would otherwise be found out after the clean pass, or at the very end."""
    config.ablation.components(model.config)
    if config.ablation.kind == "resample":
        check_enough(len(prompts), config.ablation.draws)
    if config.example and config.example not in {prompt.id for prompt in prompts}:
        raise UserError(f"config.example: there is no prompt of id {shown(config.example)}; see prompts.csv of a sweep")


def examined_table(plan: Plan, examined: Sequence[Item]) -> pd.DataFrame:
    """One row a prompt: what the model answered, whether that is right, whether the sweep has it."""
    swept = set(plan.ids)
    rows = [(item, plan.bank.rows[item.prompt.id]) for item in examined]
    return pd.DataFrame(
        {
            "prompt_id": item.prompt.id,
            "relation": item.prompt.relation,
            "text": item.prompt.text,
            "answer": item.prompt.answer,
            "top_token": plan.model.tokenizer.decode([row.top]),
            "probability": row.probability,
            "correct": row.top == item.answer,
            "kept": item.prompt.id in swept,
        }
        for item, row in rows
    )


def examples(plan: Plan, effects: xr.Dataset, prompt_id: str = "") -> xr.Dataset:
    """A few prompts, each under ablation of its strongest attention layer, the one of the largest direct effect.

    They are the one that is asked for, and those in which that ablation is repaired most, at the
    quartiles, and least (or made worse most), in logits.

    Args:
      plan: the sweep.
      effects: its results.
      prompt_id: which prompt comes first; "" for none in particular.

    Raises:
      UserError: if the sweep has no such prompt.

    Returns:
      `ablations.ablate_one` of each, along the dimension `example`.
    """
    if prompt_id and prompt_id not in plan.ids:
        raise UserError(f"config.example: {shown(prompt_id)} is not among the prompts swept; see prompts.csv")
    strongest, repaired = _strongest(effects)
    asked = [plan.ids.index(prompt_id)] if prompt_id else []
    order = np.argsort(-repaired)[: np.isfinite(repaired).sum()]
    if not len(order):
        raise UserError("prompts: no prompt's values are all finite; sweep in float32, into another --workdir")
    spread = order[np.linspace(0, len(order) - 1, EXAMPLES).round().astype(int)]
    places = list(dict.fromkeys([*asked, *spread.tolist()]))[:EXAMPLES]
    found = []
    for place in places:
        one = ablate_one(plan, place, plan.components[int(strongest[place])])
        named = {name: np.array(one.attrs[name]) for name in EXAMPLE_COORDINATES}
        named |= {name: value.astype(object) for name, value in named.items() if value.dtype.kind == "U"}
        found.append(one.assign_coords(named).drop_attrs(deep=False))
    shared = {"kind": plan.ablation.kind, "units": store.LOGITS}
    return xr.concat(found, "example", coords=list(EXAMPLE_COORDINATES), compat="override").assign_attrs(shared)


def _strongest(effects: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """[P], the ablation of each prompt with the largest direct effect, of attention where there are some; and [P],
    by how much it is repaired: NaN where values are not finite.
    """  # noqa: D205
    strongest, repaired = [], []
    for start in range(0, effects.sizes["prompt"], BLOCK):
        block = effects[["direct_effect", "total_effect"]].isel(prompt=slice(start, start + BLOCK))
        means = block.mean("replacement", skipna=False)
        attention = means["ablated_site"] == SITES[ATTN]
        direct = means["direct_effect"].where(attention if attention.any() else True, -np.inf).fillna(-np.inf).values
        strongest.append(direct.argmax(axis=1))
        of = np.arange(len(direct)), strongest[-1]
        repaired.append((means["direct_effect"] - means["total_effect"]).values[of])
    return np.concatenate(strongest), np.concatenate(repaired)
