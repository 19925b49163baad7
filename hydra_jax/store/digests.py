"""What of a result store must not change, as sums in its attributes: a chunk's checksum finds only a damaged chunk.

That one is gone, or read as something else by damaged metadata, it does not find.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xarray as xr
import zarr

from hydra_jax.errors import UserError, reason, shown
from hydra_jax.store.files import sha256
from hydra_jax.store.metadata import ZARR_FORMAT

DIGESTS = "files_sha256"
"""The attribute that has them."""


def write(path: Path, filled: Sequence[str] = ()) -> None:
    """Sum up a store; of its variables `filled`, whose chunks are still to be written, without these."""
    group = zarr.open_group(path, mode="r+", zarr_format=ZARR_FORMAT)
    group.attrs[DIGESTS] = _digests(path, group.attrs, filled)


def check(path: Path, dataset: xr.Dataset, filled: Sequence[str] = ()) -> None:
    """Compare a store, opened as `dataset`, with its sums.

    Raises:
      UserError: if it is not what it was, with the variable that differs.
    """
    try:
        written = json.loads(dataset.attrs[DIGESTS])
        found = json.loads(_digests(path, dataset.attrs, filled))
        wrong = sorted(name for name in written.keys() | found if written.get(name) != found.get(name))
    except Exception as error:
        raise unreadable(path, error) from error
    if wrong:
        raise UserError(f"{path}: {shown(wrong[0])} is damaged or missing; delete the store and sweep again")


def unreadable(path: Path, error: Exception) -> UserError:
    """Whatever zarr and its codecs raise of a damaged store, in one line."""
    return UserError(f"{path}: cannot be read ({reason(error)}); delete it and sweep again")


def _digests(path: Path, attributes: Mapping[str, Any], filled: Sequence[str]) -> str:
    """SHA-256 of every variable's files, of those `filled` without chunks, and of the attributes, as JSON."""
    # xarray keeps "coordinates" to itself.
    kept = {name: value for name, value in attributes.items() if name not in (DIGESTS, "coordinates")}
    found = {"attributes": hashlib.sha256(json.dumps(kept, sort_keys=True).encode())}
    for variable in filter(Path.is_dir, path.iterdir()):
        every = [variable / "zarr.json"] if variable.name in filled else sorted(variable.rglob("*"))
        lines = [f"{file.relative_to(variable).as_posix()} {sha256(file)}\n" for file in every if file.is_file()]
        found[variable.name] = hashlib.sha256("".join(lines).encode())
    return json.dumps({name: digest.hexdigest() for name, digest in found.items()})
