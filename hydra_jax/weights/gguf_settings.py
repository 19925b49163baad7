"""Readers of a GGUF file's metadata, as fields of a ModelConfig: its keys without the architecture before them.

Arguments of all: the metadata, and the tensors by name, of which some say what a key does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra_jax.errors import UserError
from hydra_jax.weights.settings import Fields, Settings, windows


def common(s: Settings, tensors: Mapping[str, Any]) -> Fields:
    """Read what GGUF files of all architectures have in common.

    Args:
      s: the metadata, of the keys that begin with the architecture, without it.
      tensors: by name, of which some say what a key does not.
    """
    heads, width = s("attention.head_count"), s("embedding_length")
    head_dim = s("attention.key_length", None) or width // heads
    s.only("attention.value_length", head_dim)
    rotated = s("rope.dimension_count", None) or head_dim
    eps = s("attention.layer_norm_rms_epsilon", None)
    base = float(s("rope.freq_base", 10_000.0))
    return dict(
        vocab_size=s("vocab_size", None) or int(tensors["token_embd.weight"].shape[1]),
        width=width,
        layers=s.layers("block_count"),
        heads=heads,
        kv_heads=s("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_width=s("feed_forward_length"),
        context=s("context_length"),
        rope_base=base,
        rotary_dim=rotated if rotated != head_dim else 0,
        rope_factors=_factors(s, tensors, rotated),
        norm_eps=float(s("attention.layer_norm_epsilon") if eps is None else eps),
        tied="output.weight" not in tensors,
        qkv_bias=bool({"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"} & set(tensors)),
        out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
    )


def _factors(s: Settings, tensors: Mapping[str, Any], rotated: int) -> tuple[float, ...]:
    s.only("rope.scaling.type", "none", "linear")
    factor = float(s("rope.scaling.factor", 0.0) or s("rope.scale_linear", 0.0) or 1.0)
    for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
        if name in tensors:
            raise UserError(f"tensor {name}: this rotary scaling is not supported; use a model without it")
    if "rope_freqs.weight" in tensors:
        return tuple(factor * float(value) for value in tensors["rope_freqs.weight"].decoded().ravel())
    return (factor,) * (rotated // 2) if factor != 1.0 else ()


def mistral(s: Settings, tensors: Mapping[str, Any]) -> Fields:
    """Read Mistral (published as Llama) and Phi-3: every layer has the window, if there is one."""
    fields = common(s, tensors)
    return fields | dict(windows=windows(s, fields["layers"], lambda layer: True, "attention.sliding_window"))


def gemma(s: Settings, tensors: Mapping[str, Any]) -> Fields:
    """Read Gemma 1."""
    fields = common(s, tensors)
    return fields | dict(embedding_scale=float(fields["width"] ** 0.5))


def gemma2(s: Settings, tensors: Mapping[str, Any]) -> Fields:
    """Read Gemma 2. Its files leave out that the 27B model scales queries by width / heads."""
    fields = gemma(s, tensors)
    largest = fields["layers"] == 46
    return fields | dict(
        query_scalar=float(fields["width"] // fields["heads"]) if largest else 0.0,
        attn_softcap=float(s("attn_logit_softcapping", 50.0)),
        final_softcap=float(s("final_logit_softcapping", 30.0)),
        windows=windows(s, fields["layers"], lambda layer: layer % 2 == 0, "attention.sliding_window"),
    )


def gemma3(s: Settings, tensors: Mapping[str, Any]) -> Fields:
    """Read Gemma 3. Its files leave out windows' pattern and rotary base, and how the 27B model scales queries."""
    fields = gemma(s, tensors)
    largest = fields["layers"] == 62
    pattern = s("attention.sliding_window_pattern", 6)

    def slides(layer: int) -> bool:
        return bool(pattern[layer]) if isinstance(pattern, list) else (layer + 1) % pattern > 0

    return fields | dict(
        query_scalar=float(fields["width"] // fields["heads"]) if largest else 0.0,
        final_softcap=float(s("final_logit_softcapping", 0.0)),
        local_rope_base=float(s("rope.freq_base_swa", 10_000.0)),
        windows=windows(s, fields["layers"], slides, "attention.sliding_window"),
    )


def gpt_neox(s: Settings, tensors: Mapping[str, Any]) -> Fields:
    """Read GPT-NeoX and Pythia."""
    return common(s, tensors) | dict(parallel=bool(s("use_parallel_residual", True)))
