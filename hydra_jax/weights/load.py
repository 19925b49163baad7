"""A model by its name, or one in memory, opened and loaded in one call."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, overload

import jax

from hydra_jax.config import LAST_STEP
from hydra_jax.engine.memory import free_bytes
from hydra_jax.errors import UserError, shown, speaks_of_arguments
from hydra_jax.weights import source
from hydra_jax.weights.in_memory import PretrainedModel, is_model
from hydra_jax.weights.model import Model

__all__ = ["Model", "load"]


@overload
def load(
    name: str,
    dtype: str = "float32",
    precision: str = "highest",
    step: int = LAST_STEP,
    mesh: jax.sharding.Mesh | None = None,
    memory: float = 0.0,
) -> Model: ...


@overload
def load(
    name: PretrainedModel,
    tokenizer: object,
    precision: str = "highest",
    *,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    memory: float = 0.0,
) -> Model: ...


@speaks_of_arguments  # type: ignore[misc]  # as a str in the tokenizer's place is the dtype
def load(
    name: Any,
    tokenizer: Any = None,
    precision: str = "highest",
    step: int = LAST_STEP,
    mesh: jax.sharding.Mesh | None = None,
    memory: float = 0.0,
    *,
    dtype: str | None = None,
) -> Model:
    """Load a model: `load(name, dtype="float32", ...)`, or `load(model, tokenizer, ...)` of one in memory.

    Args:
      name: one of `hub.MODELS`; a path to a `.gguf` file; a path to a directory with `config.json`,
        `*.safetensors` and `tokenizer.json`; one that `python -m launch.train` trained into; a Hugging
        Face Hub id, "owner/name" or "owner/name@revision"; or a causal language model of `transformers` in
        memory, whose weights are copied (or, of layers that do not fit, read as they are needed).
      tokenizer: of a model in memory: a fast one of `transformers`, or a `tokenizers.Tokenizer`; it is copied. A
        str in its place is the dtype.
      precision: "highest", "high" or "default", of float32 matrix products.
      step: of a model that was trained here, which checkpoint; LAST_STEP for the last.
      mesh: from `mesh.make`, the devices that the parameters are laid on, layer by layer as they are read; None
        for one device.
      memory: GB of each device that may be used, with all that is done with the model; 0 for what is free. Of weights
        that do not fit, layers are read as they are needed.
      dtype: "float32" (the default) or "bfloat16", for weights, keys and values; or "auto", bfloat16 where the
        weights are stored in it (`torch_dtype` of `config.json` says so, or the embedding of a GGUF file or of a
        model in memory is), else float32.

    Raises:
      UserError: if it cannot be found, fetched or read, is damaged, is of an unknown architecture, or
        fails `check`; or a model in memory has no tokenizer, or not its own.
    """
    if isinstance(tokenizer, str):
        if dtype is not None:
            raise TypeError("load() got multiple values for argument 'dtype'")
        dtype, tokenizer = tokenizer, None
    opened = _opened(name, tokenizer, step)
    device = jax.local_devices()[0] if mesh is None else mesh.local_devices[0]
    model = opened.load("float32" if dtype is None else dtype, precision, mesh, memory * 1e9 or free_bytes(device))
    return dataclasses.replace(model, memory=memory)


def _opened(name: Any, tokenizer: Any, step: int) -> source.Source:
    if is_model(name):
        if step != LAST_STEP:
            raise UserError(f"step {step}: a model in memory has no checkpoints; leave step out")
        return source.in_memory(name, tokenizer)
    if not isinstance(name, str | os.PathLike):
        raise UserError(f"{shown(name)}: is not a model; give a name, a path, or a model of transformers")
    if tokenizer is not None:
        raise UserError(f"model {str(name)!r}: has a tokenizer of its own; give none, or the model itself, in memory")
    return source.open(os.fspath(name), step)
