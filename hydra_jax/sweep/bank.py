"""Clean runs kept by prompt: the facts that a sweep needs, and the values that ablations use as replacements.

A sweep into a directory keeps them as files, read where they are needed: however many the prompts, memory holds
only what the system chooses to cache. A part is two files, its values and, written last, their description. Values
are memory-mapped rather than a zarr array, of which a chunk has to be decoded whole for every row that is gathered.
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
COLUMNS = {"top": np.int64, "top_probability": np.float32, "answer": np.int64, "answer_probability": np.float32}
BLOCK = 1 << 24
"""The number of bytes that a checksum takes in at once."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt's clean run.

    Attributes:
      top: the most likely next token.
      top_probability: its probability.
      answer: the answer's first token, in the spelling that the model prefers; -1 where there is none.
      answer_probability: its probability; NaN where there is none.
      part: the number of the bank's part that has the prompt's values; -1 where they are not kept.
      index: the index of the values in that part; -1 where they are not kept.
    """

    top: int
    top_probability: float
    answer: int
    answer_probability: float
    part: int = -1
    index: int = -1


class Bank:
    """The rows of prompts by id, and their values [F] in parts: those of all ablated components, one after another.

    Args:
      dtype: the values' type.
      directory: where parts are kept as files; None to keep them in memory.
      protocol: a hash of all that values depend on: parts of another protocol are not read.
    """

    def __init__(self, dtype: str, directory: Path | None = None, protocol: str = ""):
        self.rows: dict[str, Row] = {}
        self._dtype, self._directory, self._protocol = jnp.dtype(dtype), directory, protocol
        self._parts: list[np.ndarray] = []
        self._names: set[str] = set()

    def add(self, ids: Sequence[str], columns: dict[str, np.ndarray], kept: np.ndarray, values: np.ndarray) -> None:
        """Add a part; where it is kept as files, `refresh` takes it in.

        Args:
          ids: the ids of P prompts.
          columns: the prompts' fields by name (see COLUMNS), [P] each.
          kept: [P] bool, whether a prompt's values are kept.
          values: [K, F], the values of the K prompts for which they are.
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
        description = columns | {
            "ids": np.array(ids),
            "kept": kept,
            "protocol": np.array(self._protocol),
            "crc": np.array(zlib.crc32(stored.reshape(-1).data) if stored.size else 0),
        }
        files.write_whole(path.with_suffix(".npz"), lambda part: _save(part, description))

    def refresh(self, cluster: Cluster) -> None:
        """Take in the parts that all processes have written by now, and remove damaged ones."""
        if self._directory is None:
            return
        # Every process names the parts it sees: on a shared file system some may not see all of them yet.
        seen = cluster.gather([path.stem for path in self._directory.glob("*.npz") if path.stem not in self._names])
        new = sorted(set().union(*seen))
        for name in new:
            files.await_path((self._directory / name).with_suffix(".npz"))
        checked = {name: self._describe(name) for name in cluster.share(new)}
        damaged = [name for name, description in checked.items() if description is None]
        damaged_anywhere = set().union(*cluster.gather(damaged))
        for name in damaged:
            for suffix in (".npz", ".npy"):
                (self._directory / name).with_suffix(suffix).unlink(missing_ok=True)
        cluster.wait()
        for name in new:
            if name in damaged_anywhere:
                continue
            description = checked.get(name) or self._describe(name, check=False)
            if description is None:
                continue
            values = np.load((self._directory / name).with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
            self._names.add(name)
            columns = {column: description[column] for column in COLUMNS}
            self._take_in(description["ids"].tolist(), columns, description["kept"], values.view(self._dtype))

    def where(self, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the parts [N] that have the values of N prompts, and the values' indices [N] in them."""
        rows = [self.rows[name] for name in ids]
        return np.array([row.part for row in rows], int), np.array([row.index for row in rows], int)

    def take(self, parts: np.ndarray, indices: np.ndarray, of: slice = slice(None)) -> np.ndarray:
        """Return a component's values [N, E], or those of all, in N prompts; for arguments see `where`."""
        first = self._parts[parts[0]]
        out = np.empty((len(parts), *first[0, of].shape), first.dtype)
        for part in np.unique(parts):
            wanted = np.flatnonzero(parts == part)
            out[wanted] = self._parts[part][indices[wanted], of]
        return out

    def values(self, ids: Sequence[str]) -> np.ndarray:
        """Return all values [N, F] of N prompts."""
        return self.take(*self.where(ids))

    def remove(self) -> None:
        """Forget everything, and delete the files."""
        self.rows, self._parts, self._names = {}, [], set()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _take_in(self, ids: Sequence[str], columns: dict[str, Any], kept: np.ndarray, values: np.ndarray) -> None:
        indices = np.where(kept, np.cumsum(kept) - 1, -1)
        for number, prompt_id in enumerate(ids):
            fields = {column: columns[column][number].item() for column in COLUMNS}
            part = len(self._parts) if kept[number] else -1
            self.rows[prompt_id] = Row(**fields, part=part, index=int(indices[number]))
        self._parts.append(values)

    def _describe(self, name: str, check: bool = True) -> dict[str, np.ndarray] | None:
        """Read a part's description; None if the part is damaged, or of another protocol."""
        assert self._directory is not None
        path = self._directory / name
        try:
            # numpy would leave a damaged archive open, had it opened the file itself.
            with path.with_suffix(".npz").open("rb") as file, np.load(file, allow_pickle=False) as archive:
                description = dict(archive)
            values = np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
            whole = str(description["protocol"]) == self._protocol and len(values) == description["kept"].sum()
            if whole and check:
                whole = _crc(values) == description["crc"]
        except Exception:  # numpy and zipfile raise errors of all kinds where a file is damaged
            return None
        return description if whole else None


def _save(path: Path, arrays: Any) -> None:
    with path.open("wb") as file:  # numpy adds endings to names, not to files
        np.savez(file, **arrays) if isinstance(arrays, dict) else np.save(file, arrays)


def _crc(values: np.ndarray) -> int:
    total, flat = 0, values.reshape(-1)
    for start in range(0, len(flat), BLOCK):
        total = zlib.crc32(np.ascontiguousarray(flat[start : start + BLOCK]).data, total)
    return total
