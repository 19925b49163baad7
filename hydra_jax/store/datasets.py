"""Sweeps as datasets in memory: made into a store, and several made one."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from hydra_jax.errors import UserError, reason, shown
from hydra_jax.parsing import differences
from hydra_jax.store import effects as store
from hydra_jax.store import files
from hydra_jax.store.variables import CASCADE, CUT_LABELS, NON_FINITE, TEXT, VARIABLES

CHUNK = 256
"""Prompts that are written together."""

PROMPT_NUMBERS = {"target_id", "length", "foil_id", "position"}
NEEDED = {
    *("prompt_id", "text", "relation", "answer_text", "target_text", "target_id", "length"),
    *("ablated_layer", "ablated_site", "ablated_head", "layer", "site"),
}
"""Coordinates that every sweep has."""

COORDINATES = NEEDED | TEXT | PROMPT_NUMBERS | {"ablated_name"}
"""Coordinates that a sweep may have."""

FRAME = {"source", "finished"}
"""Variables that are there before anything is computed."""

PROTOCOL = ("protocol", "protocol_sha256", "format")
COMBINED = {"prompt", "replacement"}


def save(dataset: xr.Dataset, workdir: str | Path) -> Path:
    """Write a sweep that is in memory as a store, which every command and `open_effects` take.

    Args:
      dataset: a sweep, or a selection along `prompt` or `ablated`, or several as one; only finished prompts are kept.
      workdir: the directory that is to hold the store; made if it is not there.

    Returns:
      The path of the store.

    Raises:
      UserError: if there is a store already, the dataset is not a sweep's, or the file system refuses anything.
    """
    workdir = Path(workdir)
    whole = checked(dataset, "dataset")
    names = [name for name in VARIABLES if name in whole]
    options = {VARIABLES[name].option for name in names} - {""}
    frame = whole.drop_vars(names)
    frame["finished"] = ("prompt", np.zeros(whole.sizes["prompt"], bool), dict(whole["finished"].attrs))
    path = workdir / store.NAME
    with files.directory(workdir):
        if path.exists():
            raise UserError(f"{path}: is there already, and is not overwritten; give another directory")
        # All of it is written elsewhere first, so that it is whole or not there.
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=workdir) as made:
            store.create(Path(made), frame, min(CHUNK, whole.sizes["prompt"]), whole.sizes, options)
            for chunk in store.chunks(Path(made)):
                store.write(Path(made), chunk, {name: whole[name].values[chunk] for name in names})
            store.seal(Path(made))
            (Path(made) / store.NAME).rename(path)  # refused where there is one
    return path


def check_same(dataset: xr.Dataset, workdir: Path) -> None:
    """Refuse to go on beside the store of another sweep.

    Raises:
      UserError: if the store in `workdir` is of another protocol, other prompts or other ablations, or cannot be read.
    """
    there = store.open_effects(workdir)
    same = there.attrs["protocol_sha256"] == dataset.attrs["protocol_sha256"]
    for name in ("prompt_id", "ablated_layer", "ablated_site", "ablated_head", "ablated_name"):
        here = dataset.coords.get(name)
        if here is not None and name in there.coords:
            same = same and list(map(str, here.values)) == list(map(str, there[name].values))
    if not same:
        raise UserError(f"{workdir / store.NAME}: is of another sweep, or another selection; give another directory")


def checked(dataset: xr.Dataset, what: str) -> xr.Dataset:
    """Return the finished prompts of a sweep as a store has them: dimensions in order, types and texts as written.

    Args:
      dataset: a sweep, or a selection of one.
      what: its name in messages.

    Raises:
      UserError: if it is not a sweep's dataset, has variables of another origin, or holes.
    """
    absent = [name for name in PROTOCOL if name not in dataset.attrs]
    if absent:
        raise UserError(
            f"{what}: has no attribute {absent[0]}, which says how it was made; give what a sweep returned, or restore"
            " the attributes that an operation dropped: dataset.assign_attrs(original.attrs)"
        )
    if dataset.attrs["format"] != store.FORMAT:
        raise UserError(f"{what}: is of format {dataset.attrs['format']}, not {store.FORMAT}; sweep anew")
    dataset = dataset.drop_vars(CUT_LABELS, errors="ignore")
    foreign = sorted(map(str, set(dataset.data_vars) - VARIABLES.keys() - FRAME))
    foreign += sorted(map(str, set(dataset.coords) - COORDINATES - VARIABLES.keys()))
    if foreign:
        raise UserError(
            f"{what}: {', '.join(foreign)} {'is' if len(foreign) == 1 else 'are'} not of a sweep; leave them out with"
            f" .drop_vars({foreign})"
        )
    needed = NEEDED | FRAME | {name for name, variable in VARIABLES.items() if not variable.option}
    if CASCADE in {VARIABLES[str(name)].option for name in set(dataset.variables) & VARIABLES.keys()}:
        needed |= {name for name, variable in VARIABLES.items() if variable.option == CASCADE}
    missing = sorted(needed - set(dataset.variables))
    if missing:
        raise UserError(f"{what}: has no {missing[0]}, which every sweep has; give all of its variables")
    dims = {name: _dims(name) for name in map(str, dataset.variables)}
    wrong = [name for name, expected in dims.items() if set(dataset[name].dims) != set(expected)]
    if wrong:
        raise UserError(
            f"{what}: {wrong[0]} is along {list(dataset[wrong[0]].dims)}, not {list(dims[wrong[0]])}; select with"
            " lists or slices, as in .isel(ablated=[3]), and take no means"
        )
    try:
        dataset = dataset.isel(prompt=np.flatnonzero(dataset["finished"].values)).load()
    except Exception as error:  # of zarr and its codecs, where it is still in a store
        raise UserError(f"{what}: cannot be read ({reason(error)}); {store.RESUME}") from error
    if not dataset.sizes["prompt"] or not dataset.sizes["ablated"]:
        raise UserError(
            f"{what}: has no finished prompt, or no ablations; finish the sweep or select more, and ask hj.sweep for"
            " ablations and cascades together"
        )
    _unique(dataset["prompt_id"].values, what)
    whole = xr.Dataset(
        {name: _typed(dataset[name].variable, name) for name in map(str, dataset.data_vars)},
        {name: _typed(dataset[name].variable, name) for name in map(str, dataset.coords)},
        {name: dataset.attrs[name] for name in (*PROTOCOL, "left_out") if name in dataset.attrs},
    )
    whole["source"] = _known_sources(whole["source"])
    missing = store.holes(whole)
    if missing:
        raise UserError(f"{what}: {missing[0]} has values missing; take the sweep's own values, or leave prompts out")
    return whole


def concat(datasets: Sequence[xr.Dataset], dim: str = "prompt") -> xr.Dataset:
    """Make one sweep of several: of other prompts, or of other replacements for the same ones.

    Args:
      datasets: sweeps of the same model, ablations and settings; only finished prompts are used.
      dim: "prompt": their prompts one after another. "replacement": their replacements side by side, of sweeps that
        differ in their seeds (and number of replacements) alone; what is stored as a mean over replacements is
        averaged, each by how many are finite.

    Returns:
      A dataset that `save`, statistics and figures take. Its protocol has the hash of the prompts' hashes, or lists of
      the seeds and numbers of replacements.

    Raises:
      UserError: if they do not go together.
    """
    if dim not in COMBINED:
        raise UserError(f"dim: {shown(dim)} is not one to combine sweeps along; give 'prompt' or 'replacement'")
    if not datasets:
        raise UserError("datasets: there are none; give one or more")
    parts = [checked(dataset, f"datasets[{number}]") for number, dataset in enumerate(datasets)]
    combine: Callable[[list[xr.Dataset]], xr.Dataset] = _prompts if dim == "prompt" else _replacements
    return parts[0] if len(parts) == 1 else combine(parts)


def _prompts(parts: list[xr.Dataset]) -> xr.Dataset:
    _unique(np.concatenate([part["prompt_id"].values for part in parts]), "datasets")
    protocols = _agreeing(parts, ("prompts.sha256", "prompts.source"))
    foils = [bool((part["foil_id"].values >= 0).any()) if "foil_id" in part.coords else False for part in parts]
    if len(set(foils)) > 1:
        raise UserError(
            f"datasets[{foils.index(not foils[0])}]: reads another thing than datasets[0]: one of them has foils;"
            " sweep both with foils, or with foil=''"
        )
    first = 0
    for number, part in enumerate(parts):
        known = part["source"].values >= 0
        parts[number] = part.assign(source=part["source"].copy(data=np.where(known, part["source"] + first, -1)))
        first += part.sizes["prompt"]
    hashes = [protocol["prompts"]["sha256"] for protocol in protocols]
    prompts = protocols[0]["prompts"] | {
        "sha256": hashlib.sha256("".join(f"{one}\n" for one in hashes).encode()).hexdigest(),
        "source": " + ".join(dict.fromkeys(str(protocol["prompts"]["source"]) for protocol in protocols)),
    }
    return _together(parts, "prompt", protocols[0] | {"prompts": prompts})


def _replacements(parts: list[xr.Dataset]) -> xr.Dataset:
    protocols = _agreeing(parts, ("seed", "ablation.replacements"))
    seeds: list[int] = []
    counts: list[int] = []
    for protocol in protocols:
        listed = isinstance(protocol["seed"], list)
        seeds += protocol["seed"] if listed else [protocol["seed"]]
        replacements = protocol["ablation"]["replacements"]
        counts += replacements if listed else [replacements]
    if len(set(seeds)) < len(seeds):
        raise UserError(
            f"datasets: have the seeds {seeds}, and one seed draws the same replacements again; give sweeps of"
            " different seeds"
        )
    ids = parts[0]["prompt_id"].values
    for number, part in enumerate(parts):
        if set(part["prompt_id"].values) != set(ids):
            raise UserError(f"datasets[{number}]: has other prompts than datasets[0]; give sweeps of the same prompts")
        places = {name: place for place, name in enumerate(part["prompt_id"].values)}
        parts[number] = part = _reordered(part, np.array([places[name] for name in ids]))
        if "cut_component" in part and not np.array_equal(
            part["cut_component"].values, parts[0]["cut_component"].values
        ):
            cascades = sorted(name for name, variable in VARIABLES.items() if variable.option == CASCADE)
            raise UserError(
                f"datasets[{number}]: its cascades cut other components than those of datasets[0]; leave them out with"
                f" .drop_vars({cascades})"
            )
    protocol = protocols[0] | {
        "seed": seeds,
        "ablation": protocols[0]["ablation"] | {"replacements": counts},
    }
    whole = _together(parts, "replacement", protocol)
    for name in set(whole.variables) & VARIABLES.keys():
        variable = VARIABLES[str(name)]
        if variable.clean or "replacement" in variable.dims or name == "cut_component":
            continue
        if name == NON_FINITE:
            whole[name] = parts[0][name].copy(
                data=np.sum([part[name].values for part in parts], axis=0, dtype=variable.dtype)
            )
            continue
        finite = [_finite(part, variable.option) for part in parts]
        values = np.stack([part[name].values.astype(np.float64) for part in parts])
        weights = np.stack(finite).reshape(*np.shape(finite), *[1] * (values.ndim - 3))
        total = weights.sum(axis=0)
        mean = np.where(weights > 0, values, 0) * weights
        data = np.where(total > 0, mean.sum(axis=0) / np.maximum(total, 1), np.nan)
        whole[name] = parts[0][name].copy(data=data.astype(variable.dtype))
    return whole


def _finite(part: xr.Dataset, option: str) -> np.ndarray:
    """Return how many replacements a mean over them is of, (prompt, ablated) or, of cascades, (prompt, cut)."""
    if option == CASCADE:
        return np.isfinite(part["cut_logit"].values).sum(axis=2)
    return part.sizes["replacement"] - part[NON_FINITE].values.astype(int)


def _agreeing(parts: Sequence[xr.Dataset], free: Sequence[str]) -> list[dict[str, Any]]:
    """Return the protocols of sweeps that differ in the settings `free` alone, and have the same variables.

    Raises:
      UserError: if they differ in others.
    """
    protocols = [json.loads(part.attrs["protocol"]) for part in parts]
    for number, (part, protocol) in enumerate(zip(parts, protocols, strict=True)):
        differing = differences(_without(protocols[0], free), _without(protocol, free))
        if differing:
            raise UserError(
                f"datasets[{number}]: is of another protocol than datasets[0] ({differing}); give sweeps of the same"
            )
        more = sorted(map(str, set(part.variables) ^ set(parts[0].variables)))
        if more:
            raise UserError(
                f"datasets[{number}]: {more[0]} is in it or in datasets[0] alone; leave it out with .drop_vars"
            )
        for name in map(str, part.coords):
            shared = part[name].dims != ("prompt",) and name not in VARIABLES
            if shared and not np.array_equal(part[name].values, parts[0][name].values):
                raise UserError(
                    f"datasets[{number}]: {name} differs from that of datasets[0]; give sweeps of the same ablations"
                )
    return protocols


def _without(protocol: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """Return a protocol without some of its settings."""
    copy = json.loads(json.dumps(protocol))
    for path in paths:
        *folders, name = path.split(".")
        tree = copy
        for folder in folders:
            tree = tree.get(folder, {})
        tree.pop(name, None)
    return copy


def _together(parts: Sequence[xr.Dataset], dim: str, protocol: dict[str, Any]) -> xr.Dataset:
    """Put datasets one after another along a dimension; what does not have it is the first's."""
    left_out = sum(part.attrs.get("left_out", 0) for part in parts) if dim == "prompt" else 0
    arrays: dict[Hashable, xr.Variable] = {
        name: xr.Variable.concat([part[name].variable for part in parts], dim) if dim in variable.dims else variable
        for name, variable in parts[0].variables.items()
    }
    coordinates = {name: arrays.pop(name) for name in parts[0].coords}
    attributes = store.protocol_attributes(protocol) | ({"left_out": left_out} if left_out else {})
    return xr.Dataset(arrays, coordinates, attributes)


