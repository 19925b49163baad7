"""The result store: one zarr group that `xarray.open_zarr` reads, written chunk by chunk.

A chunk is a run of prompts. Its effects are written first and its `finished` flags last, so whatever
stops a run, the prompts that are flagged are whole and the others are computed again.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from hydra_jax.errors import UserError
from hydra_jax.parsing import differences
from hydra_jax.store import digests, files, metadata
from hydra_jax.store.variables import (
    CASCADE,
    FILLED,
    NON_FINITE,
    NOTHING,
    VARIABLES,
    shapes,
)

NAME = "effects.zarr"
EXAMPLES = "examples.zarr"

CHECKED = {"compressors": [ZstdCodec(), Crc32cCodec()]}
"""The encoding of chunks: compressed, and with a checksum, so that a damaged one is found when it is read."""

RESUME = "start the sweep again as it was: it computes anew what is damaged and keeps the rest"
"""The remedy for damage in what is written chunk by chunk, and in the examples."""

FORMAT = 3
"""The store's format; it changes whenever an older store could not be read as if it were new."""


def exists(workdir: Path) -> bool:
    """Return whether there is a store in `workdir`."""
    return (workdir / NAME).is_dir()


def create(
    workdir: Path,
    dataset: xr.Dataset,
    chunk: int,
    sizes: Mapping[Hashable, int],
    options: Collection[str],
    beside: Mapping[str, Callable[[Path], object]] | None = None,
) -> None:
    """Write a frame as a new store in which nothing is finished, or nothing at all.

    Args:
      workdir: the directory that holds the store.
      dataset: from `frame`, its attributes set.
      chunk: prompts a chunk, the unit in which effects will be written.
      sizes: by dimension, of all variables.
      options: of `variables.shapes`.
      beside: functions that write other files of `workdir`, by name, so that the store is never there without them.
    """
    encoding = {name: {"chunks": tuple(v.sizes.values())} | CHECKED for name, v in dataset.variables.items()}
    encoding["finished"]["chunks"] = (chunk,)  # or processes would write to one file
    with files.signals_deferred(), files.whole(workdir / NAME) as part:
        dataset.to_zarr(part, mode="w-", encoding=encoding, zarr_format=metadata.ZARR_FORMAT, consolidated=False)
        group = zarr.open_group(str(part), mode="r+", zarr_format=metadata.ZARR_FORMAT)
        for name, shape in shapes(sizes, options).items():
            # Only described: whatever the number of prompts, chunks alone write values.
            variable = VARIABLES[name]
            group.create_array(
                name,
                shape=shape,
                chunks=(chunk, *shape[1:]),
                dtype=variable.dtype,
                fill_value=variable.missing,
                dimension_names=variable.dims,
                attributes=variable.attributes,
                compressors=CHECKED["compressors"],
            )
        digests.write(part, FILLED)
        for name, write_file in (beside or {}).items():
            files.write_whole(workdir / name, write_file)


def chunks(workdir: Path) -> list[slice]:
    """Return the runs of prompts that are written together.

    Raises:
      UserError: if the store cannot be read.
    """
    finished = open_effects(workdir)["finished"]
    size = finished.encoding["chunks"][0]
    return [slice(start, min(start + size, len(finished))) for start in range(0, len(finished), size)]


def discard(workdir: Path, beside: Sequence[str]) -> None:
    """Remove a store of which nothing is finished, and the files beside it."""
    with files.signals_deferred():
        for name in (*beside, NAME):
            files.remove(workdir / name)


def has_examples(workdir: Path, prompt_id: str) -> bool:
    """Return whether there are examples, among them the prompt that is asked for ("" asks for none in particular)."""
    try:
        examples = open_examples(workdir)
    except UserError:  # damaged ones are written anew
        return False
    return not prompt_id or prompt_id in examples["prompt_id"].values


def open_examples(workdir: str | Path) -> xr.Dataset:
    """Open single prompts' ablations with every replacement of each: (example, replacement, component).

    Raises:
      UserError: if they are not there or cannot be read.
    """
    path = Path(workdir) / EXAMPLES
    examples = _open(path, RESUME)
    digests.check(path, examples, remedy=RESUME)
    return examples


def write_examples(workdir: Path, dataset: xr.Dataset) -> None:
    """Write the examples, or nothing at all."""
    encoding = dict.fromkeys(dataset.variables, CHECKED)
    with files.signals_deferred(), files.whole(workdir / EXAMPLES) as part:
        dataset.to_zarr(part, mode="w-", encoding=encoding, zarr_format=metadata.ZARR_FORMAT, consolidated=False)
        digests.write(part)


