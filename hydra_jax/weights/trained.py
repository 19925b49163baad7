"""A directory that `launch.train` trained into, as a model: what its description says of the shape and the tokens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra_jax.config import AS_STORED, ShapeConfig
from hydra_jax.errors import UserError
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import DropoutRates
from hydra_jax.parsing import parse

RUN = "train.json"
TOKENIZER = "tokenizer.json"


def is_trained(path: Path) -> bool:
    """Return whether a directory is that of a training run."""
    return (path / RUN).is_file()


def read_description(workdir: Path) -> Mapping[str, Any]:
    """Read a run's description: its `config`, `vocab_size` and `corpus`, the SHA-256 of what it is trained on.

    Raises:
      UserError: if it is not there or damaged.
    """
    path = workdir / RUN
    try:
        stated = json.loads(path.read_text("utf-8"))
        return {"config": stated["config"], "vocab_size": int(stated["vocab_size"]), "corpus": stated["corpus"]}
    except FileNotFoundError:
        raise UserError(f"{path}: is not there; give the --workdir of a training run") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); train into another --workdir") from error


def model_config(workdir: Path, dtype: str, precision: str) -> tuple[ModelConfig, float]:
    """Read the config of the model that a run trains, and the highest of its dropout rates.

    Args:
      workdir: of the run.
      dtype: as of `hydra_jax.load`; parameters are stored in float32.
      precision: as of `hydra_jax.load`.

    Raises:
      UserError: if the description is not there or damaged.
    """
    stated, path = read_description(workdir), workdir / RUN
    try:
        shape = parse(ShapeConfig, stated["config"]["model"], "config.model")
        rates = parse(DropoutRates, stated["config"]["dropout"], "config.dropout")
        config = shape.decoder(stated["vocab_size"], precision)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); train into another --workdir") from error
    if dtype != AS_STORED:
        config = dataclasses.replace(config, dtype=dtype)
    return config, max(dataclasses.asdict(rates).values())
