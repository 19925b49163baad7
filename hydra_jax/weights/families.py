"""Architectures as they are published: tables of the names of their weights, and what is particular about each.

A table's rows are our module -> (Hugging Face's, GGUF's); `{}` stands for the layer. Several modules
with one published name are fused there, in the table's order. Published matrices are [out, in]; ours
are [in, out].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from hydra_jax.errors import UserError
from hydra_jax.models.config import ModelConfig
from hydra_jax.weights import gguf_settings, settings
from hydra_jax.weights.settings import Fields, Settings

Names = dict[str, tuple[str, str]]
Form = Callable[[str, np.ndarray, ModelConfig], np.ndarray]
"""(our path, published array, config) -> the array [out, in], its fused parts one after the other."""


def _layer(hugging_face: str, rows: Names) -> Names:
    return {f"layers/{ours}": (f"{hugging_face}.{{}}.{hf}", f"blk.{{}}.{gguf}") for ours, (hf, gguf) in rows.items()}


LLAMA: Names = {
    "embedding": ("model.embed_tokens", "token_embd"),
    "final_norm": ("model.norm", "output_norm"),
    "unembedding": ("lm_head", "output"),
} | _layer(
    "model.layers",
    {
        "attn_norm": ("input_layernorm", "attn_norm"),
        "attn/query": ("self_attn.q_proj", "attn_q"),
        "attn/key": ("self_attn.k_proj", "attn_k"),
        "attn/value": ("self_attn.v_proj", "attn_v"),
        "attn/query_norm": ("self_attn.q_norm", "attn_q_norm"),
        "attn/key_norm": ("self_attn.k_norm", "attn_k_norm"),
        "attn/out": ("self_attn.o_proj", "attn_output"),
        "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
        "mlp/gate": ("mlp.gate_proj", "ffn_gate"),
        "mlp/up": ("mlp.up_proj", "ffn_up"),
        "mlp/down": ("mlp.down_proj", "ffn_down"),
    },
)

POST_NORMS: Names = LLAMA | _layer(
    "model.layers",
    {
        "attn_post_norm": ("post_attention_layernorm", "post_attention_norm"),
        "mlp_norm": ("pre_feedforward_layernorm", "ffn_norm"),
        "mlp_post_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
    },
)

PHI3: Names = LLAMA | _layer(
    "model.layers",
    {f"attn/{part}": ("self_attn.qkv_proj", "attn_qkv") for part in ("query", "key", "value")}
    | {f"mlp/{part}": ("mlp.gate_up_proj", "ffn_up") for part in ("gate", "up")},
)

GPT2: Names = {
    "embedding": ("wte", "token_embd"),
    "positions": ("wpe", "position_embd"),
    "final_norm": ("ln_f", "output_norm"),
    "unembedding": ("lm_head", "output"),
} | _layer(
    "h",
    {
        "attn_norm": ("ln_1", "attn_norm"),
        **{f"attn/{part}": ("attn.c_attn", "attn_qkv") for part in ("query", "key", "value")},
        "attn/out": ("attn.c_proj", "attn_output"),
        "mlp_norm": ("ln_2", "ffn_norm"),
        "mlp/up": ("mlp.c_fc", "ffn_up"),
        "mlp/down": ("mlp.c_proj", "ffn_down"),
    },
)

GPT_NEOX: Names = {
    "embedding": ("gpt_neox.embed_in", "token_embd"),
    "final_norm": ("gpt_neox.final_layer_norm", "output_norm"),
    "unembedding": ("embed_out", "output"),
} | _layer(
    "gpt_neox.layers",
    {
        "attn_norm": ("input_layernorm", "attn_norm"),
        **{f"attn/{part}": ("attention.query_key_value", "attn_qkv") for part in ("query", "key", "value")},
        "attn/out": ("attention.dense", "attn_output"),
        "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
        "mlp/up": ("mlp.dense_h_to_4h", "ffn_up"),
        "mlp/down": ("mlp.dense_4h_to_h", "ffn_down"),
    },
)

OPT: Names = {
    "embedding": ("model.decoder.embed_tokens", ""),
    "positions": ("model.decoder.embed_positions", ""),
    "final_norm": ("model.decoder.final_layer_norm", ""),
    "unembedding": ("lm_head", ""),
} | _layer(
    "model.decoder.layers",
    {
        "attn_norm": ("self_attn_layer_norm", ""),
        "attn/query": ("self_attn.q_proj", ""),
        "attn/key": ("self_attn.k_proj", ""),
        "attn/value": ("self_attn.v_proj", ""),
        "attn/out": ("self_attn.out_proj", ""),
        "mlp_norm": ("final_layer_norm", ""),
        "mlp/up": ("fc1", ""),
        "mlp/down": ("fc2", ""),
    },
)


def _as_published(path: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    return array


def _gain_less_one(path: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    return array + 1 if path.endswith("scale") else array


def _in_out(path: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    return array.T if path.endswith("kernel") else array


def _fused_by_head(path: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Reorder rows [H, (query, key, value), head_dim] to [(query, key, value), H, head_dim]."""
    if not path.startswith(("layers/attn/query", "layers/attn/key", "layers/attn/value")):
        return array
    by_head = array.reshape(config.heads, 3, config.head_dim, *array.shape[1:])
    return by_head.swapaxes(0, 1).reshape(array.shape)


