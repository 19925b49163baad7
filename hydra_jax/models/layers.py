"""What a decoder layer is made of, in flax.linen: for one sequence [T, D] and for one decoded token [D]."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from hydra_jax.models.config import ModelConfig

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def product(config: ModelConfig, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`einsum` of inputs in the config's dtype at the config's precision, accumulated in float32."""
    return jnp.einsum(
        equation,
        x.astype(config.dtype),
        y.astype(config.dtype),
        precision=config.lax_precision,
        preferred_element_type=jnp.float32,
    )


def rotate(x: jax.Array, position: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding of one token's heads (Su et al. 2021), pairs (i, i + head_dim / 2).

    Args:
      x: [heads, head_dim].
      position: [], the token's place in the sequence.
      base: of the geometric series of frequencies.
    """
    half = x.shape[-1] // 2
    angle = position.astype(jnp.float32) * base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    cos, sin = jnp.cos(angle)[None], jnp.sin(angle)[None]
    first, second = x[:, :half], x[:, half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend_cached(
    config: ModelConfig,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    position: jax.Array,
) -> jax.Array:
    """Attention of one token to those before it and to itself.

    `vmap` over tokens that share a cache (the edits of one prompt) has a rule of its own. Batching
    each operation by itself would put the edits in front of the heads, where the product with the
    cache does not want them, and transpose the scores, the largest array here, at every step.

    Args:
      config: dtype and precision of the products.
      query: [K, H / K, head_dim], scaled.
      key: [K, head_dim], the token's own.
      value: [K, head_dim], the token's own.
      keys: [K, head_dim, T], the cache, laid out as the products want it.
      values: [K, T, head_dim].
      position: [], the token's place: only keys before it are attended to.

    Returns:
      [K, H / K, head_dim], the values as each query head mixes them.
    """

    def tokens(query, key, value, keys, values, position):
        before = (jnp.arange(keys.shape[-1]) < position)[None, None, None]
        cached = jnp.where(before, product(config, "nkgd,kdt->kngt", query, keys), -jnp.inf)
        itself = product(config, "nkgd,nkd->kng", query, key)[..., None]
        highest = jnp.maximum(cached.max(axis=-1, keepdims=True), itself)
        cached, itself = jnp.exp(cached - highest), jnp.exp(itself - highest)
        own = itself * jnp.swapaxes(value, 0, 1)[:, :, None].astype(itself.dtype)
        mixed = (product(config, "kngt,ktd->kngd", cached, values) + own) / (
            cached.sum(axis=-1, keepdims=True) + itself
        )
        return jnp.swapaxes(mixed, 0, 1)

    @jax.custom_batching.custom_vmap
    def token(query, key, value, *cache):
        return tokens(query[None], key[None], value[None], *cache)[0]

    @token.def_vmap
    def _(size, batched, *arguments):
        del size
        if batched == [True] * 3 + [False] * 3:
            return tokens(*arguments), True
        axes = [0 if axis else None for axis in batched]
        return jax.vmap(lambda q, k, v, *cache: tokens(q[None], k[None], v[None], *cache)[0], axes)(*arguments), True

    return token(query, key, value, keys, values, position)


class Linear(nn.Module):
    """x @ kernel, the kernel [in, out]."""

    config: ModelConfig
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self.config.dtype)
        return product(self.config, "...i,io->...o", x, kernel)


class Norm(nn.Module):
    """RMSNorm: x / divisor(x) * scale over the last axis."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        return x / self.divisor(x)[..., None] * jnp.expand_dims(scale, range(x.ndim - 1))

    def divisor(self, x: jax.Array) -> jax.Array:
        """What x is divided by: sqrt(mean x^2 + eps), without the last axis."""
        return jnp.sqrt(jnp.mean(jnp.square(x), axis=-1) + self.config.norm_eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.query = Linear(c, c.heads * c.head_dim)
        self.key = Linear(c, c.kv_heads * c.head_dim)
        self.value = Linear(c, c.kv_heads * c.head_dim)
        self.out = Linear(c, c.width)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """A sequence: x [T, D] -> write [T, D], mixed [T, H, head_dim], keys (rotated), values [T, K, head_dim]."""
        tokens = x.shape[0]
        query, key, value = self.heads(x, jnp.arange(tokens))
        scores = product(self.config, "qkgd,tkd->kgqt", query, key)
        causal = jnp.tril(jnp.ones((tokens, tokens), bool))[None, None]
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
        mixed = product(self.config, "kgqt,tkd->qkgd", weights, value)
        mixed = mixed.reshape(tokens, self.config.heads, -1)
        return self.out(mixed.reshape(tokens, -1)), mixed, key, value

    def decode(self, x: jax.Array, position: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        """One token: x [D] at `position` [], against the cache of those before it (see `attend_cached`)."""
        query, key, value = jax.tree.map(lambda h: h[0], self.heads(x[None], position[None]))
        return self.out(attend_cached(self.config, query, key, value, keys, values, position).reshape(-1))

    def heads(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """X [T, D], positions [T] -> query [T, K, H / K, head_dim] (scaled), key and value [T, K, head_dim]."""
        c = self.config
        turn = jax.vmap(functools.partial(rotate, base=c.rope_base))
        query = turn(self.query(x).reshape(-1, c.heads, c.head_dim), positions) * c.head_dim**-0.5
        key = turn(self.key(x).reshape(-1, c.kv_heads, c.head_dim), positions)
        value = self.value(x).reshape(-1, c.kv_heads, c.head_dim)
        grouped = query.reshape(-1, c.kv_heads, c.heads // c.kv_heads, c.head_dim)
        return grouped, key.astype(c.dtype), value.astype(c.dtype)


class MLP(nn.Module):
    """Gated MLP: down(act(gate(x)) * up(x))."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.gate = Linear(c, c.mlp_width)
        self.up = Linear(c, c.mlp_width)
        self.down = Linear(c, c.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.config.activation](self.gate(x)) * self.up(x))
