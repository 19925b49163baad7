"""A loaded model: its parameters, its tokenizer, and which weights they are."""

from __future__ import annotations

import dataclasses
import typing

from hydra_jax.engine.layers import Layers, Resident
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import Params

if typing.TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model, ready to be ablated.

    Attributes:
      name: as it was asked for.
      params: weights and config.
      tokenizer: text to tokens and back.
      weights_hash: SHA-256 of the file, of the directory's files in order of name, or of a checkpoint's arrays.
      dropout: the highest rate of any kind that it was trained with; None where that is not known.
    """

    name: str
    params: Params
    tokenizer: Tokenizer
    weights_hash: str
    dropout: float | None = None

    @property
    def layers(self) -> Layers:
        """The model's layers."""
        return Resident(self.params)

    @property
    def config(self) -> ModelConfig:
        """The model's shape and switches."""
        return self.params.config
