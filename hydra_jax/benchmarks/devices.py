"""The rate of a walk's rows by the number of devices, and the traffic between them, counted in compiled programs.

On a CPU, a run of N devices is a process of its own that is kept to N cores: in one process, devices would share
all cores.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hydra_jax.benchmarks.timing import apart as steps_apart
from hydra_jax.benchmarks.walks import last_alike, random_tokens, walk
from hydra_jax.config import MeshConfig
from hydra_jax.core.edits import Component, all_components
from hydra_jax.core.prefill import LayerClean
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.memory import default_rows
from hydra_jax.engine.mesh import DATA, MODEL
from hydra_jax.errors import UserError
from hydra_jax.models.transformer import Params
from hydra_jax.sweep.roofline import intervention_flops

KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
COLLECTIVE = re.compile(rf"= (?P<result>\(?[^=]*?) (?P<kind>{KINDS})(?:-start)?\((?P<rest>.*)")
ARRAY = re.compile(r"\b(?P<type>pred|[a-z]+(?P<bits>\d+))\[(?P<shape>[\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """An operation of a compiled program by which devices exchange arrays.

    Attributes:
      kind: XLA's name of the operation.
      bytes: size of the result on one device.
      groups: the groups of devices that exchange, each device by its index in the flattened mesh.
    """

    kind: str
    bytes: int
    groups: frozenset[frozenset[int]]

    def over(self, mesh: Mesh) -> set[str]:
        """Return the mesh axes along which data passes."""
        numbers = np.arange(mesh.size).reshape(mesh.devices.shape)
        axes = set()
        for group in self.groups:
            positions = np.argwhere(np.isin(numbers, list(group)))
            axes |= {name for name, column in zip(mesh.axis_names, positions.T, strict=True) if len(set(column)) > 1}
        return axes


def collectives(program: str) -> list[Collective]:
    """Return the collectives of a compiled program, read from its text."""
    return [
        Collective(match["kind"], _bytes(match["result"]), _groups(match["rest"]))
        for match in COLLECTIVE.finditer(program)
    ]


def _bytes(result: str) -> int:
    sizes = (
        (int(array["bits"] or 8) / 8, array["shape"].split(",") if array["shape"] else [])
        for array in ARRAY.finditer(result)
    )
    return int(sum(item * np.prod([int(n) for n in shape]) for item, shape in sizes))


def _groups(rest: str) -> frozenset[frozenset[int]]:
    """Read the groups of devices, which are listed, or a reshaped array of numbers, or axes of a mesh."""
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", rest):
        return frozenset(frozenset(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", match[1]))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        rows = _ordered(match[2], match[3]).reshape(_numbers(match[1]))
        return frozenset(frozenset(row) for row in rows.tolist())
    ordered = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    if match := re.search(rf"replica_groups=mesh\[(.*?)\]{ordered} \{{(.*?)\}}", rest):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        joined = set(re.findall(r"'(\w+)'", match[4]))
        numbers = _ordered(match[2] or str(np.prod(list(axes.values()))), match[3]).reshape(list(axes.values()))
        separate = [axis for axis, name in enumerate(axes) if name not in joined]
        order = [*separate, *(axis for axis in range(len(axes)) if axis not in separate)]
        rows = numbers.transpose(order).reshape(int(np.prod([numbers.shape[axis] for axis in separate])), -1)
        return frozenset(frozenset(row) for row in rows.tolist())
    raise ValueError(f"devices of a collective are written in an unknown way: {rest}")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _ordered(shape: str, order: str | None) -> np.ndarray:
    """Return the numbers of devices as an array of a shape, its axes transposed where an order is given."""
    numbers = np.arange(np.prod(_numbers(shape))).reshape(_numbers(shape))
    return numbers.transpose(_numbers(order)) if order else numbers


@dataclasses.dataclass(frozen=True)
class Scaled:
    """The figures of one number of devices; the data axis has all but those that share a copy of the model.

    Attributes:
      devices: how many devices there are.
      model: how many of them share a copy of the model.
      prompts: prompts at once, over all devices.
      interventions: interventions a second.
      flops: operations of matrix products a second.
      data_collectives: collectives along the data axis in a walk's programs.
      model_collectives: collectives along the model axis, each of which runs once for a block of rows in a layer or
        less.
      model_bytes: size of the latter's results on one device, in all.
      parameter_bytes: size of the parameters on one device.
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


