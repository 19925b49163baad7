"""Sizes and switches of published models: enough for their speed, memory and cost, which no weights change."""

from __future__ import annotations

import dataclasses
from typing import Any

from hydra_jax.errors import UserError
from hydra_jax.models.config import ModelConfig


def _shape(
    vocab_size: int,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    mlp_width: int,
    context: int,
    **switches: Any,
) -> ModelConfig:
    return ModelConfig(vocab_size, width, layers, heads, kv_heads, head_dim, mlp_width, context, **switches)


_GPT = dict(norm="layer", gated=False, qkv_bias=True, out_bias=True, mlp_bias=True)
_GEMMA = dict(post_norm=True, activation="gelu_tanh", tied=True)
SHAPES = {
    "llama-7b": _shape(32_000, 4096, 32, 32, 32, 128, 11_008, 2048),
    "llama2-70b": _shape(32_000, 8192, 80, 64, 8, 128, 28_672, 4096),
    "random-1b": _shape(128_256, 2048, 16, 32, 8, 64, 8192, 8192, tied=True),
    "gpt2": _shape(
        50_257, 768, 12, 12, 12, 64, 3072, 1024, learned_positions=True, activation="gelu_tanh", tied=True, **_GPT
    ),
    "pythia-160m": _shape(50_304, 768, 12, 12, 12, 64, 3072, 2048, rotary_dim=16, parallel=True, **_GPT),
    "opt-125m": _shape(
        50_272, 768, 12, 12, 12, 64, 3072, 2048, learned_positions=True, activation="relu", tied=True, **_GPT
    ),
    "tinyllama-1.1b": _shape(32_000, 2048, 22, 32, 4, 64, 5632, 2048),
    "mistral-7b": _shape(32_000, 4096, 32, 32, 8, 128, 14_336, 32_768, windows=(4096,) * 32),
    "phi3-mini": _shape(32_064, 3072, 32, 32, 32, 96, 8192, 4096, windows=(2047,) * 32),
    "qwen2.5-0.5b": _shape(151_936, 896, 24, 14, 2, 64, 4864, 32_768, qkv_bias=True, tied=True),
    "qwen3-0.6b": _shape(151_936, 1024, 28, 16, 8, 128, 3072, 40_960, qk_norm="head", tied=True),
    "gemma-2b": _shape(256_000, 2048, 18, 8, 1, 256, 16_384, 8192, activation="gelu_tanh", tied=True),
    "gemma2-2b": _shape(256_000, 2304, 26, 8, 4, 256, 9216, 8192, attn_softcap=50.0, windows=(4096, 0) * 13, **_GEMMA),
    "gemma3-270m": _shape(
        262_144, 640, 18, 4, 1, 256, 2048, 32_768, windows=(*[512] * 5, 0) * 3, qk_norm="head", **_GEMMA
    ),
    "olmo2-1b": _shape(100_352, 2048, 16, 16, 16, 128, 8192, 4096, pre_norm=False, post_norm=True, qk_norm="width"),
}
"""At least one model of every family; random-1b is Llama 3.2 1B."""


def shape(name: str, layers: int = 0) -> ModelConfig:
    """Look up one of `SHAPES`, cut to its first layers where `layers` is not 0: every layer costs the same.

    Raises:
      UserError: if the name is unknown, or the model has fewer layers.
    """
    if name not in SHAPES:
        raise UserError(f"--shape: {name!r} is unknown; give one of {', '.join(SHAPES)}, or a model's config.json")
    whole = SHAPES[name]
    if not 0 <= layers <= whole.layers:
        raise UserError(f"config.layers: is {layers}; {name} has {whole.layers}, give 1 to that, or 0 for all of them")
    count = layers or whole.layers
    return dataclasses.replace(whole, layers=count, windows=whole.windows[:count])