def _reordered(part: xr.Dataset, places: np.ndarray) -> xr.Dataset:
    """Return prompts in the order of `places`, with the sources of their replacements."""
    source = part["source"].values
    moved = np.where(source >= 0, np.argsort(places)[source], -1)
    return part.assign(source=part["source"].copy(data=moved)).isel(prompt=places)


def _dims(name: str) -> tuple[str, ...]:
    """Return the dimensions of a variable or coordinate."""
    if name in VARIABLES:
        return VARIABLES[name].dims
    if name == "source":
        return ("prompt", "replacement")
    if name in ("layer", "site"):
        return ("component",)
    return ("ablated",) if name.startswith("ablated_") else ("prompt",)


def _typed(variable: xr.Variable, name: str) -> xr.Variable:
    """Return a variable as stores have it."""
    variable = variable.transpose(*_dims(name))
    values = variable.values
    if name in VARIABLES:
        values = values.astype(VARIABLES[name].dtype)
    elif name in TEXT or name in ("site", "ablated_site", "ablated_name"):
        values = np.array([str(value) for value in values], dtype=object)
    else:
        values = values.astype(bool if name == "finished" else np.int64)
    return xr.Variable(variable.dims, values, variable.attrs)  # without an encoding, which is of where it was read


def _known_sources(source: xr.DataArray) -> xr.DataArray:
    """Return the positions of replacements' prompts, or -1 for all where prompts were selected since.

    A prompt is never its own source, so that positions of another order or number of prompts are found out.
    """
    positions = source.values
    own = positions == np.arange(len(positions))[:, None]
    stale = (positions >= len(positions)).any() or own.any()
    return source.copy(data=np.full_like(positions, -1)) if stale else source


def _unique(ids: np.ndarray, what: str) -> None:
    twice = [name for name, count in Counter(map(str, ids)).items() if count > 1]
    if twice:
        raise UserError(f"{what}: the prompt id {shown(twice[0])} is there twice; rename or leave out one of them")
