"""The decoder as pure functions of its parameters.

`forward` is the general path: one sequence, every position, edits anywhere. The functions after it
are the pieces that `prefill` and `replay` are made of, each for one token [D].
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax import traverse_util

from hydra_jax.models.config import ModelConfig
from hydra_jax.models.layers import MLP, Attention, Norm, Positions, positions, product, softcap


class Params(flax.struct.PyTreeNode):
    """A model: its weights and, static under `jax.jit`, its config.

    Attributes:
      weights: linen's nested dict; under "layers" every array is stacked along a leading axis L.
      config: shape and switches.
    """

    weights: dict[str, Any]
    config: ModelConfig = flax.struct.field(pytree_node=False)


class Edits(flax.struct.PyTreeNode):
    """Replacements of writes, as data: `write = where(mask, value, write)`.

    Attributes:
      mask: [L, 2, T] bool, which writes are replaced (second axis: attention, MLP).
      value: [L, 2, T or 1, D], by what; an axis of 1 serves every position.
    """

    mask: jax.Array
    value: jax.Array


@dataclasses.dataclass(frozen=True)
class DropoutRates:
    """How much of what is added to the stream training leaves out, each between 0 and 1.

    Attributes:
      resid: of the embedding's dimensions, where tokens enter the stream.
      attn: of the dimensions of what attention writes.
      mlp: of the dimensions of what the MLP writes.
      depth: of whole writes (stochastic depth), in one of a batch's sequences at all of its tokens.
    """

    resid: float = 0.0
    attn: float = 0.0
    mlp: float = 0.0
    depth: float = 0.0


class Dropout(flax.struct.PyTreeNode):
    """Dropout of one sequence: what is kept is divided by the share that is kept, on its way to the stream.

    Attributes:
      key: [] of every draw.
      rates: static under `jax.jit`, so that rates of 0 are the program without dropout.
    """

    key: jax.Array
    rates: DropoutRates = flax.struct.field(pytree_node=False)


class Trace(flax.struct.PyTreeNode):
    """What every layer read and wrote. What a caller does not use costs nothing under `jax.jit`.

    Of a pass that keeps one token alone, all but keys and values are without the axis T.

    Attributes:
      resid_pre: [L, T, D], the residual stream before the layer.
      attn_out: [L, T, D], the attention's write (after any post-norm, dropout and edit).
      mlp_out: [L, T, D], the MLP's write (after any post-norm, dropout and edit).
      mixed: [L, T, H, head_dim], the values as each head mixed them, before the output projection.
      keys: [L, T, K, head_dim], normed and rotated where the model does so.
      values: [L, T, K, head_dim].
    """

    resid_pre: jax.Array
    attn_out: jax.Array
    mlp_out: jax.Array
    mixed: jax.Array
    keys: jax.Array
    values: jax.Array

    @property
    def resid_mid(self) -> jax.Array:
        """[L, T, D], the stream between a layer's two writes."""
        return self.resid_pre + self.attn_out

    @property
    def resid_post(self) -> jax.Array:
        """[L, T, D], the stream after the layer."""
        return self.resid_mid + self.mlp_out


class Layer(nn.Module):
    """The two writes of a layer, each computed from the stream it reads."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.attn_norm, self.mlp_norm = (Norm(c) if c.pre_norm else _unchanged for _ in range(2))
        self.attn_post_norm, self.mlp_post_norm = (Norm(c) if c.post_norm else _unchanged for _ in range(2))
        self.attn = Attention(c)
        self.mlp = MLP(c)

    def __call__(
        self, resid_pre: jax.Array, edits: Edits | None, dropout: Dropout | None, at: Positions, only: jax.Array | None
    ) -> tuple[jax.Array, Trace]:
        heads, mixed, keys, values = self.attn(self.attn_norm(resid_pre), at)
        attn_out = _edited(_dropped(self.attn_post_norm(heads), dropout, 0), edits, 0)
        resid_mid = resid_pre + attn_out
        mlp_write = self.mlp_write(resid_pre if self.config.parallel else resid_mid)
        mlp_out = _edited(_dropped(mlp_write, dropout, 1), edits, 1)
        resid_post = resid_mid + mlp_out
        if only is not None:
            resid_pre, attn_out, mlp_out, mixed = (each[only] for each in (resid_pre, attn_out, mlp_out, mixed))
        return resid_post, Trace(resid_pre, attn_out, mlp_out, mixed, keys, values)

    def attn_decode(
        self, resid_pre: jax.Array, position: jax.Array, at: Positions, keys: jax.Array, values: jax.Array
    ) -> jax.Array:
        return self.attn_post_norm(self.attn.decode(self.attn_norm(resid_pre), position, at, keys, values))

    def mlp_write(self, resid: jax.Array) -> jax.Array:
        return self.mlp_post_norm(self.mlp(self.mlp_norm(resid)))

    def head_delta(self, mixed: jax.Array, share: jax.Array) -> jax.Array:
        heads = self.attn.sum_heads(mixed)
        return self.attn_post_norm(heads + share) - self.attn_post_norm(heads)


def _unchanged(resid: jax.Array) -> jax.Array:
    return resid


def _edited(write: jax.Array, edits: Edits | None, site: int) -> jax.Array:
    return write if edits is None else jnp.where(edits.mask[site][:, None], edits.value[site], write)


def _dropped(write: jax.Array, dropout: Dropout | None, site: int) -> jax.Array:
    """A layer's write [T, D] as dropout leaves it: dimensions of it, or all of it."""
    if dropout is None:
        return write
    rate, depth = (dropout.rates.attn, dropout.rates.mlp)[site], dropout.rates.depth
    of_dimensions, of_depth = jax.random.split(jax.random.fold_in(dropout.key, site))
    return _kept(_kept(write, of_dimensions, rate, write.shape), of_depth, depth, (1, 1))


