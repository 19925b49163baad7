"""How the kernel's rate grows with devices, and what passes between them, counted in the compiled program.

On a CPU, a run of N devices is a process of its own that is kept to N cores: within one, devices would share all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hydra_jax.config import MeshConfig
from hydra_jax.core.edits import Kind, WriteStatistics, all_components
from hydra_jax.core.prefill import MOST_LIKELY
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.batched import ablate_program, prefill_program
from hydra_jax.engine.mesh import DATA, MODEL
from hydra_jax.errors import UserError
from hydra_jax.models.transformer import Params
from hydra_jax.sweep.roofline import intervention_flops

KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
COLLECTIVE = re.compile(rf"= (?P<result>\(?[^=]*?) (?P<kind>{KINDS})(?:-start)?\((?P<rest>.*)")
ARRAY = re.compile(r"\b(?P<type>pred|[a-z]+(?P<bits>\d+))\[(?P<shape>[\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One place of a compiled program where devices exchange arrays.

    Attributes:
      kind: as XLA calls it.
      bytes: of the result, on one device.
      groups: places of the mesh that it joins, flattened.
    """

    kind: str
    bytes: int
    groups: frozenset[frozenset[int]]

    def over(self, mesh: Mesh) -> set[str]:
        """The axes along which it passes anything."""
        places = np.arange(mesh.size).reshape(mesh.devices.shape)
        axes = set()
        for group in self.groups:
            where = np.argwhere(np.isin(places, list(group)))
            axes |= {name for name, column in zip(mesh.axis_names, where.T, strict=True) if len(set(column)) > 1}
        return axes


def collectives(program: str) -> list[Collective]:
    """Those of a compiled program, from its text."""
    return [
        Collective(found["kind"], _bytes(found["result"]), _groups(found["rest"]))
        for found in COLLECTIVE.finditer(program)
    ]


def _bytes(result: str) -> int:
    sizes = (
        (int(found["bits"] or 8) / 8, found["shape"].split(",") if found["shape"] else [])
        for found in ARRAY.finditer(result)
    )
    return int(sum(item * np.prod([int(n) for n in shape]) for item, shape in sizes))


