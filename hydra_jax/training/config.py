"""What a training run is asked to do: frozen dataclasses, with every check that needs no data."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from hydra_jax.config import ShapeConfig
from hydra_jax.errors import UserError
from hydra_jax.models.config import DTYPES, PRECISIONS, ModelConfig
from hydra_jax.models.transformer import DropoutRates
from hydra_jax.parsing import one_of, parse

DATA_KINDS = ("biographies", "text")
NO_DROPOUT = DropoutRates()
REFERENCE = "no_dropout"
"""The arm that others are compared with."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read.

    Attributes:
      kind: "biographies" of invented people (`biographies.py`), or "text", UTF-8 files.
      seed: of the people; arms and seeds of training are compared on the same ones.
      people: in biographies.
      unseen_people: more of them, in none: what is answered of them is guessed.
      variants: biographies a person.
      path: of text: files, directories (their *.txt) and patterns, separated by commas.
      holdout: share of the rows of text that is kept for evaluation.
      vocab_size: tokens of the byte-level BPE that is trained on the text.
    """

    kind: str = "biographies"
    seed: int = 0
    people: int = 120
    unseen_people: int = 40
    variants: int = 30
    path: str = ""
    holdout: float = 0.05
    vocab_size: int = 2048


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay.

    Attributes:
      learning_rate: the highest.
      final_share: of it, what is left at the last step.
      warmup: steps in which it rises.
      weight_decay: of matrices, not of gains and biases.
      beta1, beta2: of Adam.
      clip: gradients are scaled down to this norm.
    """

    learning_rate: float = 3e-3
    final_share: float = 0.1
    warmup: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and which checkpoints stay: the last few, and every so many steps.

    Attributes:
      every: steps.
      keep_last: how many of the last.
      keep_every: steps of those that stay for good, a multiple of `every`.
    """

    every: int = 100
    keep_last: int = 2
    keep_every: int = 100


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run: see `configs/train.py` for presets and arms.

    Attributes:
      arm: its name in comparisons; what it changes is `dropout`.
      preset: where the rest comes from.
      seed: of initial parameters, order of data and dropout.
      steps: of the optimiser.
      batch: sequences a step, over all devices.
      accumulate: parts that a step's batch is worked through in, one after the other: small ones fit a CPU's cache.
      dtype: of matrix products and activations; parameters and the optimiser's state are float32.
      precision: of float32 products.
      model: the decoder's shape.
      data: what is read.
      dropout: of writes, on their way to the stream.
      optimizer: AdamW's settings.
      checkpoint: when and which.
      evaluate_every: steps between evaluations.
      log_every: steps between lines of metrics.jsonl.
    """

    arm: str = "no_dropout"
    preset: str = "tiny"
    seed: int = 0
    steps: int = 700
    batch: int = 32
    accumulate: int = 4
    dtype: str = "float32"
    precision: str = "highest"
    model: ShapeConfig = ShapeConfig()  # noqa: RUF009  (it is frozen)
    data: DataConfig = DataConfig()
    dropout: DropoutRates = NO_DROPOUT
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate_every: int = 100
    log_every: int = 10

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.arm):
            raise UserError(f"config.arm: is {self.arm!r}; give letters, digits, _, - and . alone")
        one_of("data.kind", self.data.kind, DATA_KINDS)
        if self.data.path and self.data.kind != "text":
            raise UserError("config.data.path: is not read; set --config.data.kind=text, or leave it out")
        one_of("dtype", self.dtype, DTYPES)
        one_of("precision", self.precision, PRECISIONS)
        for name, part, least in (
            ("", self, dict(seed=0, steps=1, batch=1, accumulate=1, evaluate_every=1, log_every=1)),
            ("model.", self.model, dict.fromkeys((field.name for field in dataclasses.fields(self.model)), 1)),
            ("data.", self.data, dict(seed=0, people=1, unseen_people=0, variants=1)),
            ("optimizer.", self.optimizer, dict(warmup=0)),
            ("checkpoint.", self.checkpoint, dict(every=1, keep_last=1, keep_every=1)),
        ):
            for key, smallest in least.items():
                if getattr(part, key) < smallest:
                    raise UserError(f"config.{name}{key}: is {getattr(part, key)}; give {smallest} or more")
        for field in dataclasses.fields(self.dropout):
            rate = getattr(self.dropout, field.name)
            if not 0 <= rate < 1:
                raise UserError(f"config.dropout.{field.name}: is {rate}; give a rate from 0 to below 1")
        if self.arm == REFERENCE and self.dropout != NO_DROPOUT:
            raise UserError(f"config.dropout: is not 0, in the arm {REFERENCE}; give another --config.arm")
        for key in ("learning_rate", "clip"):
            value = getattr(self.optimizer, key)
            if not 0 < value < math.inf:
                raise UserError(f"config.optimizer.{key}: is {value}; give a number above 0")
        for key in ("beta1", "beta2", "final_share"):
            value = getattr(self.optimizer, key)
            if not 0 <= value <= 1 or (value == 1 and key != "final_share"):
                raise UserError(f"config.optimizer.{key}: is {value}; give a number from 0 to 1")
        if not 0 <= self.optimizer.weight_decay < math.inf:
            raise UserError(f"config.optimizer.weight_decay: is {self.optimizer.weight_decay}; give 0 or more")
        if not 0 < self.data.holdout < 1:
            raise UserError(f"config.data.holdout: is {self.data.holdout}; give a share between 0 and 1")
        if self.batch % self.accumulate:
            raise UserError(
                f"config.batch: {self.batch} does not divide into config.accumulate={self.accumulate} equal parts"
            )
        if self.checkpoint.keep_every % self.checkpoint.every:
            raise UserError(
                f"config.checkpoint.keep_every: {self.checkpoint.keep_every} is not a multiple of"
                f" config.checkpoint.every={self.checkpoint.every}; give one"
            )
        if self.model.width % self.model.heads:
            raise UserError(
                f"config.model.width: {self.model.width} does not divide into {self.model.heads} heads; give a multiple"
            )
        self.decoder(1)

    def decoder(self, vocab_size: int) -> ModelConfig:
        """The model's config with parameters in float32.

        Raises:
          UserError: if the shape cannot be.
        """
        return self.model.decoder(vocab_size, self.precision)


def train_config(config: Mapping[str, Any]) -> TrainConfig:
    """A TrainConfig of a ConfigDict or any mapping of the same shape.

    Raises:
      UserError: if a key is unknown, or a value is of the wrong type or out of range.
    """
    return parse(TrainConfig, config, "config")
