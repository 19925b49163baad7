"""The parts of a decoder layer, in flax.linen: for one sequence [T, D] and for one decoded token [D]."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from hydra_jax.models.config import ModelConfig

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
"""The nonlinearities of `models.config.ACTIVATIONS`."""

EVERYTHING = 2**30
"""The window that sees everything: more tokens than any sequence has."""


class Positions(NamedTuple):
    """A layer's treatment of positions in its attention; stacked along a leading axis L for all layers.

    Attributes:
      window: [] int32, the number of tokens that a query sees, itself among them.
      frequencies: [rotated / 2] float32, the radians by which the rotary pairs turn from token to token.
    """

    window: jax.Array
    frequencies: jax.Array


def positions(config: ModelConfig) -> Positions:
    """Return the positions of all layers: window [L], frequencies [L, rotated / 2]."""
    windows = np.array(config.windows or [0] * config.layers)
    exponents = -np.arange(config.rotated // 2) / (config.rotated // 2)
    everywhere = config.rope_base**exponents / np.array(config.rope_factors or 1.0)
    local = config.local_rope_base**exponents if config.local_rope_base else everywhere
    frequencies = np.where((windows > 0)[:, None], local, everywhere)
    return Positions(
        jnp.asarray(np.where(windows > 0, windows, EVERYTHING), jnp.int32), jnp.asarray(frequencies, jnp.float32)
    )


def product(config: ModelConfig, equation: str, x: Float[Array, "*x"], y: Float[Array, "*y"]) -> Float32[Array, "*xy"]:
    """Return the `einsum` of inputs in the config's dtype at the config's precision, accumulated in float32."""
    return jnp.einsum(
        equation,
        x.astype(config.dtype),
        y.astype(config.dtype),
        precision=config.lax_precision,
        preferred_element_type=jnp.float32,
    )


def rotate(
    x: Float[Array, "heads head_dim"], position: Int[Array, ""], frequencies: Float[Array, " pairs"]
) -> Float[Array, "heads head_dim"]:
    """Rotary position embedding of one token's heads (Su et al. 2021), pairs (i, i + rotated / 2).

    Args:
      x: queries or keys, of which the leading dimensions turn.
      position: the token's place in the sequence.
      frequencies: radians from token to token, of each of the rotated / 2 pairs.
    """
    half = len(frequencies)
    angle = position.astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle)[None], jnp.sin(angle)[None]
    first, second, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def softcap(x: Float[Array, "*shape"], cap: float) -> Float[Array, "*shape"]:
    """Squeeze `x` into (-cap, cap), or leave it as it is where cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def attend_cached(
    config: ModelConfig,
    query: Float[Array, "K group head_dim"],
    key: Float[Array, "K head_dim"],
    value: Float[Array, "K head_dim"],
    keys: Float[Array, "K head_dim T"],
    values: Float[Array, "K T head_dim"],
    position: Int[Array, ""],
    window: Int[Array, ""],
) -> Float32[Array, "K group head_dim"]:
    """Attention of one token to those before it and to itself; a group is the H / K query heads of a key head.

    `vmap` over tokens that share a cache (the rows of one text) has a rule of its own. Batching
    each operation by itself would put the edits in front of the heads, where the product with the
    cache does not want them, and transpose the scores, the largest array here, at every step.

    Args:
      config: dtype and precision of the products.
      query: the token's, scaled.
      key: the token's own.
      value: the token's own.
      keys: the cache, laid out as the products want it.
      values: the cache's.
      position: the token's place: only keys before it are attended to.
      window: and only keys less than this many tokens before it.

    Returns:
      The values as each query head mixes them.
    """

    def tokens(query, key, value, keys, values, position, window):
        distance = position[..., None] - jnp.expand_dims(jnp.arange(keys.shape[-1]), range(position.ndim))
        seen = ((distance > 0) & (distance < window)).reshape(-1, keys.shape[-1])[None, :, None]
        scores = softcap(product(config, "nkgd,kdt->kngt", query, keys), config.attn_softcap)
        cached = jnp.where(seen, scores, -jnp.inf)
        itself = softcap(product(config, "nkgd,nkd->kng", query, key), config.attn_softcap)[..., None]
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
        if batched[:5] == [True] * 3 + [False] * 2 and not batched[6]:
            return tokens(*arguments), True
        axes = [0 if axis else None for axis in batched]
        return jax.vmap(lambda q, k, v, *cache: tokens(q[None], k[None], v[None], *cache)[0], axes)(*arguments), True

    return token(query, key, value, keys, values, position, window)


class Linear(nn.Module):
    """x @ kernel, the kernel [in, out], and a bias [out] if there is one."""

    config: ModelConfig
    features: int
    biased: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*rows inputs"]) -> Float32[Array, "*rows {self.features}"]:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self.config.dtype)
        out = product(self.config, "...i,io->...o", x, kernel)
        if not self.biased:
            return out
        return out + along_last(self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32), out)


