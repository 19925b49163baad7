"""Models whose layers are in this host's memory: random ones, made layer by layer, or copies of a loaded one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.layers import Resident, Streamed
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import Params, flat, init_params, layout

LAYERS = "layers"


@dataclasses.dataclass(frozen=True)
class HostModel:
    """A model of which a device holds no layer.

    Attributes:
      beside: what is not in a layer, on its devices.
      layers: each layer's parameters on this host, by paths such as "attn/out/kernel".
    """

    beside: Params
    layers: Sequence[Mapping[str, np.ndarray]]

    @classmethod
    def random(cls, config: ModelConfig, mesh: Mesh, seed: int = 0) -> HostModel:
        """Draw a model's weights; a device holds those of one layer at a time."""
        single = dataclasses.replace(config, layers=1, windows=config.windows[:1])
        of_layer = jax.jit(lambda key: init_params(single, key).weights[LAYERS])
        of_rest = jax.jit(lambda key: _without_layers(init_params(single, key).weights))
        rest, *keys = jax.random.split(jax.random.key(seed), 1 + config.layers)
        layers = [{name: leaf[0] for name, leaf in flat(jax.device_get(of_layer(key))).items()} for key in keys]
        return cls(meshes.lay(mesh, Params(of_rest(rest), config)), layers)

    @classmethod
    def copy(cls, params: Params) -> HostModel:
        """Copy a model's layers."""
        layers = [flat(jax.device_get(weights)) for weights in Resident(params)]
        return cls(params.replace(weights=_without_layers(params.weights)), layers)

    def streamed(self) -> Streamed:
        """Return its layers as they are read from here."""
        return Streamed(self.beside.config, meshes.mesh_of(self.beside), self.layers.__getitem__)

    def resident(self) -> Params:
        """Return the same model with all layers on its devices."""
        mesh, config = meshes.mesh_of(self.beside), self.beside.config
        stacked = {
            name: meshes.stack(mesh, f"{LAYERS}/{name}", like, (layer[name] for layer in self.layers))
            for name, like in flat(layout(config).weights[LAYERS]).items()
        }
        return Params(self.beside.weights | {LAYERS: traverse_util.unflatten_dict(stacked, sep="/")}, config)


def _without_layers(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in weights.items() if name != LAYERS}
