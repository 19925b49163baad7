"""A model in a directory as Hugging Face's libraries keep one: `config.json`, `tokenizer.json`, `*.safetensors`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from hydra_jax.engine.layers import Streamed
from hydra_jax.errors import UserError
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import Params
from hydra_jax.store.files import sha256
from hydra_jax.text import tokenizer
from hydra_jax.weights import families
from hydra_jax.weights.assemble import Parameters, Tensors, assemble
from hydra_jax.weights.families import Family
from hydra_jax.weights.faults import CONVERT, PICKLED, Unchanged, faults_of
from hydra_jax.weights.settings import Settings, model_config, stored_as
from hydra_jax.weights.shards import Shards

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COLUMN = 0
"""The column of a family's table with the names of these files."""


@dataclasses.dataclass(frozen=True)
class Stated:
    """A `config.json`, parsed.

    Attributes:
      path: of the file; or a model in memory, in words.
      values: all of it.
      family: of the architecture that it states.
    """

    path: Path | str
    values: Mapping[str, Any]
    family: Family

    @property
    def architecture(self) -> str:
        """Its `model_type`."""
        return str(self.values["model_type"])

    def config(self, dtype: str, precision: str) -> ModelConfig:
        """Read the settings.

        Args:
          dtype: as of `load.load`.
          precision: as of `load.load`.

        Raises:
          UserError: if they are not those of a model that is supported.
        """
        family, nested = self.family, self.family.nested
        with faults_of(self.path):
            own = Settings(self.values.get(nested, {}) if nested else self.values, family.defaults)
        types = [get(key, None) for get in (self.values.get, own) for key in ("dtype", "torch_dtype")]
        stored = stored_as(next(filter(None, types), None), dtype)
        return model_config(str(self.path), own, lambda: family.fields(own), dtype=stored, precision=precision)


def read_stated(path: Path) -> Stated:
    """Read a `config.json`, which need not be in a model's directory.

    Args:
      path: of the file.

    Raises:
      UserError: if it is damaged, or of an architecture that is not supported.
    """
    values = _json_object(path)
    return Stated(path, values, families.find(values.get("model_type"), str(path)))


class Directory:
    """A directory, opened: its `config.json` is read, no weights are.

    Attributes:
      architecture: its `model_type`.
      dropout: None, as what such files say of it need not be what was done.
    """

    dropout: float | None = None
    digest_is_apart = True

    def __init__(self, path: Path) -> None:
        """Read the `config.json` of the directory `path`.

        Raises:
          UserError: if a file is missing or damaged, or the architecture is not supported.
        """
        for needed in (CONFIG, TOKENIZER):
            if not (path / needed).is_file():
                raise UserError(f"{path}: has no {needed}; a model directory needs it beside its *.safetensors")
        self._path = path
        self._stated = read_stated(path / CONFIG)
        self.architecture = self._stated.architecture

    def config(self, dtype: str, precision: str) -> ModelConfig:
        """Read the settings, as `Stated.config`."""
        return self._stated.config(dtype, precision)

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer.

        Raises:
          UserError: if it is damaged.
        """
        return tokenizer.from_file(self._path / TOKENIZER)

    def weights(self, config: ModelConfig, mesh: jax.sharding.Mesh | None) -> Params:
        """Read the weights.

        Args:
          config: from `config`.
          mesh: as of `load.load`.

        Raises:
          UserError: if they are not those that the config calls for.
        """
        paths = _shards(self._path)
        with Unchanged(paths).while_read():
            return assemble(self._parameters(config, Shards(paths)), config, mesh)

    def streamed(self, config: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[Params, Streamed]:
        """Read what is not in a layer, and return what reads layers; see `weights`."""
        paths = _shards(self._path)
        unchanged, shards, seen = Unchanged(paths), Shards(paths), set()
        parameters = self._parameters(config, shards)
        with unchanged.while_read():
            rest = assemble(parameters, config, mesh, layers=False)

        def read(layer: int) -> dict[str, np.ndarray]:
            with unchanged.while_read(), faults_of(self._path):
                shards.begin(parameters.tensors(layer))
                weights = parameters.layer(layer, checked=layer in seen)
            seen.add(layer)
            return weights

        return rest, Streamed(config, mesh, read)

    def _parameters(self, config: ModelConfig, shards: Shards) -> Parameters:
        family = self._stated.family
        names = family.names_in(shards.names)
        tensors = Tensors(self._path, floats(shards.read), names, family.form, COLUMN, family.ignored)
        return Parameters(config, family, tensors)

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the files that the model is made of, as `digest`."""
        return digest(self._path)


def floats(read: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
    """Return `read` with arrays of one axis in float32, as norms and biases are in every model."""

    def one(name: str) -> np.ndarray:
        array = read(name)
        return array.astype(np.float32) if array.ndim == 1 else array

    return one


def digest(path: Path) -> str:
    """Return the SHA-256 (hex) of the names and sums of a directory's config, tokenizer and weight files."""
    files = [path / CONFIG, path / TOKENIZER, *path.glob("*.safetensors")]
    sums = "".join(f"{file.name} {sha256(file)}\n" for file in sorted(files))
    return hashlib.sha256(sums.encode()).hexdigest()


def _json_object(path: Path) -> Mapping[str, Any]:
    with faults_of(path):
        values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: is not a JSON object; fetch the model again")
    return values


def _shards(path: Path) -> list[Path]:
    """List the weight files of a directory: those that its index names, or the one of the usual name, or all."""
    index = path / INDEX
    if not index.is_file():
        if (path / SINGLE).is_file():  # and not another copy beside it
            return [path / SINGLE]
        shards = sorted(path.glob("*.safetensors"))
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLED)
        if not shards:
            raise UserError(
                f"{path}: has no *.safetensors"
                + (f"; {pickled[0]} is pickled, which is never read: {CONVERT}" if pickled else "; fetch it again")
            )
        return shards
    named = _json_object(index).get("weight_map")
    if not isinstance(named, Mapping) or not all(isinstance(name, str) for name in named.values()):
        raise UserError(f"{index}: has no weight_map of names; fetch the model again")
    for name in sorted(set(named.values())):
        if Path(name).name != name or not name.endswith(".safetensors") or not (path / name).is_file():
            raise UserError(f"{path}: has no {name}, which {INDEX} names; fetch the model again")
    return [path / name for name in sorted(set(named.values()))]
