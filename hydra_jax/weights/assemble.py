"""A model's parameters from published tensors: each read, checked, put into our form, and laid on its devices."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from hydra_jax.engine import mesh as meshes
from hydra_jax.errors import UserError
from hydra_jax.models import transformer
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import Params
from hydra_jax.weights.families import Family, Form

READERS = 4
"""The most layers of a parameter that are read at once."""

READ_BYTES = 1 << 26
"""Bytes that layers read at once may take besides their place, in float32: a large model's are read one by one."""


LAYERS = "layers/"
"""The paths of parameters that each layer has begin so."""


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Published tensors, to be read by name.

    Attributes:
      path: of the file or directory; or a model in memory, in words.
      read: a published name -> the array, of any float type, but float32 where it has one axis; called by several
        threads.
      names: names as a family's table has them -> as published.
      form: of the arrays.
      column: of the table's names.
      ignored: patterns of the names that are not needed.
      remedy: of tensors that are not what they should be.
    """

    path: Path | str
    read: Callable[[str], np.ndarray]
    names: Mapping[str, str]
    form: Form
    column: int
    ignored: tuple[str, ...]
    remedy: str = "fetch it again"


class Parameters:
    """A model's parameters as they are published: each found, checked and put into our form when it is asked for."""

    def __init__(self, config: ModelConfig, family: Family, source: Tensors) -> None:
        """Find every parameter that the config calls for; none is read.

        Args:
          config: of the model.
          family: of the model.
          source: where the parameters are.

        Raises:
          UserError: if a tensor is missing, or is one too many.
        """
        self._config, self._source = config, source
        self.expected = transformer.flat(transformer.layout(config).weights)
        table = {ours: row[source.column] for ours, row in family.names.items()}
        order = list(table)
        # In the table's order, which is that of fused parameters.
        self._published = {
            path: _published(table, path) for path in sorted(self.expected, key=lambda p: order.index(_module(p)))
        }
        ignored = (*source.ignored, *([re.escape(_published(table, "unembedding"))] if config.tied else []))
        needed = {
            name.format(layer)
            for path, name in self._published.items()
            for layer in range(config.layers if path.startswith(LAYERS) else 1)
        }
        _check_names(source, needed, ignored)

    def read(self, path: str, layer: int = 0, checked: bool = False) -> np.ndarray:
        """Read a parameter, or a layer's share of it: a view in our layout, of the type that it is read in.

        Args:
          path: of the parameter.
          layer: whose share.
          checked: whether it was read before, and found finite.

        Raises:
          UserError: if it is not what it should be.
        """
        return self._part(path, self._tensor(path, layer, checked))

    def layer(self, layer: int, checked: bool = False) -> dict[str, np.ndarray]:
        """Read a layer, by paths such as "attn/out/kernel"; for `checked` see `read`."""
        tensors: dict[str, np.ndarray] = {}
        for path in self._paths():
            name = self._published[path]
            if name not in tensors:  # those of fused parameters are read once
                tensors[name] = self._tensor(path, layer, checked)
        return {path.removeprefix(LAYERS): self._part(path, tensors[self._published[path]]) for path in self._paths()}

    def tensors(self, layer: int) -> list[str]:
        """Return the names of the tensors that a layer is made of."""
        names = dict.fromkeys(self._published[path].format(layer) for path in self._paths())
        return [self._source.names[name] for name in names]

    def _paths(self) -> list[str]:
        return [path for path in self.expected if path.startswith(LAYERS)]

    def _tensor(self, path: str, layer: int, checked: bool) -> np.ndarray:
        """Read the tensor [out, in] that a layer's share of a parameter is, or is fused into with others."""
        source, name = self._source, self._source.names[self._published[path].format(layer)]
        array = source.read(name)
        with contextlib.suppress(ValueError):  # what cannot be reshaped has the wrong shape
            array = source.form(path, array, self._config)
        wanted = self.expected[path].shape[1:] if path.startswith(LAYERS) else self.expected[path].shape
        wanted = wanted[::-1] if _flipped(path) else wanted
        sizes = self._fused(path)
        wanted = (sum(sizes.values()), *wanted[1:]) if len(sizes) > 1 else wanted
        if array.shape != wanted:
            raise UserError(
                f"{source.path}: tensor {name} has shape {array.shape}, the config calls for {wanted}; {source.remedy}"
            )
        if not checked and not np.isfinite(array).all():
            raise UserError(f"{source.path}: tensor {name} holds NaN or infinity; {source.remedy}")
        return array

    def _part(self, path: str, tensor: np.ndarray) -> np.ndarray:
        """Return the part of a tensor that is a parameter, in our layout."""
        sizes = self._fused(path)
        if len(sizes) > 1:
            starts = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
            tensor = tensor[starts[path] :][: sizes[path]]
        return tensor.T if _flipped(path) else tensor

    def _fused(self, path: str) -> dict[str, int]:
        """Return the parameters of one published name, and their rows there: after those of the ones before them."""
        same = (p for p, name in self._published.items() if name == self._published[path])
        return {p: self.expected[p].shape[-1] for p in same}


