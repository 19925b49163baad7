"""A model as it is found, opened once: its settings, its tokenizer and its hash without its weights, then those.

All kinds are untrusted: read as data, and checked whole.
"""

from __future__ import annotations

import math
import sys
import typing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from tokenizers import Tokenizer

from hydra_jax.config import LAST_STEP, MeshConfig
from hydra_jax.engine import memory
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.layers import Streamed
from hydra_jax.errors import UserError
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import Params
from hydra_jax.weights import hub
from hydra_jax.weights.check import Check, check_streamed
from hydra_jax.weights.directory import Directory
from hydra_jax.weights.faults import faults_of, refuse_pickled
from hydra_jax.weights.gguf_file import GgufFile
from hydra_jax.weights.in_memory import InMemory, PretrainedModel
from hydra_jax.weights.model import Model
from hydra_jax.weights.trained import TrainedRun, is_trained


class Stored(typing.Protocol):
    """One kind of thing that a model is stored in, such as a file or a directory, opened."""

    @property
    def architecture(self) -> str:
        """Its architecture, as the file calls it."""

    @property
    def dropout(self) -> float | None:
        """The highest rate of any kind that the model was trained with; None where that is not known."""

    def config(self, dtype: str, precision: str) -> ModelConfig:
        """Read its settings; no weights are read."""

    def tokenizer(self) -> Tokenizer:
        """Build its tokenizer."""

    def weights(self, config: ModelConfig, mesh: jax.sharding.Mesh | None) -> Params:
        """Read all that `config` calls for."""

    def streamed(self, config: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[Params, Streamed]:
        """Read all but the layers that `config` calls for, and return what reads those as they are needed."""

    def digest(self) -> str:
        """Sum up the weights, and whatever else makes the model what it is; hex."""

    @property
    def digest_is_apart(self) -> bool:
        """Whether `digest` reads of its own accord, and so can run beside `weights`, not after it."""


class Source:
    """A model, opened: every part of it is read, parsed and hashed at most once.

    Attributes:
      name: as it was asked for.
      path: of its file or directory; or a model in memory, in words.
    """

    def __init__(self, name: str, path: Path | str, stored: Stored, known: hub.PackagedFile | None = None) -> None:
        """Take what is `stored` at `path`; `known` is the named model whose verified file it is, if it is one."""
        self.name = name
        self.path = path
        self._stored = stored
        self._dropout = known.dropout if known else stored.dropout
        self._digest = known.sha256 if known else ""
        self._tokenizer: Tokenizer | None = None

    @property
    def architecture(self) -> str:
        """The architecture, as the file calls it."""
        return self._stored.architecture

    @property
    def weights_hash(self) -> str:
        """The SHA-256 (hex) of `Model.weights_hash`."""
        if not self._digest:
            with faults_of(self.path):
                self._digest = self._stored.digest()
        return self._digest

    def config(self, dtype: str = "float32", precision: str = "highest") -> ModelConfig:
        """Return the model's config; no weights are read.

        Args:
          dtype: as of `load.load`.
          precision: as of `load.load`.

        Raises:
          UserError: if the settings are damaged or not supported.
        """
        with faults_of(self.path):
            return self._stored.config(dtype, precision)

    def tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer; no weights are read.

        Raises:
          UserError: if it is damaged or not supported.
        """
        if self._tokenizer is None:
            with faults_of(self.path):
                self._tokenizer = self._stored.tokenizer()
        return self._tokenizer

    def load(
        self,
        dtype: str = "float32",
        precision: str = "highest",
        mesh: jax.sharding.Mesh | None = None,
        limit: float = math.inf,
        say: Callable[[str], object] | None = None,
    ) -> Model:
        """Load the model, everything that needs no weights first.

        Args:
          dtype: as of `load.load`.
          precision: as of `load.load`.
          mesh: as of `load.load`.
          limit: bytes of each device that may be used in all; weights that do not fit are streamed.
          say: takes a line that says so; None to print it to the standard error stream.

        Raises:
          UserError: if it is damaged, not supported, or fails `check`.
        """
        text = self.tokenizer()
        config = self.config(dtype, precision)
        # Added tokens may have no row: Gemma 3's text models come with one for images.
        tokens = text.get_vocab_size(with_added_tokens=False)
        if tokens > config.vocab_size:
            raise UserError(
                f"{self.path}: the tokenizer has {tokens:,} tokens, the embedding {config.vocab_size:,} rows;"
                " fetch the model again"
            )
        share = 1 if mesh is None else mesh.shape[meshes.MODEL]
        streamed, layers = memory.streams(config, share, limit), None
        if streamed:
            (say or _to_stderr)(streamed)
        with faults_of(self.path), ThreadPoolExecutor(2) as beside:
            check = None if streamed else Check(config, mesh, beside)
            if self._stored.digest_is_apart:
                hashed = beside.submit(lambda: self.weights_hash)
            if check:
                params = self._stored.weights(config, mesh)
                check(params, str(self.path))
            else:
                params, layers = self._stored.streamed(config, mesh or meshes.make(MeshConfig(1)))
                check_streamed(params, layers, str(self.path))
            digest = hashed.result() if self._stored.digest_is_apart else self.weights_hash
        return Model(self.name, params, text, digest, self._dropout, layers)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def open(name: str, step: int = LAST_STEP) -> Source:
    """Open a model: find or fetch it, and parse what says how it is made.

    Args:
      name: as of `load.load`.
      step: as of `load.load`.

    Raises:
      UserError: if it cannot be found, fetched or parsed, or is of an unknown architecture.
    """
    path = hub.locate(name)
    if is_trained(path):
        return Source(name, path, TrainedRun(path, step))
    if step != LAST_STEP:
        raise UserError(f"{path}: is not a directory of a training run, and has no step {step}; leave model_step out")
    refuse_pickled(path)
    with faults_of(path):
        stored: Stored = Directory(path) if path.is_dir() else GgufFile(path)
    # A named model's file has the hash that it was verified by.
    return Source(name, path, stored, hub.MODELS.get(name))


def in_memory(model: PretrainedModel, tokenizer: object) -> Source:
    """Open a `transformers` model that is in memory.

    Args:
      model: as of `load.load`.
      tokenizer: as of `load.load`.

    Raises:
      UserError: if it is of an unknown architecture, or not a plain model with values, or without a tokenizer.
    """
    stored = InMemory(model, tokenizer)
    return Source(stored.name, stored.where, stored)
