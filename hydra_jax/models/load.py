"""A model from a GGUF file or a Hugging Face directory. Both are untrusted: read as data, checked whole."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util
from tokenizers import Tokenizer

from hydra_jax.errors import UserError
from hydra_jax.models import hub, tokenizer, transformer
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.families import Family, family, half_rotation, model_config
from hydra_jax.models.transformer import Params

_HUGGING_FACE, _GGUF = 1, 2  # columns of a family's rows


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model, ready to be ablated.

    Attributes:
      name: as it was asked for.
      params: weights and config.
      tokenizer: text to tokens and back.
      weights_hash: SHA-256 of the file, or of the directory's files in order of name.
    """

    name: str
    params: Params
    tokenizer: Tokenizer
    weights_hash: str

    @property
    def config(self) -> ModelConfig:
        """The model's shape and switches."""
        return self.params.config


def load(name: str, dtype: str = "float32", precision: str = "highest") -> Model:
    """Load a model.

    Args:
      name: one of `hub.MODELS`; a path to a `.gguf` file; a path to a directory with `config.json`,
        `*.safetensors` and `tokenizer.json`; or a Hugging Face Hub id, "owner/name".
      dtype: "float32" or "bfloat16", for weights, keys and values.
      precision: "highest", "high" or "default", of float32 matrix products.

    Raises:
      UserError: if it cannot be found, fetched or read, is damaged, or is of an unknown architecture.
    """
    path = hub.locate(name)
    read = _read_directory if path.is_dir() else _read_gguf
    with _faults_of(path):
        params, text = read(path, dtype=dtype, precision=precision)
        if text.get_vocab_size() > params.config.vocab_size:
            raise UserError(
                f"{path}: the tokenizer has {text.get_vocab_size():,} tokens, the embedding"
                f" {params.config.vocab_size:,} rows; fetch the model again"
            )
    return Model(name=name, params=params, tokenizer=text, weights_hash=weights_hash(path))


def weights_hash(path: Path) -> str:
    """SHA-256 (hex) of a file, or of a directory's config, tokenizer and weight files in order of name."""
    if path.is_file():
        return hub.sha256(path)
    files = [path / "config.json", path / "tokenizer.json", *path.glob("*.safetensors")]
    digests = "".join(f"{file.name} {hub.sha256(file)}\n" for file in sorted(files))
    return hashlib.sha256(digests.encode()).hexdigest()


@contextlib.contextmanager
def _faults_of(path: Path) -> Iterator[None]:
    """Whatever a parser raises on a damaged file is a fault of that file."""
    try:
        yield
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path}: does not fit into memory; use a smaller model or a larger machine") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: truncated or damaged ({reason}); fetch it again") from error


class _Reader(gguf.GGUFReader):
    """Reads an array of numbers at once; one by one, a damaged length would keep it busy for hours."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        array = gguf.GGUFValueType.ARRAY
        kind = self._get(orig_offs, np.uint32)
        number = self.gguf_scalar_to_np.get(kind[0]) if raw_type == array else None
        if number is None:
            return super()._get_field_parts(orig_offs, raw_type)
        length = self._get(orig_offs + kind.nbytes, np.uint64)
        values = self._get(orig_offs + kind.nbytes + length.nbytes, number, length[0])
        if len(values) < length[0]:
            raise ValueError(f"an array of {length[0]} ends after {len(values)}")
        parts = [kind, length, values]
        return sum(part.nbytes for part in parts), parts, [2], [array, gguf.GGUFValueType(kind[0])]


def _read_gguf(path: Path, **switches: str) -> tuple[Params, Tokenizer]:
    reader = _Reader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    known = family(metadata.get("general.architecture"), str(path))
    config = model_config(str(path), lambda: known.from_gguf(metadata, set(tensors)), **switches)
    interleaved = {f"layers/{path}" for path in known.gguf_interleaved}

    def read(ours: str, name: str) -> np.ndarray:
        tensor = tensors[name]
        array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if ours in interleaved:
            array = half_rotation(array, array.shape[0] // config.head_dim)
        return array

    return _assemble(config, known, _GGUF, read, set(tensors), path), tokenizer.from_gguf(metadata, path)


def _read_directory(path: Path, **switches: str) -> tuple[Params, Tokenizer]:
    for needed in ("config.json", "tokenizer.json"):
        if not (path / needed).is_file():
            raise UserError(f"{path}: has no {needed}; a model directory needs it beside its *.safetensors")
    described = path / "config.json"
    with _faults_of(described):
        settings = json.loads(described.read_text(encoding="utf-8"))
    if not isinstance(settings, Mapping):
        raise UserError(f"{described}: is not a JSON object; fetch the model again")
    known = family(settings.get("model_type"), str(described))
    config = model_config(str(described), lambda: known.from_hugging_face(settings), **switches)
    with contextlib.ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for file in sorted(path.glob("*.safetensors")):
            with _faults_of(file):
                opened = stack.enter_context(safetensors.safe_open(file, framework="flax"))
            tensors |= dict.fromkeys(opened.keys(), opened)
        if not tensors:
            raise UserError(f"{path}: has no *.safetensors; pickled weights (*.bin, *.pt) are never read")

        def read(ours: str, name: str) -> np.ndarray:
            del ours
            return np.asarray(tensors[name].get_tensor(name)).astype(np.float32)

        params = _assemble(config, known, _HUGGING_FACE, read, set(tensors), path)
    return params, tokenizer.from_file(path / "tokenizer.json")


def _assemble(
    config: ModelConfig,
    known: Family,
    column: int,
    read: Callable[[str, str], np.ndarray],
    names: set[str],
    path: Path,
) -> Params:
    """Read every parameter that the config calls for, check it, and stack the layers."""
    template = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0))).weights
    expected = traverse_util.flatten_dict(template, sep="/")
    table = {row[0]: row[column] for row in known.rows}
    weights: dict[str, Any] = {}
    for ours, struct in expected.items():
        stacked = ours.startswith("layers/")
        shape = struct.shape[1:] if stacked else struct.shape
        arrays = []
        for layer in range(config.layers if stacked else 1):
            name = table[ours].format(layer)
            if name not in names:
                raise UserError(f"{path}: tensor {name} is missing; fetch the model again")
            array = read(ours, name)
            array = array.T if ours.endswith("kernel") or ours == "unembedding" else array
            if array.shape != shape:
                raise UserError(
                    f"{path}: tensor {name} has shape {array.shape}, the config calls for {shape}; fetch it again"
                )
            if not np.isfinite(array).all():
                raise UserError(f"{path}: tensor {name} holds NaN or infinity; fetch it again")
            arrays.append(array.astype(struct.dtype))
        weights[ours] = jnp.asarray(np.stack(arrays) if stacked else arrays[0])
    return Params(weights=traverse_util.unflatten_dict(weights, sep="/"), config=config)
