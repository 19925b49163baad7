"""The layers of a model one after another, wherever their weights are: on the devices, or read as they are needed."""

from __future__ import annotations

import functools
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from hydra_jax.engine import mesh as meshes
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import Params, flat, layout

Weights = dict[str, Any]
"""A layer's parameters, nested as those under "layers" in `Params.weights`, without their axis L."""

AT_ONCE = 2
"""Streamed layers that a device holds: one computes while the next one arrives."""


@typing.runtime_checkable
class Layers(typing.Protocol):
    """A model's layers in forward order, as often as one iterates.

    Attributes:
      streamed: whether they are read as they are needed, so that a device should be done with one before it is
        asked for the one after the next.
    """

    streamed: bool

    def __iter__(self) -> Iterator[Weights]:
        """Yield every layer's weights, on their devices."""


class Resident:
    """The layers of a model that is on its devices, cut out of the stack one by one."""

    streamed = False

    def __init__(self, params: Params) -> None:
        """Take the layers of `params`."""
        self._stacked = params.weights["layers"]
        self._count = params.config.layers
        mesh = meshes.mesh_of(params)
        self._cut = _cut(mesh, params.config)

    def __iter__(self) -> Iterator[Weights]:
        """Yield every layer's weights."""
        for layer in range(self._count):
            yield self._cut(self._stacked, np.int32(layer))


class Streamed:
    """Layers that are read one by one, the next one while this one computes.

    Attributes:
      waited: seconds that were spent waiting for layers, in all.
      read_bytes: of the layers that were read, in all, as the devices hold them.
    """

    streamed = True

    def __init__(self, config: ModelConfig, mesh: Mesh, read: Callable[[int], Mapping[str, np.ndarray]]) -> None:
        """Take what reads layers; nothing is read yet.

        Args:
          config: the model's.
          mesh: the devices that each layer is laid on.
          read: returns a layer's parameters on this host by paths such as "attn/out/kernel", in the layout of
            `Params` and of any float type; called by one other thread, for one layer at a time, whose memory it may
            use for the next.
        """
        self._config, self._mesh, self._read = config, mesh, read
        self.waited = 0.0
        self.read_bytes = 0

    def __iter__(self) -> Iterator[Weights]:
        """Yield every layer's weights; raises whatever `read` raises."""
        with ThreadPoolExecutor(1) as beside:
            coming = beside.submit(self._fetch, 0)
            for layer in range(self._config.layers):
                start = time.perf_counter()
                weights = coming.result()
                self.waited += time.perf_counter() - start
                if layer + 1 < self._config.layers:
                    coming = beside.submit(self._fetch, layer + 1)
                yield weights
                del weights

    def _fetch(self, layer: int) -> Weights:
        """Read a layer, send it to the devices in the type that it is stored in, and convert it there."""
        shardings, like = _shardings(self._mesh, self._config), layer_layout(self._config)
        laid = {}
        for name, array in self._read(layer).items():
            sent = meshes.put(self._mesh, array, shardings[name].spec, copied=True)
            laid[name] = sent if sent.dtype == like[name].dtype else _converted(like[name].dtype, shardings[name])(sent)
        weights = jax.block_until_ready(traverse_util.unflatten_dict(laid, sep="/"))
        self.read_bytes += sum(leaf.nbytes for leaf in laid.values())
        return weights


@functools.cache
def layer_layout(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and types of a layer's parameters by paths such as "attn/out/kernel"."""
    stacked = flat(layout(config).weights["layers"])
    return {name: jax.ShapeDtypeStruct(like.shape[1:], like.dtype) for name, like in stacked.items()}


@functools.cache
def _shardings(mesh: Mesh, config: ModelConfig) -> dict[str, jax.sharding.NamedSharding]:
    """Return where a layer's parameters lie, by path: as in the stack of all layers."""
    found = {}
    for name, like in layer_layout(config).items():
        stacked = meshes.parameter(mesh, f"layers/{name}", (config.layers, *like.shape))
        found[name] = jax.sharding.NamedSharding(mesh, meshes.Spec(*stacked.spec[1:]))
    return found


@functools.cache
def _cut(mesh: Mesh, config: ModelConfig) -> jax.stages.Wrapped:
    """Return the jitted (stack of layers, index) -> that layer."""
    out = traverse_util.unflatten_dict(_shardings(mesh, config), sep="/")
    return jax.jit(lambda stacked, layer: jax.tree.map(lambda leaf: leaf[layer], stacked), out_shardings=out)


@functools.cache
def _converted(dtype: Any, sharding: jax.sharding.NamedSharding) -> jax.stages.Wrapped:
    """Return the jitted conversion of a parameter to its type, where it lies."""
    return jax.jit(lambda array: array.astype(dtype), out_shardings=sharding)
