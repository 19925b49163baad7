"""The header of a GGUF file: its metadata, and where its tensors are.

A plain walk over the mapped file, little-endian, versions 2 and 3. Nothing in the file is believed: a length is
compared with what is left of the file before anything of that size is made.
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from hydra_jax.errors import UserError, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
"""Every tensor's first byte is at a multiple of this, unless `general.alignment` says otherwise."""

MOST_ALIGNMENT = 1 << 20
MOST_DIMENSIONS = 4
MOST_NESTED = 4
"""The most arrays within one another."""

NUMBERS = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "", "", "<u8", "<i8", "<f8")
"""Types of values by their numbers in the file, as numpy's; of STRING and ARRAY there is none."""

STRING, ARRAY = 8, 9
LENGTH = struct.Struct("<Q")
NUMBER = struct.Struct("<I")
LEAST_PAIR = LENGTH.size + NUMBER.size + 1
"""Bytes of the shortest key with its value."""

LEAST_TENSOR = 2 * LENGTH.size + 2 * NUMBER.size
LEAST_ARRAY = LENGTH.size + NUMBER.size


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header describes it.

    Attributes:
      name: as published.
      shape: in the file's order, the fastest axis first.
      kind: the number of its type, of `gguf.GGMLQuantizationType`.
      start: its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclasses.dataclass(frozen=True)
class Header:
    """A file's header.

    Attributes:
      data: the whole file, mapped.
      metadata: values by key; arrays are lists.
      tensors: by name.
    """

    data: mmap.mmap
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read(path: Path) -> Header:
    """Read the header of a file; nothing of its tensors is.

    Args:
      path: of the file.

    Raises:
      UserError: if it is of a version or byte order that is not read.
      ValueError: if it is no GGUF file, or truncated or damaged.
      OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        walk = _Walk(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), len(MAGIC))
    version = walk.number()
    if version and version & 0xFFFF == 0:
        raise UserError(f"{path}: is a big-endian file, little-endian ones are read; fetch one of those")
    if version not in VERSIONS:
        raise UserError(f"{path}: is of GGUF's version {version}, versions 2 and 3 are read; fetch one of those")
    tensors, pairs = walk.count(0), walk.count(LEAST_PAIR)
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = walk.text()
        if key in metadata:
            raise ValueError(f"the key {shown(key)} is there twice")
        metadata[key] = walk.value(walk.number())
    walk.fits(tensors, LEAST_TENSOR)
    described = [walk.tensor() for _ in range(tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {shown(alignment)}, not a power of two")
    first = -(-walk.at // alignment) * alignment
    placed: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in described:
        if name in placed:
            raise ValueError(f"the tensor {shown(name)} is there twice")
        if offset % alignment:
            raise ValueError(f"the tensor {shown(name)} is not aligned to {alignment} bytes")
        placed[name] = TensorInfo(name, shape, kind, first + offset)
    return Header(walk.data, metadata, placed)


class _Walk:
    """A walk over mapped bytes; `at` is how far it is."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data = data
        self.at = at
        self.size = len(data)

    def fits(self, count: int, least: int) -> None:
        """Refuse `count` things of at least so many bytes each, where they cannot all be in the rest of the file."""
        if count * least > self.size - self.at:
            raise ValueError(f"{count:,} entries at byte {self.at:,} of {self.size:,} do not fit")

    def count(self, least: int) -> int:
        """Take how many things of at least so many bytes follow."""
        self.fits(1, LENGTH.size)
        (count,) = LENGTH.unpack_from(self.data, self.at)
        self.at += LENGTH.size
        self.fits(count, least)
        return count

    def number(self) -> int:
        """Take a 32-bit number: a type, a version, a number of dimensions."""
        self.fits(1, NUMBER.size)
        (number,) = NUMBER.unpack_from(self.data, self.at)
        self.at += NUMBER.size
        return number

    def text(self) -> str:
        """Take a string."""
        return self.texts(1)[0]

    def texts(self, count: int) -> list[str]:
        """Take strings, one pass over them with no more calls than they need: a vocabulary has 262,144."""
        self.fits(count, LENGTH.size)
        data, size, at, length_at = self.data, self.size, self.at, LENGTH.unpack_from
        texts = []
        for _ in range(count):
            start = at + 8
            if start > size:
                raise ValueError(f"a string at byte {at:,} of {size:,} has no end")
            at = start + length_at(data, at)[0]
            if at > size:
                raise ValueError(f"a string at byte {start:,} of {size:,} has no end")
            texts.append(str(data[start:at], "utf-8"))
        self.at = at
        return texts

    def numbers(self, kind: int, count: int) -> list[Any]:
        """Take numbers of a type."""
        type = np.dtype(NUMBERS[kind] if kind < len(NUMBERS) and NUMBERS[kind] else "V0")
        if not type.itemsize:
            raise ValueError(f"values at byte {self.at:,} are of an unknown type, {kind}")
        self.fits(count, type.itemsize)
        values = np.frombuffer(self.data, type, count, self.at)
        self.at += values.nbytes
        return (values.view(np.uint8) != 0).tolist() if type.kind == "b" else values.tolist()

    def value(self, kind: int, depth: int = 0) -> Any:
        """Take a value of a type."""
        if kind == ARRAY:
            return self.array(depth + 1)
        return self.text() if kind == STRING else self.numbers(kind, 1)[0]

    def array(self, depth: int) -> list[Any]:
        """Take an array, its type and its length before it."""
        if depth > MOST_NESTED:
            raise ValueError(f"arrays at byte {self.at:,} are nested in more than {MOST_NESTED}")
        kind = self.number()
        count = self.count(1)
        if kind == STRING:
            return self.texts(count)
        if kind != ARRAY:
            return self.numbers(kind, count)
        self.fits(count, LEAST_ARRAY)
        return [self.array(depth + 1) for _ in range(count)]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Take a tensor's name, shape, type, and offset from the first of them."""
        name, dimensions = self.text(), self.number()
        if not 0 < dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"the tensor {shown(name)} has {dimensions} dimensions")
        shape = tuple(self.count(0) for _ in range(dimensions))
        return name, shape, self.number(), self.count(0)
