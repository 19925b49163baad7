"""Safetensors files, read tensor by tensor: neither mapped, nor copied more than once.

The library's readers map the file, which ends the process if the file is cut meanwhile, and copy each tensor into new
memory; for layers that are read over and over both cost more than the reading. Headers are checked by the library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from hydra_jax.errors import UserError, shown
from hydra_jax.weights.faults import faults_of, fill

DTYPES = {"BF16": jnp.dtype("bfloat16"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
LENGTH = 8
"""Bytes that say how long the header after them is."""

ALIGNED = 64
"""Bytes at a multiple of which each tensor begins in memory."""


class Shards:
    """Some safetensors files, their headers read."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Read the headers of the files at `paths`.

        Raises:
          UserError: if one is damaged.
        """
        self._places: dict[str, tuple[Path, int, Mapping[str, Any]]] = {}
        for path in paths:
            with faults_of(path):
                with safetensors.safe_open(path, framework="numpy"):
                    pass  # it refuses a damaged one
                with path.open("rb") as file:
                    length = int.from_bytes(file.read(LENGTH), "little")
                    header = json.loads(file.read(length))
                header.pop("__metadata__", None)
                self._places |= {name: (path, LENGTH + length, stated) for name, stated in header.items()}
        self._memory: np.ndarray | None = None
        self._used = 0

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self._places)

    def begin(self, names: Iterable[str]) -> None:
        """Make room for the tensors of these names, each to be read once, by one thread; those of before are lost.

        Until this is called the first time, a tensor that is read has memory of its own.
        """
        wanted = sum(-(-self._size(name) // ALIGNED) * ALIGNED for name in names)
        if self._memory is None or wanted > len(self._memory):
            self._memory = np.empty(wanted, np.uint8)
        self._used = 0

    def read(self, name: str) -> np.ndarray:
        """Read a tensor.

        Raises:
          UserError: if it holds no floats, or the file is damaged.
        """
        path, first, stated = self._places[name]
        if stated["dtype"] not in DTYPES:
            raise UserError(
                f"{path}: tensor {name} holds {shown(stated['dtype'])}, not floats of 16 bits or more; use unquantised"
                " weights"
            )
        dtype, shape, size = DTYPES[stated["dtype"]], tuple(stated["shape"]), self._size(name)
        with faults_of(path):
            if math.prod(shape) * dtype.itemsize != size:
                raise ValueError(f"tensor {shown(name)} has {size:,} bytes, not those of its shape")
            into = self._room(size)
            with path.open("rb", buffering=0) as file:
                file.seek(first + stated["data_offsets"][0])
                fill(into, file)
        return into.view(dtype).reshape(shape)

    def _room(self, size: int) -> np.ndarray:
        """Return memory for a tensor of so many bytes."""
        if self._memory is None:
            return np.empty(size, np.uint8)
        start = self._used
        self._used += -(-size // ALIGNED) * ALIGNED
        return self._memory[start : start + size]

    def _size(self, name: str) -> int:
        start, stop = self._places[name][2]["data_offsets"]
        return stop - start
