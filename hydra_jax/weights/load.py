"""A model from a GGUF file or a Hugging Face directory. Both are untrusted: read as data, checked whole."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from tokenizers import Tokenizer

from hydra_jax.config import AS_STORED, LAST_STEP
from hydra_jax.engine import mesh as meshes
from hydra_jax.errors import UserError, reason
from hydra_jax.models import transformer
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import Params
from hydra_jax.store.digests import sha256
from hydra_jax.text import tokenizer
from hydra_jax.weights import families, hub, trained
from hydra_jax.weights.assemble import Source, assemble
from hydra_jax.weights.check import check
from hydra_jax.weights.families import Family
from hydra_jax.weights.settings import Settings, model_config

_HUGGING_FACE, _GGUF = 0, 1  # columns of a family's names
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


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
    def config(self) -> ModelConfig:
        """The model's shape and switches."""
        return self.params.config


def load(
    name: str,
    dtype: str = "float32",
    precision: str = "highest",
    step: int = LAST_STEP,
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """Load a model.

    Args:
      name: one of `hub.MODELS`; a path to a `.gguf` file; a path to a directory with `config.json`,
        `*.safetensors` and `tokenizer.json`; one that `python -m launch.train` trained into; or a Hugging
        Face Hub id, "owner/name" or "owner/name@revision".
      dtype: "float32" or "bfloat16", for weights, keys and values; or "auto", bfloat16 where the weights are
        stored in it (`torch_dtype` of `config.json` says so, or the embedding of a GGUF file is), else float32.
      precision: "highest", "high" or "default", of float32 matrix products.
      step: of a model that was trained here, which checkpoint; LAST_STEP for the last.
      mesh: from `mesh.make`, the devices that the parameters are laid on, layer by layer as they are read; None
        for one device.

    Raises:
      UserError: if it cannot be found, fetched or read, is damaged, is of an unknown architecture, or
        fails `check`.
    """
    path = hub.locate(name)
    if trained.is_trained(path):
        return _trained(name, path, dtype, precision, step, mesh)
    if step != LAST_STEP:
        raise UserError(f"{path}: is not a directory of a training run, and has no step {step}; leave model_step out")
    _refuse_pickled(path)
    read = _read_directory if path.is_dir() else _read_gguf
    with _faults_of(path), ThreadPoolExecutor(1) as other:
        summing = other.submit(weights_hash, path)
        params, text = read(path, mesh, dtype=dtype, precision=precision)
        # Added tokens may have no row: Gemma 3's text models come with one for images.
        tokens = text.get_vocab_size(with_added_tokens=False)
        if tokens > params.config.vocab_size:
            raise UserError(
                f"{path}: the tokenizer has {tokens:,} tokens, the embedding {params.config.vocab_size:,} rows;"
                " fetch the model again"
            )
        check(params, str(path))
        digest = summing.result()
    known = hub.MODELS.get(name)
    return Model(name, params, text, digest, known.dropout if known else None)


def _trained(name: str, path: Path, dtype: str, precision: str, step: int, mesh: jax.sharding.Mesh | None) -> Model:
    from hydra_jax.weights import checkpoints  # orbax is slow to import, and most runs never need it

    config, dropout = trained.model_config(path, dtype, precision)
    kept = transformer.layout(dataclasses.replace(config, dtype="float32")).weights
    weights, digest, _ = checkpoints.weights(path, kept, step)
    like = transformer.layout(config).weights
    params = Params(weights=jax.tree.map(lambda array, like: array.astype(like.dtype), weights, like), config=config)
    if mesh is not None:
        params = meshes.lay(mesh, params)
    check(params, str(path))
    return Model(name, params, tokenizer.from_file(path / trained.TOKENIZER), digest, dropout)


def _refuse_pickled(path: Path) -> None:
    if path.suffix in PICKLED:
        raise UserError(f"{path}: is pickled, which is never read: {hub.CONVERT}")


def weights_hash(path: Path) -> str:
    """SHA-256 (hex) of a file, or of a directory's config, tokenizer and weight files in order of name."""
    if path.is_file():
        return sha256(path)
    files = [path / "config.json", path / "tokenizer.json", *path.glob("*.safetensors")]
    digests = "".join(f"{file.name} {sha256(file)}\n" for file in sorted(files))
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
        raise UserError(f"{path}: truncated or damaged ({reason(error)}); fetch it again") from error


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


@dataclasses.dataclass(frozen=True)
class _Gguf:
    """A GGUF file, opened but for the tensors' values."""

    metadata: dict[str, Any]
    tensors: dict[str, Any]
    family: Family
    config: ModelConfig


def _open_gguf(path: Path, **switches: str) -> _Gguf:
    reader = _Reader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = metadata.get("general.architecture")
    family = families.find(architecture, str(path), by="gguf")
    prefix = f"{architecture}."
    own = Settings({key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)})
    embedding = tensors.get("token_embd.weight")
    switches = _stored_as(embedding and embedding.tensor_type.name.lower(), switches)
    config = model_config(str(path), own, lambda: family.gguf_fields(own, tensors), **switches)
    return _Gguf(metadata, tensors, family, config)


