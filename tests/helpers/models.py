"""Tiny random models, for parity and property tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import Edits, Params, init_params


def config(**changes):
    shape = dict(
        vocab_size=61, width=24, layers=4, heads=4, kv_heads=2, head_dim=6, mlp_width=40, context=64, norm_eps=1e-5
    )
    return ModelConfig(**shape | changes)


BIASES = dict(qkv_bias=True, out_bias=True, mlp_bias=True)
BLOCKS = {
    "llama 3": dict(rope_factors=(1.0, 2.0, 8.0)),
    "mistral": dict(windows=(3, 3, 3, 3)),
    "gpt-2": dict(norm="layer", learned_positions=True, gated=False, activation="gelu_tanh", tied=True, **BIASES),
    "pythia": dict(norm="layer", parallel=True, rotary_dim=2, gated=False, activation="gelu", **BIASES),
    "gemma 2": dict(
        post_norm=True,
        attn_softcap=2.0,
        final_softcap=3.0,
        embedding_scale=5.0,
        windows=(3, 0, 3, 0),
        query_scalar=9.0,
        activation="gelu_tanh",
        tied=True,
    ),
    "gemma 3": dict(post_norm=True, qk_norm="head", windows=(4, 4, 0, 4), local_rope_base=50.0),
    "olmo 2": dict(pre_norm=False, post_norm=True, qk_norm="width"),
    "opt": dict(norm="layer", learned_positions=True, gated=False, activation="relu", **BIASES),
}
"""Every switch of a config, in the combinations that families use."""


@functools.cache
def block(name) -> Params:
    return params(**BLOCKS[name])


@functools.cache
def params(seed=0, dtype="float32", **changes) -> Params:
    """A model whose writes are as large as its embedding, of which every weight makes a difference."""
    layout = jax.eval_shape(lambda: init_params(config(dtype=dtype, **changes), jax.random.key(0)))
    random = np.random.default_rng(seed)

    def one(path, leaf):
        name, normal = jax.tree_util.keystr(path), random.normal(size=leaf.shape)
        if "scale" in name or "bias" in name:
            made = 0.3 * normal + ("scale" in name)
        else:
            made = normal * (1.0 if "'embedding'" in name else leaf.shape[-2] ** -0.5)
        return jnp.asarray(made.astype(np.float32)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, layout)


@functools.cache
def tokens(length, seed=0):
    return jax.random.randint(jax.random.key(seed), (length,), 0, config().vocab_size, jnp.int32)


def edit(config, tokens, layer, site, position, value) -> Edits:
    """The general path's spelling of one replaced write."""
    mask = jnp.zeros((config.layers, 2, tokens), bool).at[layer, site, position].set(True)
    return Edits(mask, jnp.zeros((config.layers, 2, 1, config.width)).at[layer, site].set(value[None]))
