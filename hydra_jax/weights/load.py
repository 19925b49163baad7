"""A model by its name, opened and loaded in one call."""

from __future__ import annotations

import dataclasses

import jax

from hydra_jax.config import LAST_STEP
from hydra_jax.engine.memory import free_bytes
from hydra_jax.weights import source
from hydra_jax.weights.model import Model

__all__ = ["Model", "load"]


def load(
    name: str,
    dtype: str = "float32",
    precision: str = "highest",
    step: int = LAST_STEP,
    mesh: jax.sharding.Mesh | None = None,
    memory: float = 0.0,
) -> Model:
    """Load a model.

    Args:
      name: one of `hub.MODELS`; a path to a `.gguf` file; a path to a directory with `config.json`,
        `*.safetensors` and `tokenizer.json`; one that `python -m launch.train` trained into; or a Hugging
        Face Hub id, "owner/name" or "owner/name@revision".
      dtype: "float32" or "bfloat16", for weights, keys and values; or "auto", bfloat16 where the weights are
        stored in it (`torch_dtype` of `config.json` says so, or the embedding of a GGUF file is), else float32.
      precision: "highest", "high" or "default", of float32 matrix products.
      step: of a model that was trained here, which checkpoint; LAST_STEP for the last.
      mesh: from `mesh.make`, the devices that the parameters are laid on, layer by layer as they are read; None
        for one device.
      memory: GB of each device that may be used, with all that is done with the model; 0 for what is free. Of weights
        that do not fit, layers are read as they are needed.

    Raises:
      UserError: if it cannot be found, fetched or read, is damaged, is of an unknown architecture, or
        fails `check`.
    """
    device = jax.local_devices()[0] if mesh is None else mesh.local_devices[0]
    model = source.open(name, step).load(dtype, precision, mesh, memory * 1e9 or free_bytes(device))
    return dataclasses.replace(model, memory=memory)
