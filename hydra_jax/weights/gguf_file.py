"""A model in one GGUF file, as llama.cpp uses them: weights of many kinds of quantisation, read as float32."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from hydra_jax.engine.layers import Streamed
from hydra_jax.errors import UserError, shown
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import Params
from hydra_jax.store.files import sha256
from hydra_jax.text import tokenizer
from hydra_jax.weights import families, gguf_header
from hydra_jax.weights.assemble import Parameters, Tensors, assemble
from hydra_jax.weights.faults import Unchanged, faults_of, fill
from hydra_jax.weights.gguf_header import Header, TensorInfo
from hydra_jax.weights.settings import Settings, model_config, stored_as

COLUMN = 1
"""The column of a family's table with the names of these files."""

DECODED = 1 << 18
"""Weights that are decoded at once, about as many as a core's cache holds. With fewer, calls take longer than work."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor whose bytes are in the file, still as they are stored.

    Attributes:
      shape: in the file's order, the fastest axis first.
      kind: its `gguf.GGMLQuantizationType`.
      path: of the file.
      start: its first byte there.
      count: the number of its blocks.
      size: bytes of each.
    """

    shape: tuple[int, ...]
    kind: Any
    path: Path
    start: int
    count: int
    size: int

    @property
    def dtype(self) -> str:
        """The name of the type, as other formats write it where they have the type."""
        return self.kind.name.lower()

    def decoded(self) -> np.ndarray:
        """Read and decode it: float32, the slowest axis first.

        Raises:
          UserError: if its quantisation has no decoder.
          ValueError: if the file has been cut.
        """
        import gguf  # slow to import, and no other kind of file needs it

        block, _ = gguf.GGML_QUANT_SIZES[self.kind]
        values = np.empty((self.count, block), "<f4")
        step = DECODED // block
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.start)
                if self.kind == gguf.GGMLQuantizationType.F32:
                    fill(values, file)
                    return values.reshape(self.shape[::-1])
                for start in range(0, self.count, step):
                    into = values[start : start + step]
                    part = np.empty((1, len(into) * self.size), np.uint8)
                    fill(part, file)
                    # As one row: rows are decoded sixteen at a time, which takes far longer where they are short.
                    into[...] = gguf.dequantize(part, self.kind).reshape(-1, block)
        except NotImplementedError:
            raise UserError(f"weights of type {self.kind.name} cannot be decoded; use another quantisation") from None
        return values.reshape(self.shape[::-1])


class GgufFile:
    """A GGUF file, opened: its header is read, no tensor is.

    Attributes:
      architecture: as the file calls it.
      dropout: None, as such files do not say it.
    """

    dropout: float | None = None
    digest_is_apart = True

    def __init__(self, path: Path) -> None:
        """Read the header of the file at `path`.

        Raises:
          UserError: if it is of an architecture, version or byte order that is not supported.
          ValueError: if it is truncated or damaged.
        """
        self._path = path
        self._unchanged = Unchanged([path])
        self._header = gguf_header.read(path)
        self._family = families.find(self._header.metadata.get("general.architecture"), str(path), by="gguf")
        self.architecture = self._family.gguf

    @functools.cached_property
    def _tensors(self) -> Mapping[str, Tensor]:
        """The tensors, all of whose bytes are in the file."""
        return {name: _within(self._path, self._header, info) for name, info in self._header.tensors.items()}

    def config(self, dtype: str, precision: str) -> ModelConfig:
        """Read the settings; of the weights, which there are and how they are stored.

        Args:
          dtype: as of `load.load`.
          precision: as of `load.load`.

        Raises:
          UserError: if they are not those of a model that is supported.
          ValueError: if a tensor is not all in the file.
        """
        prefix, tensors = f"{self.architecture}.", self._tensors
        stated = {key: value for key, value in self._header.metadata.items() if key.startswith(prefix)}
        own = Settings({key.removeprefix(prefix): value for key, value in stated.items()})
        embedding = tensors.get("token_embd.weight")
        return model_config(
            str(self._path),
            own,
            lambda: self._family.gguf_fields(own, tensors),
            dtype=stored_as(embedding and embedding.dtype, dtype),
            precision=precision,
        )

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer that the metadata describes.

        Raises:
          UserError: if it is of a kind that is not supported.
        """
        return tokenizer.from_gguf(self._header.metadata, self._path)

    def weights(self, config: ModelConfig, mesh: jax.sharding.Mesh | None) -> Params:
        """Read the weights.

        Args:
          config: from `config`.
          mesh: as of `load.load`.

        Raises:
          UserError: if they are not those that the config calls for.
        """
        with self._unchanged.while_read():
            return assemble(self._parameters(config), config, mesh)

    def streamed(self, config: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[Params, Streamed]:
        """Read what is not in a layer, and return what reads layers; see `weights`."""
        parameters, unchanged, seen = self._parameters(config), self._unchanged, set()

        def read(layer: int) -> dict[str, np.ndarray]:
            with unchanged.while_read(), faults_of(self._path):
                weights = parameters.layer(layer, checked=layer in seen)
            seen.add(layer)
            return weights

        with unchanged.while_read():
            rest = assemble(parameters, config, mesh, layers=False)
        return rest, Streamed(config, mesh, read)

    def _parameters(self, config: ModelConfig) -> Parameters:
        def read(name: str) -> np.ndarray:
            try:
                return tensors[name].decoded()
            except UserError as error:
                raise UserError(f"{self._path}: tensor {name}: {error}") from error

        tensors, names = self._tensors, {name: name for name in self._tensors}
        form, ignored = self._family.gguf_form, (r"rope_freqs\.weight",)
        return Parameters(config, self._family, Tensors(self._path, read, names, form, COLUMN, ignored))

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the file."""
        return sha256(self._path)


def _within(path: Path, header: Header, info: TensorInfo) -> Tensor:
    """Find a tensor's bytes, all of which have to be in the file."""
    import gguf

    kind = gguf.GGMLQuantizationType(info.kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if info.shape[0] % block:
        raise ValueError(f"tensor {shown(info.name)} has rows of {info.shape[0]:,}, not of whole blocks of {block}")
    count, last = math.prod(info.shape) // block, len(header.data)
    if info.start + count * size > last:
        raise ValueError(f"tensor {shown(info.name)} ends at byte {info.start + count * size:,} of {last:,}")
    return Tensor(info.shape, kind, path, info.start, count, size)
