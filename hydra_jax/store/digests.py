"""SHA-256 sums of a result store's files, kept in its attributes.

A chunk has a checksum of its own, but that finds neither a missing chunk nor one that damaged metadata misread.
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
from hydra_jax.store.metadata import ASIDE, ZARR_FORMAT

DIGESTS = "files_sha256"
"""The attribute that has the sums."""


def write(path: Path, filled: Sequence[str] = ()) -> None:
    """Write the sums of a store; those of the variables `filled` leave out the chunks, which are still to come."""
    group = zarr.open_group(path, mode="r+", zarr_format=ZARR_FORMAT)
    group.attrs[DIGESTS] = _digests(path, group.attrs, filled)


def check(path: Path, dataset: xr.Dataset, filled: Sequence[str] = (), remedy: str = ASIDE) -> None:
    """Compare a store, opened as `dataset`, with its sums.

    Args:
      path: the store's.
      dataset: the store, opened.
      filled: as in `write`.
      remedy: the last words of a refusal.

    Raises:
      UserError: if the store has changed; it names a variable that did.
    """
    try:
        written = json.loads(dataset.attrs[DIGESTS])
        current = json.loads(_digests(path, dataset.attrs, filled))
        wrong = sorted(name for name in written.keys() | current if written.get(name) != current.get(name))
    except Exception as error:
        raise unreadable(path, error, remedy) from error
    if wrong:
        raise UserError(f"{path}: {shown(wrong[0])} is damaged or missing; {remedy}")


def unreadable(path: Path, error: Exception, remedy: str = ASIDE) -> UserError:
    """Return the one-line form, with a remedy, of whatever zarr and its codecs raise on a damaged store."""
    return UserError(f"{path}: cannot be read ({reason(error)}); {remedy}")


def _digests(path: Path, attributes: Mapping[str, Any], filled: Sequence[str]) -> str:
    """Return, as JSON, the SHA-256 of the attributes and of every variable's files, without chunks if `filled`."""
    # A dataset that xarray has opened does not show "coordinates".
    kept = {name: value for name, value in attributes.items() if name not in (DIGESTS, "coordinates")}
    digests = {"attributes": hashlib.sha256(json.dumps(kept, sort_keys=True).encode())}
    for variable in filter(Path.is_dir, path.iterdir()):
        paths = [variable / "zarr.json"] if variable.name in filled else sorted(variable.rglob("*"))
        lines = [f"{path.relative_to(variable).as_posix()} {sha256(path)}\n" for path in paths if path.is_file()]
        digests[variable.name] = hashlib.sha256("".join(lines).encode())
    return json.dumps({name: digest.hexdigest() for name, digest in digests.items()})
