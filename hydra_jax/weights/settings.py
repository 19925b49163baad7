"""Readers of a `config.json`, as fields of a ModelConfig (of GGUF files: `gguf_settings`).

A key that nothing here reads and that is not known to be harmless is an error, as it might change the
computation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from hydra_jax.errors import UserError
from hydra_jax.models.config import AS_STORED, ModelConfig

Fields = dict[str, Any]
"""Fields of a ModelConfig by their names."""

# fmt: off
HARMLESS = frozenset({
    # of the file, not of the computation
    "_name_or_path", "architectures", "auto_map", "dtype", "is_decoder", "is_llama_config", "model_type", "n_ctx",
    "prefix", "task_specific_params", "tokenizer_class", "torch_dtype", "transformers.js_config",
    "transformers_version", "unsloth_fixed",
    # of training
    "activation_dropout", "attention_dropout", "attn_pdrop", "classifier_dropout", "dropout", "embd_pdrop",
    "gradient_checkpointing", "hidden_dropout", "init_std", "initializer_range", "layerdrop", "resid_pdrop",
    # of generation, of other heads, and of how the same is computed
    "bos_token_id", "cache_implementation", "eos_token_id", "max_length", "pad_token_id", "pretraining_tp",
    "reorder_and_upcast_attn", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "use_cache",
    # of GGUF
    "attention.causal", "rope.scaling.finetuned", "rope.scaling.original_context_length", "tensor_data_layout",
})
ROPE_KEYS = frozenset({
    "rope_type", "type", "rope_theta", "factor", "partial_rotary_factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings",
})
# fmt: on
STORED_TYPES = ("float32", "float16", "bfloat16", "float64")
MOST_LAYERS = 10_000
ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def stored_as(name: object, dtype: str) -> str:
    """Return a model's dtype: the one asked for, or, for AS_STORED, ours for weights stored as type `name`."""
    if dtype != AS_STORED:
        return dtype
    return "bfloat16" if name in ("bf16", "bfloat16") else "float32"


