"""Safetensors files read part by part into memory that is used again: neither mapped, nor copied more than once.

The library's readers copy each tensor into new memory, or map the file, which then counts as this process' memory; for
layers that are read over and over both cost more than the reading. The library has checked the headers before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from hydra_jax.errors import UserError, shown

DTYPES = {"BF16": jnp.dtype("bfloat16"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
LENGTH = 8
"""Bytes that say how long the header after them is."""


class Shards:
    """Some safetensors files, their headers read; a tensor is there until others are read."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Read the headers of the files at `paths`.

        Raises:
          ValueError: if one is damaged.
        """
        self._places: dict[str, tuple[Path, int, Mapping[str, Any]]] = {}
        for path in paths:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(LENGTH), "little")
                if length > path.stat().st_size:
                    raise ValueError(f"the header of {path.name} is longer than the file")
                header = json.loads(file.read(length))
            for name, stated in header.items():
                if name != "__metadata__":
                    self._places[name] = path, LENGTH + length, stated
        self._memory = np.empty(0, np.uint8)
        self._used = 0

    def begin(self, names: Iterable[str]) -> None:
        """Make room for the tensors of these names, all of which may be read then; what was read before is lost."""
        wanted = sum(stop - start + 64 for start, stop in map(self._span, names))
        if wanted > len(self._memory):
            self._memory = np.empty(wanted, np.uint8)
        self._used = 0

    def read(self, name: str) -> np.ndarray:
        """Read a tensor into the room that `begin` made.

        Raises:
          UserError: if it holds no floats.
          ValueError: if the file is damaged.
        """
        path, first, stated = self._places[name]
        if stated["dtype"] not in DTYPES:
            raise UserError(
                f"{path}: tensor {name} holds {shown(stated['dtype'])}, not floats; use unquantised weights"
            )
        start, stop = self._span(name)
        dtype, shape = DTYPES[stated["dtype"]], tuple(stated["shape"])
        if math.prod(shape) * dtype.itemsize != stop - start:
            raise ValueError(f"tensor {shown(name)} has {stop - start:,} bytes, not those of its shape")
        into = self._memory[self._used : self._used + stop - start]
        self._used += -(-(stop - start) // 64) * 64
        with path.open("rb", buffering=0) as file:
            file.seek(first + start)
            rest = memoryview(into.data)
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise ValueError(f"tensor {shown(name)} ends before its end")
                rest = rest[count:]
        return into.view(dtype).reshape(shape)

    def _span(self, name: str) -> tuple[int, int]:
        start, stop = self._places[name][2]["data_offsets"]
        return start, stop