def _groups(rest: str) -> frozenset[frozenset[int]]:
    """Which devices are joined: listed, or as an array of them reshaped, or as axes of a mesh."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", rest):
        return frozenset(frozenset(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", found[1]))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        rows = _ordered(found[2], found[3]).reshape(_numbers(found[1]))
        return frozenset(frozenset(row) for row in rows.tolist())
    ordered = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    if found := re.search(rf"replica_groups=mesh\[(.*?)\]{ordered} \{{(.*?)\}}", rest):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        joined = set(re.findall(r"'(\w+)'", found[4]))
        places = _ordered(found[2] or str(np.prod(list(axes.values()))), found[3]).reshape(list(axes.values()))
        apart = [axis for axis, name in enumerate(axes) if name not in joined]
        order = [*apart, *(axis for axis in range(len(axes)) if axis not in apart)]
        rows = places.transpose(order).reshape(int(np.prod([places.shape[axis] for axis in apart])), -1)
        return frozenset(frozenset(row) for row in rows.tolist())
    raise ValueError(f"devices of a collective are written in an unknown way: {rest}")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _ordered(shape: str, order: str | None) -> np.ndarray:
    """Devices by number in an array of a shape, its axes in another order where one is given."""
    places = np.arange(np.prod(_numbers(shape))).reshape(_numbers(shape))
    return places.transpose(_numbers(order)) if order else places


@dataclasses.dataclass(frozen=True)
class Scaled:
    """One number of devices, all on the data axis but those that share the model.

    Attributes:
      devices: how many.
      model: of them, how many share a copy of the model.
      prompts: at once, over all.
      interventions: a second.
      flops: of matrix products, a second.
      data_collectives: places in the program of a chunk where anything passes along the data axis.
      model_collectives: the same along the model axis, each of which runs once a layer or less.
      model_bytes: of their results on one device, together.
      parameter_bytes: on one device.
    """

    devices: int
    model: int
    prompts: int
    interventions: float
    flops: float
    data_collectives: int
    model_collectives: int
    model_bytes: int
    parameter_bytes: int


def measure(params: Params, devices: int, model: int, prompts: int, length: int, draws: int, step: int) -> Scaled:
    """Measure the kernel on some of this process' devices.

    Args:
      params: the model, wherever it lies.
      devices: how many.
      model: how many of them share a copy of the model.
      prompts: P, over all devices; made a multiple of the data axis.
      length: T, tokens of a prompt.
      draws: R, replacements.
      step: measure every `step`-th component.

    Raises:
      UserError: if the devices cannot be shared so.
    """
    if devices % model:
        raise UserError(f"--devices: {devices} cannot be shared by {model}; give multiples of config.mesh.model")
    mesh = meshes.make(MeshConfig(devices // model, model))
    params = meshes.lay(mesh, params)
    c, data = params.config, mesh.shape[DATA]
    prompts = -(-prompts // data) * data
    tokens = np.random.default_rng(0).integers(0, c.vocab_size, (prompts, length), np.int32)
    over = [tokens, np.full(prompts, length, np.int32), np.full(prompts, MOST_LIKELY, np.int32)]
    inputs = [meshes.put(mesh, each, meshes.Spec(DATA)) for each in over]
    prefill = prefill_program(params).lower(params, *inputs).compile()
    clean = prefill(params, *inputs)
    sources = meshes.put(mesh, np.zeros((prompts, draws, c.width), np.float32), meshes.Spec(DATA))
    nothing = WriteStatistics(jnp.zeros(c.width), jnp.zeros(c.width))
    keys = meshes.put(mesh, jax.random.split(jax.random.key(0), prompts), meshes.Spec(DATA))
    components = all_components(c.layers)[::step]
    edits = [
        (params, clean, (jnp.int32(each.layer), jnp.int32(each.site), None), sources, nothing, keys)
        for each in components
    ]
    kernel = ablate_program(params, Kind.RESAMPLE, edges=False).lower(*edits[0]).compile()
    jax.block_until_ready(kernel(*edits[-1]))
    start = time.perf_counter()
    for each in edits:
        jax.block_until_ready(kernel(*each))
    seconds = time.perf_counter() - start
    passed = [one for program in (prefill, kernel) for one in collectives(program.as_text() or "")]
    flops = prompts * draws * sum(intervention_flops(c, each, length) for each in components)
    return Scaled(
        devices=devices,
        model=model,
        prompts=prompts,
        interventions=prompts * draws * len(components) / seconds,
        flops=flops / seconds,
        data_collectives=sum(DATA in one.over(mesh) for one in passed),
        model_collectives=sum(MODEL in one.over(mesh) for one in passed),
        model_bytes=sum(one.bytes for one in passed if MODEL in one.over(mesh)),
        parameter_bytes=sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params)),
    )


def apart(arguments: Sequence[str], devices: int) -> dict[str, dict[str, Any]]:
    """What `python -m launch.benchmark` measures with as many CPU devices, kept to as many cores.

    Args:
      arguments: of the command.
      devices: how many, whatever --devices and --output say among them.

    Raises:
      UserError: if there are fewer cores, or it fails.
    """
    cores = sorted(os.sched_getaffinity(0))
    if devices > len(cores):
        raise UserError(f"--devices: {devices} CPU devices want as many cores, there are {len(cores)}; give fewer")
    with tempfile.TemporaryDirectory(prefix="hydra_jax-") as temporary:
        output = Path(temporary) / "figures.json"
        # Inherited: to set it between fork and exec is not safe beside JAX's threads.
        os.sched_setaffinity(0, cores[:devices])
        try:
            done = subprocess.run(
                [sys.executable, "-m", "launch.benchmark", *arguments, f"--devices={devices}", f"--output={output}"],
                env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
                stdout=subprocess.DEVNULL,
                check=False,
            )
        finally:
            os.sched_setaffinity(0, cores)
        if done.returncode:
            raise UserError(f"--devices: the run of {devices} devices ended with {done.returncode}; see what it says")
        return json.loads(output.read_text())["figures"][0]


def table(found: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """Of each number of devices its `Scaled` as dicts, "strong" and "weak", a line each.

    Strong scaling is of one number of prompts, weak of as many on each device; efficiency is of the first line's rate
    a device.
    """
    lines = [
        f"{'scaling':7} {'devices':>7} {'model':>6} {'prompts':>8} {'interventions/s':>16} {'GFLOP/s':>9}"
        f" {'efficiency':>11} {'on data':>8} {'on model':>9} {'MB of it':>9} {'parameters GB':>14}"
    ]
    for kind in ("strong", "weak"):
        rows = [Scaled(**each[kind]) for each in found]
        for row in rows:
            efficiency = row.interventions / row.devices / (rows[0].interventions / rows[0].devices)
            lines.append(
                f"{kind:7} {row.devices:7} {row.model:6} {row.prompts:8} {row.interventions:16,.0f}"
                f" {row.flops / 1e9:9,.0f} {efficiency:11.0%} {row.data_collectives:8} {row.model_collectives:9}"
                f" {row.model_bytes / 1e6:9.2f} {row.parameter_bytes / 1e9:14.3f}"
            )
    return "\n".join(lines)
