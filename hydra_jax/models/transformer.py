"""The decoder as pure functions of its parameters.

`forward` is the general path: one sequence, every position, edits anywhere. The functions after it are what a walk
over the layers begins and ends with; `models.pieces` has the layers between.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, ArrayLike, Float, Float32, Int, Key

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
      value: [L, 2, T or 1, D], the replacements; an axis of 1 serves every position.
    """

    mask: jax.Array
    value: jax.Array


@dataclasses.dataclass(frozen=True)
class DropoutRates:
    """Shares of the additions to the stream that training leaves out, each between 0 and 1.

    Attributes:
      resid: share of the embedding's dimensions, where tokens enter the stream.
      attn: share of the dimensions of attention's writes.
      mlp: share of the dimensions of the MLP's writes.
      depth: share of whole writes (stochastic depth), in one of a batch's sequences at all of its tokens.
    """

    resid: float = 0.0
    attn: float = 0.0
    mlp: float = 0.0
    depth: float = 0.0


class Dropout(flax.struct.PyTreeNode):
    """Dropout of one sequence: the kept part is divided by the share that is kept, on its way to the stream.

    Attributes:
      key: [], from which every draw is made.
      rates: static under `jax.jit`, so that rates of 0 are the program without dropout.
    """

    key: jax.Array
    rates: DropoutRates = flax.struct.field(pytree_node=False)