def compiled_collectives(mesh: Mesh, call: Callable[[], Any]) -> list[Collective]:
    """Return the collectives of all programs that are compiled for a call: all that it runs, compiled anew."""
    jax.clear_caches()
    client = mesh.local_devices[0].client
    before = client.live_executables()
    jax.block_until_ready(call())
    programs = [program for program in client.live_executables() if program not in before]
    return [found for program in programs for found in collectives(program.hlo_modules()[0].to_string())]


def measure(
    params: Params, devices: int, model: int, prompts: int, length: int, draws: int, step: int, rows: int = 0
) -> Scaled:
    """Measure a walk on some of this process' devices.

    Args:
      params: the model, on whatever devices.
      devices: how many devices to use.
      model: how many of them share a copy of the model.
      prompts: P, over all devices; rounded up to a multiple of the data axis.
      length: T, tokens of a prompt.
      draws: R, replacements.
      step: ablate every `step`-th component.
      rows: in a block on a device, about; 0 for its default.

    Raises:
      UserError: if `devices` is no multiple of `model`.
    """
    if devices % model:
        raise UserError(f"--devices: {devices} cannot be shared by {model}; give multiples of config.mesh.model")
    mesh = meshes.make(MeshConfig(devices // model, model))
    params = meshes.lay(mesh, params)
    c, data = params.config, mesh.shape[DATA]
    prompts = -(-prompts // data) * data
    tokens = random_tokens(c, prompts, length)
    nothing = meshes.put(mesh, np.zeros((prompts, draws, c.width), np.float32), meshes.Spec(DATA))
    components = all_components(c.layers)[::step]

    def replacements(component: Component, clean: LayerClean) -> jax.Array:
        del component, clean
        return nothing

    ablated = functools.partial(
        walk, params, tokens, tokens[:, -1], draws=draws, at_once=rows or default_rows(), sources=replacements
    )
    traffic = compiled_collectives(mesh, functools.partial(ablated, components=last_alike(c, components)))
    with steps_apart() as spent:
        ablated(components=components)
    seconds = spent.kernel
    over_model = [collective for collective in traffic if MODEL in collective.over(mesh)]
    flops = prompts * draws * sum(intervention_flops(c, component, length) for component in components)
    return Scaled(
        devices=devices,
        model=model,
        prompts=prompts,
        interventions=prompts * draws * len(components) / seconds,
        flops=flops / seconds,
        data_collectives=sum(DATA in collective.over(mesh) for collective in traffic),
        model_collectives=len(over_model),
        model_bytes=sum(collective.bytes for collective in over_model),
        parameter_bytes=sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params)),
    )


def apart(arguments: Sequence[str], devices: int) -> dict[str, dict[str, Any]]:
    """Run `python -m launch.benchmark` with some CPU devices, kept to as many cores, and return its figures.

    Args:
      arguments: the command's arguments; what they say at --devices and --output does not count.
      devices: how many devices there are.

    Raises:
      UserError: if there are fewer cores, or the command fails.
    """
    cores = sorted(os.sched_getaffinity(0))
    if devices > len(cores):
        raise UserError(f"--devices: {devices} CPU devices want as many cores, there are {len(cores)}; give fewer")
    with tempfile.TemporaryDirectory(prefix="hydra_jax-") as temporary:
        output = Path(temporary) / "figures.json"
        # The command inherits the affinity: setting it between fork and exec is not safe beside JAX's threads.
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


def table(figures: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """Return the figures as a table, a line for each number of devices and kind of scaling.

    Strong scaling keeps the number of prompts, weak scaling the number on each device. Efficiency is the rate of a
    device, as a share of its rate in the first line.

    Args:
      figures: for each number of devices, `Scaled` as dicts under "strong" and "weak".
    """
    lines = [
        f"{'scaling':7} {'devices':>7} {'model':>6} {'prompts':>8} {'interventions/s':>16} {'GFLOP/s':>9}"
        f" {'efficiency':>11} {'on data':>8} {'on model':>9} {'MB of it':>9} {'parameters GB':>14}"
    ]
    for kind in ("strong", "weak"):
        rows = [Scaled(**by_kind[kind]) for by_kind in figures]
        for row in rows:
            efficiency = row.interventions / row.devices / (rows[0].interventions / rows[0].devices)
            lines.append(
                f"{kind:7} {row.devices:7} {row.model:6} {row.prompts:8} {row.interventions:16,.0f}"
                f" {row.flops / 1e9:9,.0f} {efficiency:11.0%} {row.data_collectives:8} {row.model_collectives:9}"
                f" {row.model_bytes / 1e6:9.2f} {row.parameter_bytes / 1e9:14.3f}"
            )
    return "\n".join(lines)