def _read_gguf(path: Path, mesh: jax.sharding.Mesh | None, **switches: str) -> tuple[Params, Tokenizer]:
    file = _open_gguf(path, **switches)

    def read(name: str) -> np.ndarray:
        tensor = file.tensors[name]
        return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)

    names = {name: name for name in file.tensors}
    source = Source(path, read, names, file.family.gguf_form, _GGUF, (r"rope_freqs\.weight",))
    return assemble(file.config, file.family, source, mesh), tokenizer.from_gguf(file.metadata, path)


def _directory_config(path: Path, **switches: str) -> tuple[str, Family, ModelConfig]:
    for needed in ("config.json", "tokenizer.json"):
        if not (path / needed).is_file():
            raise UserError(f"{path}: has no {needed}; a model directory needs it beside its *.safetensors")
    return _stated_config(path / "config.json", **switches)


def read_settings(path: Path, **switches: str) -> ModelConfig:
    """The config of a Hugging Face `config.json` alone.

    Args:
      path: of the file.
      switches: `dtype` and `precision`, as of `load`.

    Raises:
      UserError: as `load`.
    """
    return _stated_config(path, **switches)[2]


def _stated_config(described: Path, **switches: str) -> tuple[str, Family, ModelConfig]:
    stated = _json_object(described)
    family = families.find(stated.get("model_type"), str(described))
    with _faults_of(described):
        own = Settings(stated.get(family.nested, {}) if family.nested else stated, family.defaults)
    types = [get(key, None) for get in (stated.get, own) for key in ("dtype", "torch_dtype")]
    switches = _stored_as(next(filter(None, types), None), switches)
    config = model_config(str(described), own, lambda: family.fields(own), **switches)
    return str(stated["model_type"]), family, config


def _stored_as(name: object, switches: Mapping[str, str]) -> dict[str, str]:
    """`switches`, of which a dtype of `AS_STORED` becomes ours for weights stored as `name`."""
    if switches.get("dtype") != AS_STORED:
        return dict(switches)
    return {**switches, "dtype": "bfloat16" if name in ("bf16", "bfloat16") else "float32"}


def read_config(path: Path, **switches: str) -> tuple[str, ModelConfig]:
    """The architecture, as the file calls it, and the config of a GGUF file or directory; no weights are read.

    Args:
      path: from `hub.locate`.
      switches: `dtype` and `precision`, as of `load`.

    Raises:
      UserError: as `load`.
    """
    if trained.is_trained(path):
        return "llama, trained here", trained.model_config(path, **switches)[0]
    _refuse_pickled(path)
    with _faults_of(path):
        if path.is_dir():
            architecture, _, config = _directory_config(path, **switches)
            return architecture, config
        file = _open_gguf(path, **switches)
        return str(file.metadata["general.architecture"]), file.config


def _read_directory(path: Path, mesh: jax.sharding.Mesh | None, **switches: str) -> tuple[Params, Tokenizer]:
    _, family, config = _directory_config(path, **switches)
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        names: dict[str, str] = {}
        for file in _shards(path):
            with _faults_of(file):
                opened = stack.enter_context(safetensors.safe_open(file, framework="flax"))
                files |= dict.fromkeys(opened.keys(), opened)
        for name in files:
            old, new = next((pair for pair in family.renamed if name.startswith(pair[0])), ("", ""))
            names[new + name.removeprefix(old)] = name

        def read(name: str) -> np.ndarray:
            array = np.asarray(files[name].get_tensor(name))
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise UserError(f"{path}: tensor {name} holds {array.dtype}, not floats; use unquantised weights")
            return array.astype(np.float32)

        source = Source(path, read, names, family.form, _HUGGING_FACE, family.ignored)
        return assemble(config, family, source, mesh), tokenizer.from_file(path / "tokenizer.json")


def _json_object(path: Path) -> Mapping[str, Any]:
    with _faults_of(path):
        values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: is not a JSON object; fetch the model again")
    return values


def _shards(path: Path) -> list[Path]:
    """The weight files of a directory: those that its index names, or the one of the usual name, or all."""
    index = path / INDEX
    if not index.is_file():
        if (path / SINGLE).is_file():  # and not another copy beside it
            return [path / SINGLE]
        found = sorted(path.glob("*.safetensors"))
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLED)
        if not found:
            raise UserError(
                f"{path}: has no *.safetensors"
                + (f"; {pickled[0]} is pickled, which is never read: {hub.CONVERT}" if pickled else "; fetch it again")
            )
        return found
    shards = _json_object(index).get("weight_map")
    if not isinstance(shards, Mapping) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{index}: has no weight_map of names; fetch the model again")
    for name in sorted(set(shards.values())):
        if Path(name).name != name or not name.endswith(".safetensors") or not (path / name).is_file():
            raise UserError(f"{path}: has no {name}, which {INDEX} names; fetch the model again")
    return [path / name for name in sorted(set(shards.values()))]