class Settings:
    """A mapping that notes which of its keys were read."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        self._values = {**(defaults or {}), **values}
        self._read: set[str] = set()

    def __call__(self, key: str, *default: Any) -> Any:
        """Return the value of `key`, or the default. Raises KeyError where there is neither."""
        self._read.add(key)
        return self._values.get(key, *default) if default else self._values[key]

    def only(self, key: str, *supported: Any) -> None:
        """Refuse any value of `key` but those `supported`, of which the first is the default."""
        if self(key, supported[0]) not in supported:
            known = " or ".join(map(str, supported))
            raise UserError(f"{key} is {self(key)!r}, only {known} is supported; use another model")

    def layers(self, key: str) -> int:
        """Return the number of layers, fit to be counted to."""
        layers = self(key)
        if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
            raise UserError(f"{key} must be 1 to {MOST_LAYERS:,} layers, it is {layers!r}; fetch the model again")
        return layers

    def check_all_read(self) -> None:
        """Refuse keys that nothing asked for.

        Raises:
          UserError: that names the keys.
        """
        unread = {key for key, value in self._values.items() if value is not None} - self._read - HARMLESS
        if unread:
            raise UserError(
                f"{', '.join(sorted(unread))}: may change the computation and is not supported; use a model without"
            )


def activation(name: object) -> str:
    """Return our name of an activation, by Hugging Face's."""
    if name not in ACTIVATION_NAMES:
        raise UserError(f"activation {name!r} is not supported; known: {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[str(name)]


def rope_factors(scaling: Mapping[str, Any], base: float, rotated: int) -> tuple[float, ...]:
    """Return the divisor of each rotary frequency, from a `rope_scaling` or `rope_parameters`."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    unknown = set(scaling) - ROPE_KEYS
    if kind not in ("default", "linear", "llama3") or unknown:
        what = f"{', '.join(sorted(unknown))} of rotary scaling" if unknown else f"rotary scaling of type {kind!r}"
        raise UserError(f"{what} is not supported (known: linear, llama3); use a model without it")
    if kind == "default":
        return ()
    factor, half = float(scaling["factor"]), rotated // 2
    if kind == "linear":
        return (factor,) * half
    trained = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]

    def one(pair: int) -> float:
        """Return a pair's divisor: short waves stay, long ones are stretched, between them is a blend of both."""
        turns = trained * base ** (-pair / half) / (2 * math.pi)
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        return 1 / ((1 - blend) / factor + blend)

    return tuple(one(pair) for pair in range(half))


def rotary(s: Settings, head_dim: int, theta: str = "rope_theta", share: str = "partial_rotary_factor") -> Fields:
    """Read the rotary fields; `theta` and `share` are the keys of the base and of how much of a head turns."""
    scaling = {**(s("rope_parameters", None) or {}), **(s("rope_scaling", None) or {})}
    old_base, old_share = s(theta, None), s(share, 1.0)
    base = float(scaling.get("rope_theta") or old_base or 10_000.0)
    rotated = int(head_dim * scaling.get("partial_rotary_factor", old_share))
    if not 0 < rotated <= head_dim:
        raise UserError(f"{share}: {rotated} of {head_dim} dimensions of a head cannot turn; fetch the model again")
    return dict(
        rope_base=base,
        rotary_dim=rotated if rotated < head_dim else 0,
        rope_factors=rope_factors(scaling, base, rotated),
    )


def windows(s: Settings, layers: int, slides: Callable[[int], bool], key: str = "sliding_window") -> tuple[int, ...]:
    """Return each layer's window: by `layer_types` or, where they are not listed, of the layers that `slides` says."""
    window, types = s(key, None), s("layer_types", None)
    if types is None:
        sliding = [bool(window) and slides(layer) for layer in range(layers)]
    elif len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
        raise UserError(f"layer_types must be {layers} of full_attention and sliding_attention; fetch the model again")
    else:
        sliding = [kind == "sliding_attention" for kind in types]
    if any(sliding) and not window:
        raise UserError(f"layer_types has sliding_attention, but {key} is not set; fetch the model again")
    return tuple(window if slide else 0 for slide in sliding) if any(sliding) else ()


def _decoder(s: Settings) -> Fields:
    """Read what Llama and most since have in common, but for positions."""
    heads, width = s("num_attention_heads"), s("hidden_size")
    bias = bool(s("attention_bias", False))
    return dict(
        vocab_size=s("vocab_size"),
        width=width,
        layers=s.layers("num_hidden_layers"),
        heads=heads,
        kv_heads=s("num_key_value_heads", None) or heads,
        head_dim=s("head_dim", None) or width // heads,
        mlp_width=s("intermediate_size"),
        context=s("max_position_embeddings"),
        norm_eps=float(s("rms_norm_eps", 1e-6)),
        tied=bool(s("tie_word_embeddings", False)),
        activation=activation(s("hidden_act", "silu")),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(s("mlp_bias", False)),
    )


def llama(s: Settings) -> Fields:
    """Read Llama 1 to 3, SmolLM2, TinyLlama, OLMo 2, and what differs from them in switches alone."""
    s.only("rope_interleaved", False)
    fields = _decoder(s)
    return fields | rotary(s, fields["head_dim"])


def mistral(s: Settings) -> Fields:
    """Read Mistral and Phi-3: every layer has the window."""
    s("original_max_position_embeddings", None)
    fields = llama(s)
    return fields | dict(windows=windows(s, fields["layers"], lambda layer: True))


def qwen3(s: Settings) -> Fields:
    """Read Qwen 3: the layers from some on have windows, if any."""
    s.only("use_mrope", False)
    fields, first = llama(s), s("max_window_layers", 28)
    sliding = bool(s("use_sliding_window", False))
    return fields | dict(windows=windows(s, fields["layers"], lambda layer: sliding and layer >= first))


def qwen2(s: Settings) -> Fields:
    """Read Qwen 2 and 2.5, which have biases whatever their settings say."""
    return qwen3(s) | dict(qkv_bias=True)


def _gemma(s: Settings) -> Fields:
    s.only("use_bidirectional_attention", None, False)
    fields, name, old = _decoder(s), s("hidden_activation", None), s("hidden_act", "gelu")
    # Gemma 1 was published as "gelu" under the old key, and made with its approximation.
    name = name or ("gelu_new" if old == "gelu" else old)
    return fields | dict(
        embedding_scale=float(fields["width"] ** 0.5),
        activation=activation(name),
        query_scalar=float(s("query_pre_attn_scalar", None) or 0.0),
        final_softcap=float(s("final_logit_softcapping", None) or 0.0),
    )


def gemma(s: Settings) -> Fields:
    """Read Gemma 1."""
    fields = _gemma(s)
    return fields | rotary(s, fields["head_dim"])


def gemma2(s: Settings) -> Fields:
    """Read Gemma 2: windows in every other layer."""
    return gemma(s) | dict(
        attn_softcap=float(s("attn_logit_softcapping", None) or 0.0),
        windows=windows(s, s.layers("num_hidden_layers"), lambda layer: layer % 2 == 0),
    )


def gemma3(s: Settings) -> Fields:
    """Read Gemma 3: windows in all layers but every sixth, which have rotary frequencies of their own."""
    fields = _gemma(s)
    pattern = s("sliding_window_pattern", None) or s("_sliding_window_pattern", 6)
    by_type = s("rope_parameters", None) or {}
    full, local = ({**(by_type.get(f"{kind}_attention") or {})} for kind in ("full", "sliding"))
    full |= s("rope_scaling", None) or {}
    local_base = local.get("rope_theta") or s("rope_local_base_freq", None) or 10_000.0
    base = float(full.get("rope_theta") or s("rope_theta", None) or 1e6)
    if rope_factors(local, local_base, fields["head_dim"]):
        raise UserError("rope_parameters: scaling of layers with a window is not supported; use a model without it")
    return fields | dict(
        windows=windows(s, fields["layers"], lambda layer: (layer + 1) % pattern > 0),
        rope_base=base,
        rope_factors=rope_factors(full, base, fields["head_dim"]),
        local_rope_base=float(local_base),
    )


def gpt2(s: Settings) -> Fields:
    """Read GPT-2."""
    s.only("scale_attn_weights", True)
    s.only("scale_attn_by_inverse_layer_idx", False)
    s.only("add_cross_attention", False)
    width, heads = s("n_embd"), s("n_head")
    return dict(
        vocab_size=s("vocab_size"),
        width=width,
        layers=s.layers("n_layer"),
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=s("n_inner", None) or 4 * width,
        context=s("n_positions"),
        norm_eps=float(s("layer_norm_epsilon", 1e-5)),
        tied=bool(s("tie_word_embeddings", True)),
        activation=activation(s("activation_function", "gelu_new")),
    )


def gpt_neox(s: Settings) -> Fields:
    """Read GPT-NeoX and Pythia."""
    width, heads, bias = s("hidden_size"), s("num_attention_heads"), bool(s("attention_bias", True))
    return dict(
        vocab_size=s("vocab_size"),
        width=width,
        layers=s.layers("num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=s("intermediate_size"),
        context=s("max_position_embeddings"),
        norm_eps=float(s("layer_norm_eps", 1e-5)),
        tied=bool(s("tie_word_embeddings", False)),
        activation=activation(s("hidden_act", "gelu")),
        parallel=bool(s("use_parallel_residual", True)),
        qkv_bias=bias,
        out_bias=bias,
        **rotary(s, width // heads, "rotary_emb_base", "rotary_pct"),
    )


def opt(s: Settings) -> Fields:
    """Read OPT, but for the 350M model, which norms after the sublayers and projects its embedding."""
    width, heads = s("hidden_size"), s("num_attention_heads")
    for key in ("do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine"):
        s.only(key, True)
    s.only("_remove_final_layer_norm", False)
    s.only("word_embed_proj_dim", width)
    return dict(
        vocab_size=s("vocab_size"),
        width=width,
        layers=s.layers("num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=s("ffn_dim"),
        context=s("max_position_embeddings"),
        norm_eps=1e-5,
        tied=bool(s("tie_word_embeddings", True)),
        activation=activation(s("activation_function", "relu")),
    )


def model_config(where: str, s: Settings, read: Callable[[], Fields], **switches: Any) -> ModelConfig:
    """Make a ModelConfig of what `read` finds in `s`, all of it; faults are told as faults of the file `where`."""
    try:
        fields = read()
        s.check_all_read()
        return ModelConfig(**fields | switches)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except KeyError as error:
        raise UserError(f"{where}: {error} is missing; fetch the model again") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{where}: {error}; fetch the model again") from error
