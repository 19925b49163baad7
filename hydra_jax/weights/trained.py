"""A directory that `launch.train` trained into, as a model: what its description says of the shape and the tokens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from hydra_jax.config import LAST_STEP, ShapeConfig
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.layers import Streamed
from hydra_jax.errors import UserError
from hydra_jax.models import transformer
from hydra_jax.models.config import AS_STORED, ModelConfig
from hydra_jax.models.transformer import DropoutRates, Params
from hydra_jax.parsing import parse
from hydra_jax.text import tokenizer

RUN = "train.json"
TOKENIZER = "tokenizer.json"


class TrainedRun:
    """A training run's directory, opened: its description is read, no weights are.

    Attributes:
      architecture: in words.
      dropout: the highest of its rates.
    """

    architecture = "llama, trained here"
    digest_is_apart = False

    def __init__(self, path: Path, step: int = LAST_STEP) -> None:
        """Read the description of the run in `path`, of which the checkpoint of `step` is meant.

        Raises:
          UserError: if it is damaged.
        """
        self._path = path
        self._step = step
        self._digest = ""
        self._config, self.dropout = model_config(path, AS_STORED, "highest")

    def config(self, dtype: str, precision: str) -> ModelConfig:
        """Return the settings.

        Args:
          dtype: as of `load.load`.
          precision: as of `load.load`.
        """
        kept = self._config.dtype if dtype == AS_STORED else dtype
        return dataclasses.replace(self._config, dtype=kept, precision=precision)

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer.

        Raises:
          UserError: if it is damaged.
        """
        return tokenizer.from_file(self._path / TOKENIZER)

    def weights(self, config: ModelConfig, mesh: jax.sharding.Mesh | None) -> Params:
        """Read the checkpoint's weights.

        Args:
          config: from `config`.
          mesh: as of `load.load`.

        Raises:
          UserError: if there is no such checkpoint, or it is damaged.
        """
        stored, like = self._read(), transformer.layout(config).weights
        weights = jax.tree.map(lambda array, like: array.astype(like.dtype), stored, like)
        params = Params(weights=weights, config=config)
        return params if mesh is None else meshes.lay(mesh, params)

    def streamed(self, config: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[Params, Streamed]:
        """Read what is not in a layer, and return what has layers; see `weights`.

        A checkpoint is restored whole, to this host's memory: models that are trained here are small.
        """
        layer = "layers"
        stored: Any = self._read(on_host=True)
        rest = {name: part for name, part in stored.items() if name != layer}
        like = {name: part for name, part in transformer.layout(config).weights.items() if name != layer}
        typed = jax.tree.map(lambda array, like: array.astype(like.dtype), rest, like)
        stacked = transformer.flat(stored[layer])

        def read(number: int) -> dict[str, np.ndarray]:
            return {name: array[number] for name, array in stacked.items()}

        return meshes.lay(mesh, Params(weights=typed, config=config)), Streamed(config, mesh, read)

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the checkpoint's weights, which are read for it unless they were before."""
        if not self._digest:
            self._read()
        return self._digest

    def _read(self, on_host: bool = False) -> Any:
        """Restore the weights to the first device, or to this host's memory."""
        from hydra_jax.weights import checkpoints  # orbax is slow to import, and most runs never need it

        like: Any = transformer.layout(dataclasses.replace(self._config, dtype="float32")).weights
        if on_host:
            like = jax.tree.map(lambda one: np.broadcast_to(np.zeros((), one.dtype), one.shape), like)
        weights, self._digest, _ = checkpoints.weights(self._path, like, self._step)
        return weights


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