def write(workdir: Path, chunk: slice, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the effects of one run of prompts (see `VARIABLES`), then its flags."""
    effects = xr.Dataset({name: (VARIABLES[name].dims, array) for name, array in arrays.items()})
    flags = xr.Dataset({"finished": ("prompt", np.ones(effects.sizes["prompt"], bool))})
    with files.signals_deferred():
        for part in (effects, flags):
            _write_region(workdir / NAME, chunk, part)


def sound(effects: xr.Dataset, chunk: slice) -> bool:
    """Return whether a chunk's effects are there and whole; `effects` is from `open_effects`."""
    try:
        if not effects["finished"][chunk].values.all():
            return False
        return not holes(effects.isel(prompt=chunk)[[name for name in VARIABLES if name in effects]].load())
    except Exception:  # of zarr and its codecs
        return False


def holes(effects: xr.Dataset) -> list[str]:
    """Name the variables with values missing, of effects in memory; values known not to be finite are not missing."""
    lost = effects[NON_FINITE]
    missing = [NON_FINITE] if (lost < 0).any() else []
    for name in VARIABLES.keys() & set(effects.data_vars) - {NON_FINITE}:
        if VARIABLES[name].option == CASCADE:  # what comes after the last cut of a prompt is empty
            missing += [name] if (effects[name] == NOTHING).any() else []
            continue
        empty = effects[name].isnull()
        if "replacement" in empty.dims:
            wrong = empty.sum("replacement") != lost
        elif "ablated" in empty.dims and not VARIABLES[name].clean:
            wrong = empty.any(empty.dims[2:]) & (lost == 0)
        else:
            wrong = empty & (lost.sum("ablated") == 0)
        missing += [name] if wrong.any() else []
    return sorted(missing)


def lost(workdir: Path, chunks: Sequence[slice]) -> int:
    """Count the interventions in some chunks whose values are not finite.

    Raises:
      UserError: if they cannot be read.
    """
    counts = open_effects(workdir)[NON_FINITE]
    try:
        return sum(int(counts[chunk].sum()) for chunk in chunks)
    except Exception as error:
        raise digests.unreadable(workdir / NAME, error, RESUME) from error


def forget(workdir: Path, chunk: slice) -> None:
    """Mark a chunk as not finished, whatever is in its place, so that it is computed again.

    Raises:
      UserError: if it cannot be.
    """
    flags = xr.Dataset({"finished": ("prompt", np.zeros(chunk.stop - chunk.start, bool))})
    with files.signals_deferred():
        _write_region(workdir / NAME, chunk, flags)


def seal(workdir: Path) -> None:
    """Gather the metadata of a finished store in one place, so that opening it reads one file."""
    with files.signals_deferred(), warnings.catch_warnings():
        # That it is not in zarr's specification yet is no matter: without it, readers take the long way.
        warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
        zarr.consolidate_metadata(str(workdir / NAME), zarr_format=metadata.ZARR_FORMAT)


def open_effects(workdir: str | Path) -> xr.Dataset:
    """Open the effects of a sweep, finished or not (see the variable `finished`).

    Raises:
      UserError: if there is no store, or it cannot be read.
    """
    path = Path(workdir) / NAME
    dataset = _open(path)
    if "protocol" not in dataset.attrs or "format" not in dataset.attrs:
        raise UserError(f"{path}: is not a result store of this version of hydra_jax; sweep into another --workdir")
    if dataset.attrs["format"] != FORMAT:
        raise UserError(
            f"{path}: is of format {dataset.attrs['format']}, this version reads {FORMAT}; sweep into another --workdir"
        )
    digests.check(path, dataset, FILLED)
    return dataset


def load_effects(workdir: str | Path) -> xr.Dataset:
    """Load a sweep's finished prompts into memory, checked to be whole.

    Prompts with values that are not finite are left out; the attribute `left_out` says how many.

    Raises:
      UserError: if there is no store, it cannot be read, none of it is finished, or parts of it are missing.
    """
    path = Path(workdir) / NAME
    effects = open_effects(workdir)
    absent = [name for name, variable in VARIABLES.items() if name not in effects and not variable.option]
    if absent:
        raise UserError(f"{path}: has no {absent[0]}; {metadata.ASIDE}")
    try:
        finished = np.flatnonzero(effects["finished"].values)
        effects = effects.isel(prompt=finished).load()
        missing = holes(effects)
    except Exception as error:
        raise digests.unreadable(path, error, RESUME) from error
    if not finished.size:
        raise UserError(f"{path}: none of its prompts is finished; go on with the sweep first")
    if missing:
        raise UserError(f"{path}: {missing[0]} has holes; {RESUME}")
    return finite(effects, str(path))


def finite(effects: xr.Dataset, where: str) -> xr.Dataset:
    """Leave out the prompts with values that are not finite; the attribute `left_out` says how many they were.

    Raises:
      UserError: if none is left.
    """
    kept = np.flatnonzero((effects[NON_FINITE] == 0).all("ablated").values)
    if not kept.size:
        raise UserError(f"{where}: no prompt's values are all finite; sweep in float32")
    left_out = effects.sizes["prompt"] - len(kept)
    return effects.isel(prompt=kept).assign_attrs(left_out=left_out) if left_out else effects


def _write_region(path: Path, chunk: slice, part: xr.Dataset) -> None:
    part.to_zarr(path, region={"prompt": chunk}, zarr_format=metadata.ZARR_FORMAT, consolidated=False)


def _open(path: Path, remedy: str = metadata.ASIDE) -> xr.Dataset:
    if not path.is_dir():
        raise UserError(f"{path}: is not there; run `python -m launch.sweep --workdir={path.parent}` first")
    metadata.check(path, remedy)
    try:
        with files.signals_deferred():
            return xr.open_zarr(path, consolidated=False, chunks=None, zarr_format=metadata.ZARR_FORMAT)
    except Exception as error:
        raise digests.unreadable(path, error, remedy) from error


def protocol_attributes(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return a protocol as a store's attributes: JSON, its SHA-256, and the store's format."""
    text = json.dumps(protocol, sort_keys=True)
    return {"protocol": text, "protocol_sha256": hashlib.sha256(text.encode()).hexdigest(), "format": FORMAT}


def check_protocol(dataset: xr.Dataset, protocol: Mapping[str, Any], where: Path) -> None:
    """Refuse to go on with results of another protocol.

    Raises:
      UserError: if the store's protocol differs; it names every setting that does.
    """
    differing = differences(json.loads(dataset.attrs.get("protocol", "{}")), protocol)
    if differing:
        raise UserError(f"{where}: holds results of another protocol ({differing}); give another --workdir")
