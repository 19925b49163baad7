"""A `transformers` model in memory: its config read as a `config.json`, its state dict as a directory's tensors.

Neither PyTorch nor `transformers` is imported; objects are known by what they have.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from hydra_jax.engine.layers import Streamed
from hydra_jax.errors import UserError, reason, shown
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import Params
from hydra_jax.text.tokenizer import encode
from hydra_jax.weights import families
from hydra_jax.weights.assemble import Parameters, Tensors, assemble
from hydra_jax.weights.directory import COLUMN, Stated, floats
from hydra_jax.weights.settings import HARMLESS, STORED_TYPES

# fmt: off
RUNTIME = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash",
    "attn_implementation", "begin_suppress_tokens", "bad_words_ids", "chunk_size_feed_forward",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "label2id", "length_penalty", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "problem_type",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "temperature", "tf_legacy_loss", "top_k", "top_p", "torchscript", "typical_p", "use_bfloat16",
})
"""Settings that every config in memory has, and `config.json` has not: of outputs, generation and other heads."""
# fmt: on
PLAIN: Mapping[str, Any] = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
}
"""Others of theirs, and the values at which they change nothing."""

ADAPTED = re.compile(r"^base_model\.|\.base_layer\.|\blora_|\bmodules_to_save\b|\bprompt_encoder\b")
"""The names that `peft` gives to tensors."""

ARRAYS = ("Tensor", "Parameter")
"""Types of tensors whose numbers are what they seem: subclasses are quantised, or parts of one on other devices."""

REMEDY = "give the model as AutoModelForCausalLM makes it, without changes to its modules"
PROBES = ("a b", "The capital of France,\n12 x.")
"""Texts that a tokenizer and the one inside it have to encode alike."""


class PretrainedModel(typing.Protocol):
    """A model of `transformers`, as far as it is needed."""

    config: Any

    def state_dict(self) -> Mapping[str, Any]:
        """Return its tensors by name."""


def is_model(given: object) -> bool:
    """Return whether a thing is a `transformers` model, or passes for one."""
    return hasattr(given, "state_dict") and hasattr(getattr(given, "config", None), "to_dict")


class InMemory:
    """A model in memory, opened: its config is read, no weights are.

    Attributes:
      architecture: its `model_type`.
      dropout: None, as what a config says of it need not be what was done.
      name: what it was loaded from, or its class.
      where: the model, in messages.
    """

    dropout: float | None = None
    digest_is_apart = True

    def __init__(self, model: PretrainedModel, tokenizer: object) -> None:
        """Read the config of `model`; `tokenizer` is of `transformers` or `tokenizers`.

        Raises:
          UserError: if the model is not supported or has no numbers, or the tokenizer is missing.
        """
        model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        kind = type(model).__name__
        self.name = str(getattr(model.config, "_name_or_path", "") or kind)
        self.where = kind if self.name == kind else f"{kind} {self.name}"
        if tokenizer is None:
            raise UserError(f"{self.where}: a model in memory has no tokenizer; give it too: load(model, tokenizer)")
        self._given = tokenizer
        self._made: Tokenizer | None = None
        with self._faults("its config and tensors cannot be read"):
            values, self._tensors = dict(model.config.to_dict()), dict(model.state_dict())
        self._refuse(values)
        self.architecture = str(values.get("model_type"))
        self._family = family = families.find(values.get("model_type"), self.where)
        self._settings = _of_the_model(values.get(family.nested) or {} if family.nested else values)
        self._versions = {name: _version(tensor) for name, tensor in self._tensors.items()}
        self._names = {
            ours: name
            for ours, name in family.names_in(self._tensors).items()
            if not any(re.fullmatch(pattern, ours) for pattern in family.ignored)
        }
        self._refuse_without_values()
        self._tied_head = ""
        self._settle()
        stated = {"model_type": self.architecture, family.nested: self._settings} if family.nested else self._settings
        self._stated = Stated(self.where, stated, family)

    def config(self, dtype: str, precision: str) -> ModelConfig:
        """Read the settings, as `Stated.config`."""
        return self._stated.config(dtype, precision)

    def tokenizer(self) -> Tokenizer:
        """Return a copy of the tokenizer.

        Raises:
          UserError: if it cannot be copied, encodes unlike the copy, or is not the model's.
        """
        if self._made is not None:
            return self._made
        made = _copied(self._given, self.where)
        tokens, rows = made.get_vocab_size(with_added_tokens=False), self._settings.get("vocab_size")
        if isinstance(rows, int) and tokens > rows:
            raise UserError(
                f"{self.where}: the tokenizer has {tokens:,} tokens, the embedding {rows:,} rows; give the tokenizer"
                " that the model was trained with"
            )
        self._made = made
        return made

    def weights(self, config: ModelConfig, mesh: jax.sharding.Mesh | None) -> Params:
        """Copy the weights.

        Args:
          config: from `config`.
          mesh: as of `load.load`.

        Raises:
          UserError: if they are not those that the config calls for.
        """
        return assemble(self._parameters(config), config, mesh)

    def streamed(self, config: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[Params, Streamed]:
        """Copy what is not in a layer, and return what reads layers from the model; see `weights`."""
        parameters, seen = self._parameters(config), set()

        def read(layer: int) -> dict[str, np.ndarray]:
            weights = parameters.layer(layer, checked=layer in seen)
            seen.add(layer)
            return weights

        return assemble(parameters, config, mesh, layers=False), Streamed(config, mesh, read)

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the settings, the tokenizer, and the tensors: names, types, shapes and bytes."""
        sums = hashlib.sha256()
        settings = {key: value for key, value in self._settings.items() if key not in HARMLESS}
        settings["model_type"] = self.architecture
        for part in (json.dumps(settings, sort_keys=True, default=str), self.tokenizer().to_str()):
            sums.update(f"{hashlib.sha256(part.encode()).hexdigest()}\n".encode())
        for ours, name in sorted(self._names.items()):
            if name == self._tied_head:
                continue
            array, kind = self._read(name), _type(self._tensors[name])
            sums.update(f"{ours} {kind} {array.shape}\n".encode())
            sums.update(np.ascontiguousarray(array.astype(jnp.dtype(kind), copy=False)).reshape(-1).view(np.uint8).data)
        return sums.hexdigest()

    def _refuse(self, values: Mapping[str, Any]) -> None:
        """Refuse models whose tensors are not the weights that a decoder computes with."""
        if values.get("is_encoder_decoder"):
            raise UserError(f"{self.where}: is an encoder with a decoder; give a causal language model")
        if values.get("quantization_config"):
            raise UserError(f"{self.where}: is quantised; load it with from_pretrained without quantization_config")
        adapted = next(filter(ADAPTED.search, self._tensors), "")
        if adapted:
            raise UserError(
                f"{self.where}: tensor {adapted} is of an adapter; merge adapters first: model.merge_and_unload() of"
                " peft returns a model without"
            )

    def _refuse_without_values(self) -> None:
        for name in self._names.values():
            tensor = self._tensors[name]
            if getattr(getattr(tensor, "device", None), "type", "") == "meta":
                raise UserError(
                    f"{self.where}: tensor {name} is on the meta device, without values; load the model with"
                    " from_pretrained, all of it onto a CPU or GPU (no offloading by device_map)"
                )

    def _settle(self) -> None:
        """Let the tensors say what type they are stored in, and whether the unembedding is the embedding."""
        table = self._family.names
        embedding, head = (self._names.get(f"{table[ours][COLUMN]}.weight") for ours in ("embedding", "unembedding"))
        if embedding is not None:
            self._settings.pop("torch_dtype", None)
            self._settings["dtype"] = _type(self._tensors[embedding])
        if embedding is None or head is None or self._settings.get("tie_word_embeddings") is False:
            return
        if self._alike(embedding, head):
            self._tied_head = head
        else:  # then it is the head that the model computes with
            self._settings["tie_word_embeddings"] = False

    def _alike(self, one: str, other: str) -> bool:
        places = [getattr(self._tensors[name], "data_ptr", lambda name=name: name)() for name in (one, other)]
        same_shape = tuple(self._tensors[one].shape) == tuple(self._tensors[other].shape)
        return same_shape and (places[0] == places[1] or np.array_equal(self._read(one), self._read(other)))

    def _parameters(self, config: ModelConfig) -> Parameters:
        tensors = Tensors(self.where, floats(self._read), self._names, self._family.form, COLUMN, (), REMEDY)
        return Parameters(config, self._family, tensors)

    def _read(self, name: str) -> np.ndarray:
        """Return a tensor's numbers, where it can be had without a copy of it; bfloat16, which NumPy lacks, as float32.

        Raises:
          UserError: if it holds no floats, or not those that it held.
        """
        tensor = self._tensors[name]
        kind = type(tensor).__name__
        if kind not in ARRAYS or _type(tensor) not in STORED_TYPES:
            what = _type(tensor) if kind in ARRAYS else f"a {kind}"
            raise UserError(
                f"{self.where}: tensor {name} holds {what}, not plain floats of 16 bits or more; load the model"
                " unquantised, and whole on one device or more"
            )
        with self._faults(f"tensor {name} cannot be read"):
            tensor = tensor.detach().cpu()
            array = np.asarray((tensor.float() if _type(tensor) == "bfloat16" else tensor).numpy())
        # After the reading: layers are read for as long as the model is used, and training goes on in place.
        if _version(self._tensors[name]) != self._versions[name]:
            raise UserError(
                f"{self.where}: tensor {name} has changed since the model was loaded; load a copy of it:"
                " load(copy.deepcopy(model), tokenizer)"
            )
        return array

    @contextlib.contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:  # of whatever was given
            raise UserError(f"{self.where}: {what} ({reason(error)}); {REMEDY}") from error


