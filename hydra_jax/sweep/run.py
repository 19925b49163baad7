"""The main job: a sweep from its config into a working directory, resumable, by one process or several."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from jax.sharding import Mesh

from hydra_jax.config import SweepConfig
from hydra_jax.engine import memory
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.batching import evenly
from hydra_jax.engine.cluster import Cluster
from hydra_jax.engine.memory import BatchSizer
from hydra_jax.errors import UserError, shown
from hydra_jax.store import effects as store
from hydra_jax.store import files
from hydra_jax.sweep.bank import DIRECTORY, Bank
from hydra_jax.sweep.chunks import fill, frame, variable_sizes
from hydra_jax.sweep.clean import CleanPass
from hydra_jax.sweep.examples import examples
from hydra_jax.sweep.inputs import Inputs
from hydra_jax.sweep.items import Item
from hydra_jax.sweep.plan import Plan, asked
from hydra_jax.sweep.protocol import Given, protocol
from hydra_jax.text import prompts as prompt_sets
from hydra_jax.text.padding import padded_length
from hydra_jax.text.prompts import Prompt
from hydra_jax.weights import source
from hydra_jax.weights.model import Model

SINGLE = "prompt"
"""Id of the prompt of `config.prompts.text`."""

EXAMINED = "prompts.csv"


def run(config: SweepConfig, workdir: Path, progress: bool = True, given: Given | None = None) -> xr.Dataset:
    """Sweep into `<workdir>/effects.zarr`, going on from what is finished there.

    Beside the store stand `prompts.csv`, every prompt that was examined and whether it was kept, and
    `examples.zarr`, a few prompts' ablations with every replacement. Several processes share the work, as
    workers that write chunks of their own; the first one does the rest.

    Args:
      config: the sweep.
      workdir: made if it is not there.
      progress: whether to show bars.
      given: the model and the prompts, where they are not what the settings name.

    Returns:
      The store's dataset, all of it finished.

    Raises:
      UserError: if anything asked for cannot be; then nothing half-written is left behind.
    """
    cluster = Cluster.joined()
    with files.directory(workdir), contextlib.ExitStack() as held:
        sweep = _agreed(config, workdir, cluster, progress and cluster.first, given, held)
        unfinished = sweep.unfinished_chunks()
        if unfinished != [] or not store.has_examples(workdir, config.example):
            plan = sweep.plan()
            sweep.ablate(plan, unfinished)
            sweep.write_examples(plan)
        return sweep.finish()


def _agreed(
    config: SweepConfig,
    workdir: Path,
    cluster: Cluster,
    progress: bool,
    given: Given | None,
    held: contextlib.ExitStack,
) -> _Sweep:
    """Open the sweep, in every process or in none of them; the directory is this run's as long as `held` is."""
    failure, sweep = None, None
    try:
        if cluster.first:
            held.enter_context(files.exclusive(workdir))
        sweep = _Sweep(config, workdir, cluster, progress, given)
    except UserError as error:
        failure = error
    cluster.agree(failure, sweep.agreed if sweep else "", "other models, prompts or settings")
    assert sweep is not None
    return sweep