def assemble(
    parameters: Parameters, config: ModelConfig, mesh: jax.sharding.Mesh | None, layers: bool = True
) -> Params:
    """Read a model's parameters, and stack the layers.

    Args:
      parameters: to be read.
      config: of the model.
      mesh: the devices that they are laid on, or None for one device.
      layers: whether the layers are wanted, too.

    Raises:
      UserError: if a tensor is not what it should be.
    """

    def read(path: str, into: np.ndarray, layer: int = 0) -> np.ndarray:
        into[...] = parameters.read(path, layer)
        return into

    weights: dict[str, Any] = {}
    for path, struct in parameters.expected.items():
        stacked = path.startswith(LAYERS)
        if stacked and not layers:
            continue
        if mesh is not None and mesh.size > 1:
            each = [(layer, struct.shape[1:]) for layer in range(config.layers)] if stacked else [(0, struct.shape)]
            # A buffer each, as devices may still be reading the one before.
            parts = (read(path, np.empty(shape, struct.dtype), layer) for layer, shape in each)
            weights[path] = meshes.stack(mesh, path, struct, parts) if stacked else meshes.lay_one(mesh, path, *parts)
            continue
        whole = _aligned(struct.shape, struct.dtype)
        if stacked:
            at_once = READ_BYTES // (4 * math.prod(struct.shape[1:]))
            if at_once < 2:  # not in a thread either, which would keep memory of its own
                for layer, into in enumerate(whole):
                    read(path, into, layer)
            else:
                with ThreadPoolExecutor(min(READERS, at_once)) as pool:
                    list(pool.map(read, itertools.repeat(path), whole, range(config.layers)))
        else:
            read(path, whole)
        array = jax.device_put(whole, may_alias=True)
        weights[path] = array if mesh is None else meshes.lay_one(mesh, path, array)
    return Params(weights=traverse_util.unflatten_dict(weights, sep="/"), config=config)


def _check_names(source: Tensors, needed: Set[str], ignored: Sequence[str]) -> None:
    """Refuse a source without a tensor that is needed, or with one that is neither needed nor among those ignored."""
    for name in sorted(needed - source.names.keys()):
        raise UserError(f"{source.path}: tensor {name} is missing; {source.remedy}")
    for ours, name in source.names.items():
        if ours not in needed and not any(re.fullmatch(pattern, ours) for pattern in ignored):
            raise UserError(f"{source.path}: tensor {name} is more than this architecture has; {source.remedy}")


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an empty array that JAX takes over without a copy on a CPU, where it wants 64-byte alignment."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _published(table: Mapping[str, str], path: str) -> str:
    """Return a parameter's name in the file, `{}` for the layer."""
    return f"{table[_module(path)]}.{'bias' if path.endswith('/bias') else 'weight'}"


def _module(path: str) -> str:
    """Return the name that a table has for the owner of a parameter."""
    return path.rpartition("/")[0] or path


def _flipped(path: str) -> bool:
    """Return whether a parameter is published [out, in] where ours is [in, out]."""
    return path.endswith("/kernel") or path == "unembedding"