def _kept(x: jax.Array, key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """`x` with as much of it set to 0 as `rate` says, by draws of `shape`, and the rest scaled to make up for it."""
    if not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, shape), x / (1 - rate), 0)


class Decoder(nn.Module):
    """Embedding, scanned layers, final norm, unembedding; for one sequence."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), (c.vocab_size, c.width), c.dtype)
        if c.learned_positions:
            self.positions = self.param("positions", nn.initializers.normal(0.02), (c.context, c.width), c.dtype)
        stacked = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, 0, nn.broadcast),
            length=c.layers,
        )
        self.layers = stacked(c)
        self.final_norm = Norm(c)
        if not c.tied:
            shape = (c.width, c.vocab_size)
            self.unembedding = self.param("unembedding", nn.initializers.lecun_normal(), shape, c.dtype)

    def __call__(
        self,
        tokens: jax.Array,
        edits: Edits | None,
        dropout: Dropout | None = None,
        only: jax.Array | None = None,
    ) -> tuple[jax.Array, Trace]:
        resid, of_layers = self.embed(tokens), None
        if dropout is not None:
            entering, of_layers = jax.random.split(dropout.key)
            resid = _kept(resid, entering, dropout.rates.resid, resid.shape)
            of_layers = Dropout(jax.random.split(of_layers, self.config.layers), dropout.rates)
        resid, trace = self.layers(resid, edits, of_layers, positions(self.config), only)
        return softcap(self.unembed(resid), self.config.final_softcap), trace

    def embed(self, tokens: jax.Array) -> jax.Array:
        embedded = self.embedding[tokens].astype(jnp.float32) * self.config.embedding_scale
        if self.config.learned_positions:
            embedded += self.positions[: len(tokens)].astype(jnp.float32)
        return embedded

    def unembed(self, resid: jax.Array) -> jax.Array:
        return product(self.config, "...d,dv->...v", self.final_norm(resid), self.unembedding_matrix())

    def unembedding_matrix(self) -> jax.Array:
        return self.embedding.T if self.config.tied else self.unembedding

    def final_divisor(self, resid: jax.Array) -> jax.Array:
        return self.final_norm.divisor(resid)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random weights in the model's layout, for tests and for training from scratch."""
    weights = Decoder(config).init(key, jnp.zeros(1, jnp.int32), None)["params"]
    return Params(weights=weights, config=config)


def _apply(params: Params, *arguments: Any, method: str | None = None) -> Any:
    return Decoder(params.config).apply({"params": params.weights}, *arguments, method=method)


def layout(config: ModelConfig) -> Params:
    """The shapes and types of a model's parameters, without values."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def flat(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights by paths such as "layers/attn/out/kernel"."""
    return traverse_util.flatten_dict(weights, sep="/")


def forward(
    params: Params,
    tokens: jax.Array,
    edits: Edits | None = None,
    dropout: Dropout | None = None,
    only: jax.Array | None = None,
) -> tuple[jax.Array, Trace]:
    """One forward pass of one sequence.

    Args:
      params: the model.
      tokens: [T] int32.
      edits: which writes to replace by what, at any layers, sites and positions.
      dropout: in training; an edit replaces what dropout has left.
      only: [] int, the token whose part of the trace is kept, where the others' would take memory for nothing.

    Returns:
      Logits [T, V] in float32, soft-capped where the model does so, and the trace of the pass.
    """
    return _apply(params, tokens, edits, dropout, only)


def embed(params: Params, tokens: jax.Array) -> jax.Array:
    """The stream that the first layer reads: tokens [T] -> [T, D]."""
    return _apply(params, tokens, method="embed")


