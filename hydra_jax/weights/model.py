"""A loaded model: its parameters, its tokenizer, and which weights they are."""

from __future__ import annotations

import dataclasses
import typing

from hydra_jax.engine.layers import Layers, Resident, Streamed
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import Params

if typing.TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model, ready to be ablated.

    Attributes:
      name: as it was asked for; of a model given in memory, what that was loaded from, or its class.
      params: weights and config; where layers are streamed, the weights of what is not in a layer.
      tokenizer: text to tokens and back.
      weights_hash: SHA-256 of the file, of the directory's files in order of name, of a checkpoint's arrays, or of
        the settings, tokenizer and tensors of a model given in memory.
      dropout: the highest rate of any kind that it was trained with; None where that is not known.
      streamed: what reads layers as they are needed, where they are not all on the devices.
      memory: GB of each device that may be used with it in all; 0 for what is free.
    """

    name: str
    params: Params
    tokenizer: Tokenizer
    weights_hash: str
    dropout: float | None = None
    streamed: Streamed | None = None
    memory: float = 0.0

    @property
    def layers(self) -> Layers:
        """The model's layers, one after another."""
        return self.streamed or Resident(self.params)

    @property
    def config(self) -> ModelConfig:
        """The model's shape and switches."""
        return self.params.config