def _of_the_model(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without those that every config in memory has, and that change nothing."""
    return {
        key: value
        for key, value in values.items()
        if key not in RUNTIME and not (key in PLAIN and (value is None or value == PLAIN[key]))
    }


def _type(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _version(tensor: Any) -> int:
    """Return how often a tensor was changed in place, as PyTorch counts."""
    try:
        return int(getattr(tensor, "_version", 0))
    except RuntimeError:  # of inference mode, in which nothing is counted
        return 0


def _copied(given: Any, where: str) -> Tokenizer:
    """Copy a tokenizer, but for its padding and truncation."""
    backend = given if isinstance(given, Tokenizer) else getattr(given, "backend_tokenizer", None)
    kind = type(given).__name__
    if not isinstance(backend, Tokenizer):
        if hasattr(given, "convert_ids_to_tokens"):
            raise UserError(
                f"{where}: {kind} is a slow tokenizer, written in Python; give a fast one, from"
                " AutoTokenizer.from_pretrained(..., use_fast=True)"
            )
        raise UserError(f"{where}: {shown(given)} is not a tokenizer; give one from AutoTokenizer.from_pretrained")
    try:
        made = Tokenizer.from_str(backend.to_str())
        made.encode_special_tokens = backend.encode_special_tokens
    except Exception as error:
        raise UserError(
            f"{where}: tokenizer {kind} cannot be copied ({reason(error)}); give one without parts in Python"
        ) from error
    made.no_padding()
    made.no_truncation()
    if given is not backend:
        _check_alike(given, backend, made, where)
    return made


def _check_alike(given: Any, backend: Tokenizer, made: Tokenizer, where: str) -> None:
    """Refuse a tokenizer of `transformers` that encodes unlike the copy of its `backend`, but for what it ends with."""
    padding, truncation = backend.padding, backend.truncation  # which a call takes away
    try:
        for text in PROBES:
            theirs, ours = list(given(text)["input_ids"]), encode(made, text)
            if theirs[: len(ours)] != ours or not set(theirs[len(ours) :]) <= set(given.all_special_ids):
                raise UserError(
                    f"{where}: tokenizer {type(given).__name__} encodes {text!r} as {shown(theirs)}, its"
                    f" backend_tokenizer as {shown(ours)}; give the tokenizers.Tokenizer that the model is to be read"
                    " with"
                )
    finally:
        if padding:
            backend.enable_padding(**padding)
        if truncation:
            backend.enable_truncation(**truncation)