def unembed(params: Params, resid: jax.Array) -> jax.Array:
    """The final stream [D] -> logits [V], before the final soft-cap where the model has one."""
    return _apply(params, resid, method="unembed")


def final_scale(params: Params, resid: jax.Array) -> jax.Array:
    """sigma: what the final norm divides the final stream [D] by."""
    return _apply(params, resid, method="final_divisor")


def readout(params: Params, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """r [D] and const [], with which the centred logit of token `target` [] is <final stream, r> / sigma + const.

    r = gain * (W_U[:, target] - mean over v of W_U[:, v]). Of a LayerNorm, which takes the mean of the
    stream away, r is that less its own mean, and const is what the norm's bias adds; else const is 0.
    A final soft-cap comes after the logit that is read.
    """
    matrix = _apply(params, method="unembedding_matrix")
    norm = params.weights["final_norm"]
    direction = matrix[:, target].astype(jnp.float32) - matrix.astype(jnp.float32).mean(axis=1)
    vector = norm["scale"] * direction
    if params.config.norm == "rms":
        return vector, jnp.zeros(())
    return vector - vector.mean(), norm["bias"] @ direction


def attn_decode(
    params: Params,
    layer: jax.Array,
    resid_pre: jax.Array,
    position: jax.Array,
    keys: jax.Array,
    values: jax.Array,
) -> jax.Array:
    """What attention `layer` writes for one token: resid_pre [D] -> attn_out [D].

    Args:
      params: the model.
      layer: [] int, an array like any other: all layers share one compilation.
      resid_pre: [D], the stream at the token.
      position: [] int, the token's place; only keys before it are attended to, and itself.
      keys: [K, head_dim, T], that layer's, of the clean run.
      values: [K, T, head_dim].
    """
    at = jax.tree.map(lambda stacked: stacked[layer], positions(params.config))
    return _apply_layer(params, layer, resid_pre, position, at, keys, values, method="attn_decode")


def head_share(params: Params, layer: jax.Array, head: jax.Array, mixed: jax.Array) -> jax.Array:
    """A head's summand of what attention `layer` writes: mixed [head_dim] -> [D].

    The summands of all heads, and the output bias, add up to attn_out, before any post-norm.
    """
    kernel = params.weights["layers"]["attn"]["out"]["kernel"][layer]
    rows = kernel.reshape(params.config.heads, params.config.head_dim, -1)[head]
    return product(params.config, "h,hd->d", mixed, rows)


def head_delta(
    params: Params, layer: jax.Array, head: jax.Array, mixed: jax.Array, replacement: jax.Array
) -> jax.Array:
    """How attention `layer`'s write changes where one head mixes something else: [D].

    Where a post-norm follows, the heads' sum is edited and the write computed anew.

    Args:
      params: the model.
      layer: [] int.
      head: [] int.
      mixed: [H, head_dim], what the layer's heads mixed.
      replacement: [head_dim], what `head` mixes instead.
    """
    share = head_share(params, layer, head, replacement - mixed[head])
    if not params.config.post_norm:
        return share
    return _apply_layer(params, layer, mixed, share, method="head_delta")


def head_readouts(params: Params, vector: jax.Array, mixed: jax.Array) -> jax.Array:
    """[L, H, head_dim], whose product with what a head mixed is <head's share of the write, vector [D]>.

    Where a post-norm follows, a share is divided by what the norm divides the sum of all by.

    Args:
      params: the model.
      vector: [D].
      mixed: [L, H, head_dim], what the heads mixed.
    """
    c, layers = params.config, params.weights["layers"]
    kernels = layers["attn"]["out"]["kernel"]
    vectors = jnp.broadcast_to(vector, (c.layers, c.width))
    if c.post_norm:
        sums = product(c, "li,lid->ld", mixed.reshape(c.layers, -1), kernels)
        if c.out_bias:
            sums += layers["attn"]["out"]["bias"]
        divisor = Norm(c).divisor(sums)
        vectors = vectors * layers["attn_post_norm"]["scale"] / divisor[:, None]
    return product(c, "lid,ld->li", kernels, vectors).reshape(c.layers, c.heads, c.head_dim)


def mlp_write(params: Params, layer: jax.Array, resid: jax.Array) -> jax.Array:
    """What MLP `layer` writes for one token: the stream [D] that it reads -> mlp_out [D]."""
    return _apply_layer(params, layer, resid, method="mlp_write")


def _apply_layer(params: Params, layer: jax.Array, *arguments: Any, method: str) -> Any:
    weights = jax.tree.map(lambda stacked: stacked[layer], params.weights["layers"])
    return Layer(params.config).apply({"params": weights}, *arguments, method=method)