class Trace(flax.struct.PyTreeNode):
    """Every layer's reads and writes. Under `jax.jit`, parts that a caller does not use cost nothing.

    Where a pass keeps one token alone, all but keys and values are without the axis T; where it keeps some, of their
    number along it.

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
    def resid_mid(self) -> Float[Array, "L *T D"]:
        """The stream between a layer's two writes."""
        return self.resid_pre + self.attn_out

    @property
    def resid_post(self) -> Float[Array, "L *T D"]:
        """The stream after the layer."""
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
        self,
        resid_pre: Float[Array, "T D"],
        edits: Edits | None,
        dropout: Dropout | None,
        at: Positions,
        only: Int[Array, "*Q"] | None,
    ) -> tuple[Float[Array, "T D"], Trace]:
        heads, mixed, keys, values = self.attn(self.attn_norm(resid_pre), at)
        attn_out = _edited(_dropped(self.attn_post_norm(heads), dropout, 0), edits, 0)
        resid_mid = resid_pre + attn_out
        mlp_write = self.mlp_write(resid_pre if self.config.parallel else resid_mid)
        mlp_out = _edited(_dropped(mlp_write, dropout, 1), edits, 1)
        resid_post = resid_mid + mlp_out
        if only is not None:
            resid_pre, attn_out, mlp_out, mixed = (kept[only] for kept in (resid_pre, attn_out, mlp_out, mixed))
        return resid_post, Trace(resid_pre, attn_out, mlp_out, mixed, keys, values)

    def attend(
        self,
        resid_pre: Float[Array, " D"],
        position: Int[Array, ""],
        at: Positions,
        keys: Float[Array, "K head_dim T"],
        values: Float[Array, "K T head_dim"],
    ) -> Float[Array, "H head_dim"]:
        return self.attn.decode(self.attn_norm(resid_pre), position, at, keys, values)

    def attn_write(self, mixed: Float[Array, "H head_dim"]) -> Float[Array, " D"]:
        return self.attn_post_norm(self.attn.sum_heads(mixed))

    def mlp_write(self, resid: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        return self.mlp_post_norm(self.mlp(self.mlp_norm(resid)))

    def heads_delta(self, mixed: Float[Array, "H head_dim"], shares: Float[Array, " D"]) -> Float[Array, " D"]:
        heads = self.attn.sum_heads(mixed)
        return self.attn_post_norm(heads + shares) - self.attn_post_norm(heads)


def _unchanged(resid: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    return resid


def _edited(write: Float[Array, "T D"], edits: Edits | None, site: int) -> Float[Array, "T D"]:
    return write if edits is None else jnp.where(edits.mask[site][:, None], edits.value[site], write)


def _dropped(write: Float[Array, "T D"], dropout: Dropout | None, site: int) -> Float[Array, "T D"]:
    """A layer's write as dropout leaves it: without some of its dimensions, or without all of it."""
    if dropout is None:
        return write
    rate, depth = (dropout.rates.attn, dropout.rates.mlp)[site], dropout.rates.depth
    of_dimensions, of_depth = jax.random.split(jax.random.fold_in(dropout.key, site))
    return _kept(_kept(write, of_dimensions, rate, write.shape), of_depth, depth, (1, 1))


def _kept(x: Float[Array, "T D"], key: Key[Array, ""], rate: float, shape: tuple[int, ...]) -> Float[Array, "T D"]:
    """Set a share `rate` of `x` to 0, by draws of `shape`, and scale the rest to make up for it."""
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
        tokens: Int[Array, " T"],
        edits: Edits | None,
        dropout: Dropout | None = None,
        only: Int[Array, "*Q"] | None = None,
    ) -> tuple[Float32[Array, "T V"], Trace]:
        resid, of_layers = self.embed(tokens), None
        if dropout is not None:
            entering, of_layers = jax.random.split(dropout.key)
            resid = _kept(resid, entering, dropout.rates.resid, resid.shape)
            of_layers = Dropout(jax.random.split(of_layers, self.config.layers), dropout.rates)
        resid, trace = self.layers(resid, edits, of_layers, positions(self.config), only)
        return softcap(self.unembed(resid), self.config.final_softcap), trace

    def embed(self, tokens: Int[Array, " T"]) -> Float32[Array, "T D"]:
        embedded = self.embedding[tokens].astype(jnp.float32) * self.config.embedding_scale
        if self.config.learned_positions:
            embedded += self.positions[: len(tokens)].astype(jnp.float32)
        return embedded

    def unembed(
        self, resid: Float[Array, "*rows D"], divisor: Float[Array, "*rows"] | None = None
    ) -> Float32[Array, "*rows V"]:
        return product(self.config, "...d,dv->...v", self.final_norm(resid, divisor), self.unembedding_matrix())

    def unembedding_matrix(self) -> Float[Array, "D V"]:
        return self.embedding.T if self.config.tied else self.unembedding

    def final_divisor(self, resid: Float[Array, " D"]) -> Float[Array, ""]:
        return self.final_norm.divisor(resid)


def init_params(config: ModelConfig, key: Key[Array, ""]) -> Params:
    """Draw random weights in the model's layout, for tests and for training from scratch."""
    weights = Decoder(config).init(key, jnp.zeros(1, jnp.int32), None)["params"]
    return Params(weights=weights, config=config)


def _apply(params: Params, *arguments: Any, method: str | None = None) -> Any:
    return Decoder(params.config).apply({"params": params.weights}, *arguments, method=method)


def layout(config: ModelConfig) -> Params:
    """Return the shapes and types of a model's parameters, without values."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def flat(weights: dict[str, Any]) -> dict[str, Any]:
    """Return weights by paths such as "layers/attn/out/kernel"."""
    return traverse_util.flatten_dict(weights, sep="/")


def forward(
    params: Params,
    tokens: Int[Array, " T"],
    edits: Edits | None = None,
    dropout: Dropout | None = None,
    only: Int[Array, "*Q"] | None = None,
) -> tuple[Float32[Array, "T V"], Trace]:
    """Run one forward pass of one sequence.

    Args:
      params: the model.
      tokens: the sequence.
      edits: the writes to replace, at any layers, sites and positions, and their replacements.
      dropout: in training; an edit replaces what dropout has left.
      only: the token, or tokens, whose part of the trace is kept, where the others' would take memory for nothing.

    Returns:
      Logits, soft-capped where the model does so, and the trace of the pass.
    """
    return _apply(params, tokens, edits, dropout, only)


def embed(params: Params, tokens: Int[Array, " T"]) -> Float32[Array, "T D"]:
    """Return the stream that the first layer reads."""
    return _apply(params, tokens, method="embed")


def unembed(params: Params, resid: Float[Array, " D"], scale: Float[Array, ""] | None = None) -> Float32[Array, " V"]:
    """Return the logits of a final stream, before the final soft-cap where the model has one.

    Args:
      params: the model, of which its layers are not needed.
      resid: the stream.
      scale: sigma, where it is not the stream's own.
    """
    return _apply(params, resid, scale, method="unembed")


def final_scale(params: Params, resid: Float[Array, " D"]) -> Float[Array, ""]:
    """Return sigma, by which the final norm divides the final stream."""
    return _apply(params, resid, method="final_divisor")


class Contrast(flax.struct.PyTreeNode):
    """A linear combination of centred logits that is read: the sum over k of weight_k (logit_k - mean).

    Of one token of weight 1 it is that token's centred logit; of weights 1 and -1 the difference of two logits.

    Attributes:
      tokens: [K] int.
      weights: [K].
    """

    tokens: jax.Array | np.ndarray
    weights: jax.Array | np.ndarray

    @classmethod
    def target(cls, token: Int[ArrayLike, "*P"], foil: Int[ArrayLike, "*P"] | None = None) -> Contrast:
        """Return the contrast of a token or, with a foil, of the token less the foil."""
        tokens = jnp.stack([jnp.asarray(each) for each in ([token] if foil is None else [token, foil])], axis=-1)
        return cls(tokens, jnp.broadcast_to(jnp.array([1.0, -1.0])[: tokens.shape[-1]], tokens.shape))

    def of(self, logits: Float[Array, " V"]) -> Float[Array, ""]:
        """Return its value."""
        return (self.weights * (logits[self.tokens] - logits.mean())).sum()


def readout(params: Params, contrast: Contrast) -> tuple[Float[Array, " D"], Float[Array, ""]]:
    """Return r and const, with which a contrast is <final stream, r> / sigma + const.

    r = gain * sum over k of weight_k (W_U[:, k] - mean over v of W_U[:, v]). Under a LayerNorm, which takes the mean
    of the stream away, r is that less its own mean, and const is the addition of the norm's bias; else const is 0.
    A final soft-cap comes after the logits that are read.
    """
    matrix = _apply(params, method="unembedding_matrix")
    norm = params.weights["final_norm"]
    chosen = (contrast.weights[None] * matrix[:, contrast.tokens].astype(jnp.float32)).sum(axis=1)
    direction = chosen - contrast.weights.sum() * matrix.astype(jnp.float32).mean(axis=1)
    vector = norm["scale"] * direction
    if params.config.norm == "rms":
        return vector, jnp.zeros(())
    return vector - vector.mean(), norm["bias"] @ direction