class _Sweep:
    """One process' part of a sweep in its directory."""

    def __init__(
        self, config: SweepConfig, workdir: Path, cluster: Cluster, progress: bool, given: Given | None
    ) -> None:
        self.workdir, self.cluster, self.progress = workdir, cluster, progress
        # Before the weights, as mistakes are found in a moment.
        prompts = _prompts(config) if given is None else given.prompts
        if given is None:
            self.mesh = mesh = meshes.make(config.mesh)
            say = functools.partial(print, file=sys.stderr, flush=True)
            self.model: Model = _load(config, mesh, lambda line: progress and say(line))
        else:
            self.model = given.model
            self.mesh = mesh = meshes.mesh_of(given.model.params)
        config = dataclasses.replace(config, dtype=self.model.config.dtype)
        self.inputs = Inputs.of(config, self.model, prompts, given)
        self.config = config = self.inputs.config
        self.protocol = protocol(config, self.model, prompts, given)
        self.digest = store.protocol_attributes(self.protocol)["protocol_sha256"]
        if config.example and config.example not in {item.prompt.id for item in self.inputs.items}:
            raise UserError(
                f"config.example: there is no prompt of id {shown(config.example)}; see prompts.csv of a sweep"
            )
        self.resumed = store.exists(workdir)
        if self.resumed:
            store.check_protocol(store.open_effects(workdir), self.protocol, workdir)
        self.bank = Bank(self.model.config.dtype, workdir / DIRECTORY, self.digest)
        self.worker = meshes.worker(mesh)

    @property
    def agreed(self) -> str:
        """Everything that has to be the same in all processes."""
        config = self.config
        return json.dumps([self.digest, vars(config.mesh), config.rows, config.memory, config.example])

    def unfinished_chunks(self) -> list[slice] | None:
        """Find the chunks that are not finished, or damaged: each process looks at some. None without a store."""
        if not self.resumed:
            return None
        effects = store.open_effects(self.workdir)
        chunks = store.chunks(self.workdir)
        looked_at = self.cluster.share(list(range(len(chunks))))
        bad = [number for number in looked_at if not store.sound(effects, chunks[number])]
        for number in bad:
            store.forget(self.workdir, chunks[number])
        return [chunks[number] for number in sorted(itertools.chain(*self.cluster.gather(bad)))]

    def plan(self) -> Plan:
        """Finish the clean pass, and make the store if there is none."""
        self.sizer = self._sizer()
        if self.progress:
            print(self._layout(), flush=True)
        self.bank.refresh(self.cluster)
        try:
            return self._resumed_plan() if self.resumed else self._new_plan()
        except (UserError, OSError):
            if self.cluster.first and not self.resumed:
                self.bank.remove()  # nothing half-written
            raise

    def ablate(self, plan: Plan, chunks: Sequence[slice] | None) -> None:
        """Ablate in this worker's share of the chunks, None for all of them, and wait for the other workers."""
        files.await_path(self.workdir / store.NAME)
        every = store.chunks(self.workdir)
        chunks = every if chunks is None else chunks
        finished = [chunk for chunk in every if chunk not in chunks]
        lost = store.lost(self.workdir, finished)
        try:
            fill(plan, self.worker.share(list(chunks)), self._write, self.progress, finished, lost)
        except UserError:
            if self.cluster.count == 1 and not store.open_effects(self.workdir)["finished"].values.any():
                store.discard(self.workdir, [EXAMINED])
                self.bank.remove()
            raise
        self.cluster.wait()

    def write_examples(self, plan: Plan) -> None:
        """Write the examples; the first worker makes them."""
        if self.worker.number == 0:
            made = examples(plan, store.open_effects(self.workdir), self.config.example)
            if self.cluster.first:
                store.write_examples(self.workdir, made)

    def finish(self) -> xr.Dataset:
        """Remove what was only for the work, where all is written; returns the store's dataset."""
        self.cluster.wait()
        if self.cluster.first:
            self.bank.remove()
            store.seal(self.workdir)
        self.cluster.wait()
        return store.open_effects(self.workdir)

    def _sizer(self) -> BatchSizer:
        """Size batches alike in all processes: they divide the work by it."""
        config, model, streamed = self.config, self.model.config, self.model.layers.streamed
        free = min(self.cluster.gather(memory.left(config.memory, model, self.mesh, streamed)))
        return BatchSizer(model, self.mesh, asked(config, model, streamed), free)

    def _layout(self) -> str:
        """Describe the devices and the batch size in a line."""
        shape, c = self.mesh.shape, self.model.config
        several = f"process {self.cluster.process} of {self.cluster.count}: " if self.cluster.count > 1 else ""
        return (
            f"{several}{self.mesh.size} {self.mesh.devices.flat[0].platform} devices, data {shape[meshes.DATA]} x model"
            f" {shape[meshes.MODEL]}, {c.dtype}; up to {self.sizer.wanted:,} prompts at once"
        )

    def _write(self, chunk: slice, arrays: Mapping[str, np.ndarray]) -> None:
        if self.worker.leads:
            store.write(self.workdir, chunk, arrays)

    def _clean_pass(self) -> CleanPass:
        return self.inputs.clean_pass(self.sizer, self.bank, self.cluster, self.progress)

    def _resumed_plan(self) -> Plan:
        """Rebuild the plan from the prompts and targets in the store."""
        effects = store.open_effects(self.workdir)
        by_id = {item.prompt.id: item for item in self.inputs.items}
        kept = [by_id[name] for name in effects["prompt_id"].values]
        tokens = np.stack([effects["target_id"].values, effects["foil_id"].values], axis=1)
        return self._checked(self.inputs.plan(self._clean_pass(), kept, tokens))

    def _new_plan(self) -> Plan:
        """Choose the prompts, and make the store."""
        clean = self._clean_pass()
        kept, examined = self.inputs.choose(clean)
        plan = self._checked(self.inputs.plan(clean, kept))
        failure = None
        try:
            self._create(plan, examined)
        except UserError as error:
            failure = error
        self.cluster.agree(failure)
        return plan

    def _checked(self, plan: Plan) -> Plan:
        """Return the plan, if the example that is asked for is in it."""
        example = self.config.example
        if example and example not in plan.ids:
            raise UserError(f"config.example: {shown(example)} is not among the prompts swept; choose another")
        return plan

    def _create(self, plan: Plan, examined: Sequence[Item]) -> None:
        dataset = frame(plan).assign_attrs(store.protocol_attributes(self.protocol))
        if not self.cluster.first:
            return
        table = examined_table(plan, examined)
        beside = {EXAMINED: lambda part: table.to_csv(part, index=False)}
        # As many as fill a worker's devices, but so that every worker has some.
        longest = padded_length(len(plan.items[-1].tokens), plan.model.config.context)
        most = min(self.sizer.chunk(longest), -(-len(plan.items) // self.worker.count))
        chunk = evenly(len(plan.items), most)[0].stop
        store.create(self.workdir, dataset, chunk, variable_sizes(plan, len(plan.items)), plan.options, beside)


def _load(config: SweepConfig, mesh: Mesh, say: Callable[[str], object]) -> Model:
    """Load the model, or what it takes to stream it."""
    switches = {"dtype": config.dtype, "precision": config.precision}
    opened = source.open(config.model, config.model_step)
    limit = config.memory * 1e9 or memory.free_bytes(mesh.local_devices[0])
    return opened.load(mesh=mesh, limit=limit, say=say, **switches)


def _prompts(config: SweepConfig) -> list[Prompt]:
    """Read the prompts to examine."""
    asked = config.prompts
    if asked.text:
        return [Prompt(SINGLE, asked.text)]
    return prompt_sets.read(asked.path, asked.kind, asked.limit, config.seed)


def examined_table(plan: Plan, examined: Sequence[Item]) -> pd.DataFrame:
    """Tabulate the prompts, a row each: what the model answered, whether that is right, whether the sweep has it."""
    swept = set(plan.ids)
    rows = [(item, plan.bank.rows[item.key]) for item in examined]
    return pd.DataFrame(
        {
            "prompt_id": item.prompt.id,
            "relation": item.prompt.relation,
            "text": item.prompt.text,
            "answer": item.prompt.answer,
            "top_token": plan.model.tokenizer.decode([row.top]),
            "probability": row.top_probability,
            "answer_token": "" if row.answer < 0 else plan.model.tokenizer.decode([row.answer]),
            "answer_probability": row.answer_probability,
            "correct": row.top == row.answer,
            "kept": item.prompt.id in swept,
        }
        for item, row in rows
    )