class Norm(nn.Module):
    """RMSNorm, x / divisor(x) * scale over the last axis; or LayerNorm, of x less its mean, plus a bias."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "*rows E"], divisor: Float[Array, "*rows"] | None = None
    ) -> Float[Array, "*rows E"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        divided = self.centred(x) / (self.divisor(x) if divisor is None else divisor)[..., None]
        normed = divided * along_last(scale, x)
        if self.config.norm == "rms":
            return normed
        return normed + along_last(self.param("bias", nn.initializers.zeros, scale.shape, jnp.float32), x)

    def divisor(self, x: Float[Array, "*rows E"]) -> Float[Array, "*rows"]:
        """The root of the mean square (or variance) of x + eps."""
        return jnp.sqrt(jnp.mean(jnp.square(self.centred(x)), axis=-1) + self.config.norm_eps)

    def centred(self, x: Float[Array, "*rows E"]) -> Float[Array, "*rows E"]:
        return x if self.config.norm == "rms" else x - x.mean(axis=-1, keepdims=True)


def along_last(vector: Float[Array, " E"], x: Float[Array, "*rows E"]) -> Float[Array, "*ones E"]:
    """Return `vector` in the rank of x: every axis but the last is 1."""
    return jnp.expand_dims(vector, range(x.ndim - 1))


class Attention(nn.Module):
    """Grouped-query attention: each of K key/value heads serves a group of H / K query heads."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.query = Linear(c, c.heads * c.head_dim, c.qkv_bias)
        self.key = Linear(c, c.kv_heads * c.head_dim, c.qkv_bias)
        self.value = Linear(c, c.kv_heads * c.head_dim, c.qkv_bias)
        self.out = Linear(c, c.width, c.out_bias)
        if c.qk_norm != "none":
            self.query_norm, self.key_norm = Norm(c), Norm(c)

    def __call__(
        self, x: Float[Array, "T D"], at: Positions
    ) -> tuple[
        Float[Array, "T D"], Float[Array, "T H head_dim"], Float[Array, "T K head_dim"], Float[Array, "T K head_dim"]
    ]:
        """Attend within a sequence: the sum of heads, the values as each head mixed them, keys and values."""
        positions = jnp.arange(x.shape[0])
        query, key, value = self.heads(x, positions, at.frequencies)
        mixed = product(self.config, "kgqt,tkd->qkgd", self.weights(query, key, at.window), value)
        mixed = mixed.reshape(len(positions), self.config.heads, -1)
        return self.out(mixed.reshape(len(positions), -1)), mixed, key, value

    def weights(
        self, query: Float[Array, "T K group head_dim"], key: Float[Array, "T K head_dim"], window: Int[Array, ""]
    ) -> Float32[Array, "K group T T"]:
        """Return the share of its attention that each token, of each query head, gives to each token: query, key."""
        positions = jnp.arange(key.shape[0])
        distance = positions[:, None] - positions[None]
        seen = ((distance >= 0) & (distance < window))[None, None]
        scores = softcap(product(self.config, "qkgd,tkd->kgqt", query, key), self.config.attn_softcap)
        return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)

    def pattern(self, x: Float[Array, "T D"], at: Positions) -> Float32[Array, "H T T"]:
        """Return those weights of a sequence that is read, by head."""
        query, key, _ = self.heads(x, jnp.arange(x.shape[0]), at.frequencies)
        return self.weights(query, key, at.window).reshape(self.config.heads, len(x), len(x))

    def decode(
        self,
        x: Float[Array, " D"],
        position: Int[Array, ""],
        at: Positions,
        keys: Float[Array, "K head_dim T"],
        values: Float[Array, "K T head_dim"],
    ) -> Float[Array, "H head_dim"]:
        """Attend from one token to the cache of those before it (see `attend_cached`): what its heads mix."""
        query, key, value = jax.tree.map(lambda h: h[0], self.heads(x[None], position[None], at.frequencies))
        mixed = attend_cached(self.config, query, key, value, keys, values, position, at.window)
        return mixed.reshape(self.config.heads, -1)

    def heads(
        self, x: Float[Array, "T D"], positions: Int[Array, " T"], frequencies: Float[Array, " pairs"]
    ) -> tuple[Float[Array, "T K group head_dim"], Float[Array, "T K head_dim"], Float[Array, "T K head_dim"]]:
        """Return scaled queries, keys and values."""
        c = self.config
        query, key = self.query(x), self.key(x)
        if c.qk_norm == "width":
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = query.reshape(-1, c.heads, c.head_dim), key.reshape(-1, c.kv_heads, c.head_dim)
        if c.qk_norm == "head":
            query, key = self.query_norm(query), self.key_norm(key)
        if not c.learned_positions:
            turn = jax.vmap(rotate, (0, 0, None))
            query, key = turn(query, positions, frequencies), turn(key, positions, frequencies)
        value = self.value(x).reshape(-1, c.kv_heads, c.head_dim)
        grouped = (query * c.query_scale).reshape(-1, c.kv_heads, c.heads // c.kv_heads, c.head_dim)
        return grouped, key.astype(c.dtype), value.astype(c.dtype)

    def sum_heads(self, mixed: Float[Array, "*heads head_dim"]) -> Float[Array, " D"]:
        """Project one token's mixed values into the stream."""
        return self.out(mixed.reshape(-1))


class MLP(nn.Module):
    """Gated or plain MLP: down(act(gate(x)) * up(x)), or down(act(up(x)))."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        if c.gated:
            self.gate = Linear(c, c.mlp_width, c.mlp_bias)
        self.up = Linear(c, c.mlp_width, c.mlp_bias)
        self.down = Linear(c, c.width, c.mlp_bias)

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        activation = ACTIVATIONS[self.config.activation]
        return self.down(activation(self.gate(x)) * self.up(x) if self.config.gated else activation(self.up(x)))
