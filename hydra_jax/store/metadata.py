"""The zarr metadata that a result store may have, checked before anything is decoded.

A store may come from a stranger, and decoding runs the code of whichever codec its metadata names: zarr format 2
has one that unpickles. Only format 3 is read, and of it only the codecs and data types that this project writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from hydra_jax.errors import UserError, reason, shown

ZARR_FORMAT: Literal[3] = 3

ASIDE = "leave this one as it is and sweep into another --workdir"
"""The remedy for a store that no sweep can go on from: what it still holds is kept."""

CODECS = ("bytes", "vlen-utf8", "zstd", "crc32c")
DATA_TYPES = ("bool", "int16", "int64", "float32", "float64", "string")
CHUNKS = {"chunk_grid": "regular", "chunk_key_encoding": "default"}
"""The parts of an array's metadata that may be of one kind only, and that kind."""

DOCUMENT = "zarr.json"
MOST_BYTES = 1 << 26
"""The largest metadata document, in bytes, that is read."""


def check(path: Path, remedy: str = ASIDE) -> None:
    """Refuse a store whose metadata names anything that this project does not write; no chunk is read.

    Args:
      path: the directory of the zarr group.
      remedy: the last words of a refusal of a damaged one.

    Raises:
      UserError: if the store is not of zarr format 3, or an array has a codec, data type or layout not listed above.
    """
    if not (path / DOCUMENT).is_file():
        raise UserError(
            f"{path}: is not of zarr format {ZARR_FORMAT}, and others are not opened, as they can run code; sweep into"
            " another --workdir"
        )
    if _document(path, remedy).get("node_type") != "group":
        raise UserError(f"{path}: is not a zarr group; sweep into another --workdir")
    for array in sorted(filter(Path.is_dir, path.iterdir())):
        if (array / DOCUMENT).is_file():
            _check_array(array, _document(array, remedy))


def _document(node: Path, remedy: str) -> Mapping[str, Any]:
    path = node / DOCUMENT
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"{DOCUMENT} has more than {MOST_BYTES >> 20} MiB")
        document = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{node}: cannot be read ({reason(error)}); {remedy}") from error
    if not isinstance(document, Mapping) or document.get("zarr_format") != ZARR_FORMAT:
        raise UserError(f"{path}: is not of zarr format {ZARR_FORMAT}; sweep into another --workdir")
    return document


def _check_array(path: Path, document: Mapping[str, Any]) -> None:
    def refuse(field: str, value: object) -> UserError:
        return UserError(
            f"{path}: has the {field} {shown(value)}, which hydra_jax does not write; sweep into another --workdir"
        )

    if document.get("node_type") != "array":
        raise refuse("node type", document.get("node_type"))
    if document.get("data_type") not in DATA_TYPES:
        raise refuse("data type", document.get("data_type"))
    codecs = document.get("codecs")
    for codec in codecs if isinstance(codecs, list) and codecs else [codecs]:
        if _name(codec) not in CODECS:
            raise refuse("codec", codec)
    for key, written in CHUNKS.items():
        if _name(document.get(key)) != written:
            raise refuse(key.replace("_", " "), document.get(key))
    if document.get("storage_transformers"):
        raise refuse("storage transformers", document["storage_transformers"])


def _name(extension: object) -> object:
    """Return the name in a zarr extension, which is spelt as an object; None where it has none."""
    return extension.get("name") if isinstance(extension, Mapping) else None
