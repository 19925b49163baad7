"""Clean runs that are kept: of every prompt what a sweep needs to know, and what ablations put in another's place.

Of a sweep into a directory they are files, read where they are needed: whatever the number of prompts, memory
holds what the system chooses to cache. A part is two files, its values and, written last, what they are of.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from hydra_jax.engine.cluster import Cluster
from hydra_jax.store import files

DIRECTORY = "bank"
COLUMNS = {"top": np.int64, "target": np.int64, "probability": np.float32}
BLOCK = 1 << 24
"""Bytes of a file that are summed at once."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt's clean run.

    Attributes:
      top: the most likely next token.
      target: the token that is read.
      probability: its probability.
      part: the bank's part that has its values; -1 where they are not kept.
      place: in that part.
    """

    top: int
    target: int
    probability: float
    part: int = -1
    place: int = -1


class Bank:
    """Values [U, E] of prompts, in parts, and their rows by id.

    Args:
      dtype: of the values.
      directory: where parts are kept as files; None for in memory.
      protocol: a hash of all that values depend on: parts of another are not read.
    """

    def __init__(self, dtype: str, directory: Path | None = None, protocol: str = ""):
        self.rows: dict[str, Row] = {}
        self._dtype, self._directory, self._protocol = jnp.dtype(dtype), directory, protocol
        self._parts: list[np.ndarray] = []
        self._names: set[str] = set()

    def add(self, ids: Sequence[str], columns: dict[str, np.ndarray], kept: np.ndarray, values: np.ndarray) -> None:
        """Take in a part.

        Args:
          ids: of P prompts.
          columns: the fields of a row, [P] each.
          kept: [P] bool, whose values are.
          values: [kept, U, E], theirs.
        """
        values = np.ascontiguousarray(values.astype(self._dtype))
        if self._directory is None:
            self._take_in(ids, columns, kept, values)
            return
        self._directory.mkdir(exist_ok=True)
        name = hashlib.sha256("\n".join([self._protocol, *ids]).encode()).hexdigest()[:24]
        path = self._directory / name
        stored = values.view(np.uint8)
        files.write_whole(path.with_suffix(".npy"), lambda part: _save(part, stored))
        described = columns | {
            "ids": np.array(ids),
            "kept": kept,
            "protocol": np.array(self._protocol),
            "crc": np.array(zlib.crc32(stored.reshape(-1).data) if stored.size else 0),
        }
        files.write_whole(path.with_suffix(".npz"), lambda part: _save(part, described))

    def refresh(self, cluster: Cluster) -> None:
        """Read the parts that all processes have written by now; damaged ones are removed."""
        if self._directory is None:
            return
        # Each says what it sees, as on a shared file system not all see the same yet.
        seen = cluster.gather([path.stem for path in self._directory.glob("*.npz") if path.stem not in self._names])
        here = sorted(set().union(*seen))
        for name in here:
            files.await_path((self._directory / name).with_suffix(".npz"))
        sound = {name: self._described(name) for name in cluster.share(here)}
        damaged = [name for name, described in sound.items() if described is None]
        bad = set().union(*cluster.gather(damaged))
        for name in damaged:
            for suffix in (".npz", ".npy"):
                (self._directory / name).with_suffix(suffix).unlink(missing_ok=True)
        cluster.wait()
        for name in here:
            if name in bad:
                continue
            described = sound.get(name) or self._described(name, check=False)
            if described is None:
                continue
            values = np.load((self._directory / name).with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
            self._names.add(name)
            columns = {column: described[column] for column in COLUMNS}
            self._take_in(described["ids"].tolist(), columns, described["kept"], values)

    def where(self, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """[N] parts, and places in them, of N prompts whose values are kept."""
        rows = [self.rows[name] for name in ids]
        return np.array([row.part for row in rows], int), np.array([row.place for row in rows], int)

    def take(self, parts: np.ndarray, places: np.ndarray, unit: int | slice = slice(None)) -> np.ndarray:
        """[N, E], one unit's values in N prompts; or [N, U, E], all of them."""
        first = self._parts[parts[0]]
        out = np.empty((len(parts), *first[0, unit].shape), first.dtype)
        for part in np.unique(parts):
            here = np.flatnonzero(parts == part)
            out[here] = self._parts[part][places[here], unit]
        return out.view(self._dtype)

    def values(self, ids: Sequence[str]) -> np.ndarray:
        """[N, U, E], all values in N prompts."""
        return self.take(*self.where(ids))

    def remove(self) -> None:
        """Forget all, files too."""
        self.rows, self._parts, self._names = {}, [], set()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _take_in(self, ids: Sequence[str], columns: dict[str, Any], kept: np.ndarray, values: np.ndarray) -> None:
        places = np.where(kept, np.cumsum(kept) - 1, -1)
        for row, name in enumerate(ids):
            found = {column: columns[column][row].item() for column in COLUMNS}
            self.rows[name] = Row(**found, part=len(self._parts) if kept[row] else -1, place=int(places[row]))
        self._parts.append(values)

    def _described(self, name: str, check: bool = True) -> dict[str, np.ndarray] | None:
        """What a part is of; None if it is damaged, or of another protocol."""
        assert self._directory is not None
        path = self._directory / name
        try:
            # Opened here, as numpy leaves a damaged archive open.
            with path.with_suffix(".npz").open("rb") as file, np.load(file, allow_pickle=False) as archive:
                described = dict(archive)
            values = np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
            whole = str(described["protocol"]) == self._protocol and len(values) == described["kept"].sum()
            if whole and check:
                whole = _crc(values) == described["crc"]
        except Exception:  # numpy and zipfile raise all kinds of a damaged file
            return None
        return described if whole else None


def _save(path: Path, what: Any) -> None:
    with path.open("wb") as file:  # numpy adds endings to names, not to files
        np.savez(file, **what) if isinstance(what, dict) else np.save(file, what)


def _crc(values: np.ndarray) -> int:
    total, flat = 0, values.reshape(-1)
    for start in range(0, len(flat), BLOCK):
        total = zlib.crc32(np.ascontiguousarray(flat[start : start + BLOCK]).data, total)
    return total
