"""The settings of a training run as frozen dataclasses, with every check that needs no data."""

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
"""The arm that the others are compared with."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    Attributes:
      kind: "biographies" of invented people (`biographies.py`), or "text", UTF-8 files.
      seed: the seed that people are drawn from; arms and seeds of training are compared on the same people.
      people: how many people have biographies.
      unseen_people: how many more have none, so that answers about them are guesses.
      variants: biographies of each person.
      path: files of text, directories (their *.txt) and patterns, separated by commas.
      holdout: the share of the rows of text that is kept for evaluation.
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
      learning_rate: the highest learning rate.
      final_share: the share of it that is left at the last step.
      warmup: steps over which it rises.
      weight_decay: the decay of matrices; gains and biases have none.
      beta1, beta2: Adam's decay rates of the first and the second moment.
      clip: the norm that longer gradients are scaled down to.
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
    """The steps at which the state is saved, and the checkpoints that stay.

    Attributes:
      every: steps from one checkpoint to the next.
      keep_last: how many of the last checkpoints stay.
      keep_every: steps from one checkpoint that stays for good to the next, a multiple of `every`.
    """

    every: int = 100
    keep_last: int = 2
    keep_every: int = 100


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run: see `configs/train.py` for presets and arms.

    Attributes:
      arm: the run's name in comparisons; arms differ in `dropout`.
      preset: the name of the preset that the other settings come from.
      seed: the seed of the initial parameters, the order of the data and dropout.
      steps: updates by the optimiser.
      batch: sequences a step, over all devices.
      accumulate: parts that a step's batch is worked through in, one after the other: small ones fit a CPU's cache.
      dtype: the type of matrix products and activations; parameters and the optimiser's state are float32.
      precision: the precision of float32 products.
      model: the decoder's shape.
      data: the data.
      dropout: the rates at which writes are dropped on their way to the stream.
      optimizer: AdamW's settings.
      checkpoint: the steps at which the state is saved.
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
        for name, settings, lowest in (
            ("", self, dict(seed=0, steps=1, batch=1, accumulate=1, evaluate_every=1, log_every=1)),
            ("model.", self.model, dict.fromkeys((field.name for field in dataclasses.fields(self.model)), 1)),
            ("data.", self.data, dict(seed=0, people=1, unseen_people=0, variants=1)),
            ("optimizer.", self.optimizer, dict(warmup=0)),
            ("checkpoint.", self.checkpoint, dict(every=1, keep_last=1, keep_every=1)),
        ):
            for key, least in lowest.items():
                if getattr(settings, key) < least:
                    raise UserError(f"config.{name}{key}: is {getattr(settings, key)}; give {least} or more")
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
        """Return the model's config, with parameters in float32.

        Raises:
          UserError: if no model can have the shape.
        """
        return self.model.decoder(vocab_size, self.precision)


def train_config(config: Mapping[str, Any]) -> TrainConfig:
    """Return the TrainConfig of a ConfigDict or any mapping of the same shape.

    Raises:
      UserError: if a key is unknown, or a value is of the wrong type or out of range.
    """
    return parse(TrainConfig, config, "config")