def _two_rows_early(path: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    return array[2:] if path == "positions" else array


def _neighbouring_pairs(path: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Reorder rows: llama.cpp rotates dimensions (2i, 2i + 1) of a head, Hugging Face and we (i, i + half)."""
    if not path.startswith(("layers/attn/query/", "layers/attn/key/")):
        return array
    heads = array.shape[0] // config.head_dim
    pairs = array.reshape(heads, config.head_dim // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture as it is published.

    Attributes:
      names: the table.
      read: `config.json` -> ModelConfig fields.
      read_gguf: GGUF metadata and tensors -> ModelConfig fields.
      switches: ModelConfig fields, where what is read does not state them.
      defaults: settings that `config.json` may leave out.
      form: of Hugging Face's arrays.
      gguf_form: of GGUF's.
      renamed: Hugging Face prefixes and what stands for them in the table; the first that fits counts.
      ignored: patterns of published tensors that are not weights of this decoder.
      nested: the key of `config.json` under which the decoder's settings stand; "" where it is all of it.
      gguf: GGUF's name of the architecture; "" where it has none.
    """

    names: Names
    read: Callable[[Settings], Fields]
    read_gguf: Callable[[Settings, Mapping[str, Any]], Fields] = gguf_settings.common
    switches: Fields = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    form: Form = _as_published
    gguf_form: Form = _as_published
    renamed: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    nested: str = ""
    gguf: str = ""

    def names_in(self, published: Iterable[str]) -> dict[str, str]:
        """Return Hugging Face's names of tensors by those that the table has for them."""
        names = {}
        for name in published:
            old, new = next((pair for pair in self.renamed if name.startswith(pair[0])), ("", ""))
            names[new + name.removeprefix(old)] = name
        return names

    def fields(self, s: Settings) -> Fields:
        """Read the fields of a ModelConfig from `config.json`."""
        for key in ("dtype", "torch_dtype"):
            s.only(key, None, *settings.STORED_TYPES)
        return self.switches | self.read(s)

    def gguf_fields(self, s: Settings, tensors: Mapping[str, Any]) -> Fields:
        """Read the fields of a ModelConfig from a GGUF file."""
        return self.switches | self.read_gguf(s, tensors)


_LAYER_NORMS = dict(norm="layer", gated=False, mlp_bias=True)
_GPT = _LAYER_NORMS | dict(learned_positions=True, qkv_bias=True, out_bias=True)
_GEMMA3_TEXT = dict(
    vocab_size=262_208,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    max_position_embeddings=131_072,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    tie_word_embeddings=True,
    hidden_activation="gelu_pytorch_tanh",
)
_GEMMA = dict(head_dim=256, tie_word_embeddings=True)
_QWEN3 = dict(head_dim=128, sliding_window=4096)

FAMILIES: dict[str, Family] = {
    "llama": Family(LLAMA, settings.llama, gguf_settings.mistral, gguf_form=_neighbouring_pairs, gguf="llama"),
    "mistral": Family(LLAMA, settings.mistral, defaults=dict(sliding_window=4096)),
    "qwen2": Family(LLAMA, settings.qwen2, defaults=dict(sliding_window=4096), gguf="qwen2"),
    "qwen3": Family(LLAMA, settings.qwen3, switches=dict(qk_norm="head"), defaults=_QWEN3, gguf="qwen3"),
    "olmo2": Family(
        POST_NORMS,
        settings.llama,
        switches=dict(pre_norm=False, post_norm=True, qk_norm="width"),
        defaults=dict(rms_norm_eps=1e-5),
        gguf="olmo2",
    ),
    "phi3": Family(PHI3, settings.mistral, gguf_settings.mistral, defaults=dict(rms_norm_eps=1e-5), gguf="phi3"),
    "gemma": Family(
        LLAMA,
        settings.gemma,
        gguf_settings.gemma,
        switches=dict(activation="gelu_tanh"),
        defaults=_GEMMA,
        form=_gain_less_one,
        gguf="gemma",
    ),
    "gemma2": Family(
        POST_NORMS,
        settings.gemma2,
        gguf_settings.gemma2,
        switches=dict(activation="gelu_tanh", post_norm=True),
        defaults=_GEMMA
        | dict(
            query_pre_attn_scalar=256, sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0
        ),
        form=_gain_less_one,
        gguf="gemma2",
    ),
    "gemma3_text": Family(
        POST_NORMS,
        settings.gemma3,
        gguf_settings.gemma3,
        switches=dict(activation="gelu_tanh", post_norm=True, qk_norm="head"),
        defaults=_GEMMA3_TEXT,
        form=_gain_less_one,
        renamed=(
            ("language_model.model.", "model."),
            ("model.language_model.", "model."),
            ("language_model.lm_head.", "lm_head."),
        ),
        ignored=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
        gguf="gemma3",
    ),
    "gpt2": Family(
        GPT2,
        settings.gpt2,
        switches=_GPT | dict(activation="gelu_tanh"),
        form=_in_out,
        renamed=(("transformer.", ""),),
        ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),
        gguf="gpt2",
    ),
    "gpt_neox": Family(
        GPT_NEOX,
        settings.gpt_neox,
        gguf_settings.gpt_neox,
        switches=_LAYER_NORMS | dict(activation="gelu"),
        defaults=dict(rotary_pct=0.25),
        form=_fused_by_head,
        renamed=(("lm_head.", "embed_out."),),
        ignored=(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
        gguf="gptneox",
    ),
    "opt": Family(OPT, settings.opt, switches=_GPT, form=_two_rows_early, renamed=(("decoder.", "model.decoder."),)),
}
FAMILIES["gemma3"] = dataclasses.replace(FAMILIES["gemma3_text"], nested="text_config", gguf="")
"""The families by Hugging Face's `model_type`."""


def find(name: object, where: str, by: str = "") -> Family:
    """Return the family whose `model_type` (or, `by` "gguf", whose GGUF architecture) is `name`.

    Raises:
      UserError: if it is not a known one.
    """
    known = {(family.gguf if by == "gguf" else key): family for key, family in FAMILIES.items()}
    known.pop("", None)
    if not isinstance(name, str) or name not in known:
        raise UserError(f"{where}: architecture {name!r} is not supported; known: {', '.join(known)}")
    return known[name]
