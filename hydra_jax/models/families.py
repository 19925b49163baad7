"""Names and shapes of published weights: a table a family, one row a parameter.

A row is (our path, Hugging Face name, GGUF name); `{}` stands for the layer. Published matrices are
[out, in]; ours are [in, out].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hydra_jax.errors import UserError
from hydra_jax.models.config import ModelConfig

Row = tuple[str, str, str]


def _layer(path: str, hugging_face: str, gguf: str) -> Row:
    return f"layers/{path}", f"model.layers.{{}}.{hugging_face}.weight", f"blk.{{}}.{gguf}.weight"


LLAMA: tuple[Row, ...] = (
    ("embedding", "model.embed_tokens.weight", "token_embd.weight"),
    _layer("attn_norm/scale", "input_layernorm", "attn_norm"),
    _layer("attn/query/kernel", "self_attn.q_proj", "attn_q"),
    _layer("attn/key/kernel", "self_attn.k_proj", "attn_k"),
    _layer("attn/value/kernel", "self_attn.v_proj", "attn_v"),
    _layer("attn/out/kernel", "self_attn.o_proj", "attn_output"),
    _layer("mlp_norm/scale", "post_attention_layernorm", "ffn_norm"),
    _layer("mlp/gate/kernel", "mlp.gate_proj", "ffn_gate"),
    _layer("mlp/up/kernel", "mlp.up_proj", "ffn_up"),
    _layer("mlp/down/kernel", "mlp.down_proj", "ffn_down"),
    ("final_norm/scale", "model.norm.weight", "output_norm.weight"),
    ("unembedding", "lm_head.weight", "output.weight"),
)


@dataclasses.dataclass(frozen=True)
class Family:
    """How one architecture is published.

    Attributes:
      rows: the parameter table.
      from_hugging_face: `config.json` -> ModelConfig fields.
      from_gguf: GGUF metadata (and the set of tensor names) -> ModelConfig fields.
      gguf_interleaved: parameters whose rows GGUF reorders, by a head's number of rows: llama.cpp
        rotates neighbouring dimensions (2i, 2i + 1), Hugging Face and this project (i, i + half).
    """

    rows: tuple[Row, ...]
    from_hugging_face: Callable[[Mapping[str, Any]], dict[str, Any]]
    from_gguf: Callable[[Mapping[str, Any], set[str]], dict[str, Any]]
    gguf_interleaved: tuple[str, ...] = ()


def _llama_from_hugging_face(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"rotary scaling {rope} is not supported; use a model without it")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise UserError(f"{key} is set; only models without biases are supported")
    heads = config["num_attention_heads"]
    return dict(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        mlp_width=config["intermediate_size"],
        context=config["max_position_embeddings"],
        rope_base=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied=bool(config.get("tie_word_embeddings", False)),
        activation=_activation(config.get("hidden_act", "silu")),
    )


def _llama_from_gguf(metadata: Mapping[str, Any], tensors: set[str]) -> dict[str, Any]:
    if metadata.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in tensors:
        raise UserError("GGUF metadata: rotary scaling is not supported; use a model without it")
    heads = metadata["llama.attention.head_count"]
    width = metadata["llama.embedding_length"]
    return dict(
        vocab_size=metadata.get("llama.vocab_size") or len(metadata["tokenizer.ggml.tokens"]),
        width=width,
        layers=metadata["llama.block_count"],
        heads=heads,
        kv_heads=metadata.get("llama.attention.head_count_kv", heads),
        head_dim=metadata.get("llama.attention.key_length", width // heads),
        mlp_width=metadata["llama.feed_forward_length"],
        context=metadata["llama.context_length"],
        rope_base=float(metadata.get("llama.rope.freq_base", 10_000.0)),
        norm_eps=float(metadata["llama.attention.layer_norm_rms_epsilon"]),
        tied="output.weight" not in tensors,
    )


def _activation(name: str) -> str:
    known = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if name not in known:
        raise UserError(f"hidden_act {name!r} is not supported; known: {', '.join(known)}")
    return known[name]


_LLAMA = Family(LLAMA, _llama_from_hugging_face, _llama_from_gguf, ("attn/query/kernel", "attn/key/kernel"))

FAMILIES: dict[str, Family] = {"llama": _LLAMA}
"""By Hugging Face's `model_type`, which for these is also GGUF's `general.architecture`."""


def family(name: object, where: str) -> Family:
    """The family called `name`.

    Raises:
      UserError: if it is not a known one.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{where}: architecture {name!r} is not supported; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def model_config(where: str, read: Callable[[], dict[str, Any]], **switches: Any) -> ModelConfig:
    """A ModelConfig of what `read` finds, its faults reported as faults of the file `where`."""
    try:
        return ModelConfig(**(read() | switches))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except KeyError as error:
        raise UserError(f"{where}: {error} is missing; fetch the model again") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{where}: {error}; fetch the model again") from error


def half_rotation(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder [heads * head_dim, in] from neighbouring rotary pairs to halves."""
    outputs, inputs = rows.shape
    return rows.reshape(heads, outputs // heads // 2, 2, inputs).swapaxes(1, 2).reshape(outputs, inputs)
