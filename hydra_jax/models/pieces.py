"""The pieces of one layer, each for one text or one token, as functions of that layer's weights alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hydra_jax.models.config import ModelConfig
from hydra_jax.models.layers import Norm, Positions, positions, product
from hydra_jax.models.transformer import Layer, Params, Trace


class LayerParams(struct.PyTreeNode):
    """One layer: a layer's share of `Params`.

    Attributes:
      weights: its parameters, nested as those under "layers" in `Params.weights`, without their axis L.
      at: its treatment of positions.
      config: the model's, static under `jax.jit`.
    """

    weights: dict[str, Any]
    at: Positions
    config: ModelConfig = struct.field(pytree_node=False)


def layer_of(params: Params, layer: int | Int[Array, ""]) -> LayerParams:
    """Return one layer of a model whose layers are stacked."""
    weights, at = jax.tree.map(lambda leaf: leaf[layer], (params.weights["layers"], positions(params.config)))
    return LayerParams(weights, at, params.config)


def run(layer: LayerParams, resid: Float[Array, "T D"], only: Int[Array, "*Q"]) -> tuple[Float[Array, "T D"], Trace]:
    """Run a text's tokens through a layer.

    Args:
      layer: the layer.
      resid: the stream that it reads.
      only: the tokens whose part of the trace is kept.

    Returns:
      The stream after it, and the layer's trace: keys and values of all tokens, the rest of those in `only`.
    """
    return _apply(layer, resid, None, None, layer.at, only)


def attend(
    layer: LayerParams,
    resid_pre: Float[Array, " D"],
    position: Int[Array, ""],
    keys: Float[Array, "K head_dim T"],
    values: Float[Array, "K T head_dim"],
) -> Float[Array, "H head_dim"]:
    """Return what each head of attention mixes for one token.

    Args:
      layer: the layer.
      resid_pre: the stream at the token.
      position: the token's place; only keys before it are attended to, and itself.
      keys: the layer's, of the clean run.
      values: the layer's, of the clean run.
    """
    return _apply(layer, resid_pre, position, layer.at, keys, values, method="attend")


def attn_pattern(layer: LayerParams, resid_pre: Float[Array, "T D"]) -> Float[Array, "H T T"]:
    """Return the share of its attention that each token gives to each other, by head: [head, query, key].

    Args:
      layer: the layer.
      resid_pre: the stream that it reads.
    """

    def pattern(module: Layer) -> Float[Array, "H T T"]:
        return module.attn.pattern(module.attn_norm(resid_pre), layer.at)

    return _apply(layer, method=pattern)


def attn_write(layer: LayerParams, mixed: Float[Array, "H head_dim"]) -> Float[Array, " D"]:
    """Return the write of attention for one token whose heads mix `mixed`."""
    return _apply(layer, mixed, method="attn_write")


def mlp_write(layer: LayerParams, resid: Float[Array, " D"]) -> Float[Array, " D"]:
    """Return the write of the MLP for one token, of which it reads the stream `resid`."""
    return _apply(layer, resid, method="mlp_write")


def head_shares(layer: LayerParams, mixed: Float[Array, "H head_dim"]) -> Float[Array, "H D"]:
    """Return the summands of attention's write that its heads add by mixing `mixed`.

    They and the output bias add up to the write, before any post-norm.
    """
    c = layer.config
    kernel = layer.weights["attn"]["out"]["kernel"].reshape(c.heads, c.head_dim, -1)
    return product(c, "hi,hid->hd", mixed, kernel)


def head_writes(
    layer: LayerParams, mixed: Float[Array, "H head_dim"]
) -> tuple[Float[Array, "H D"], Float[Array, " D"]]:
    """Return the summands of attention's write, as it is added to the stream: each head's, and the output bias'.

    Where a post-norm follows, each is divided by the norm's divisor of their sum. Without an output bias its summand
    is 0.
    """
    shares, bias = head_shares(layer, mixed), jnp.zeros(layer.config.width)
    if layer.config.out_bias:
        bias += layer.weights["attn"]["out"]["bias"]
    if not layer.config.post_norm:
        return shares, bias
    scale = layer.weights["attn_post_norm"]["scale"] / Norm(layer.config).divisor(shares.sum(axis=0) + bias)
    return shares * scale[None], bias * scale


def heads_delta(
    layer: LayerParams, mixed: Float[Array, "H head_dim"], values: Float[Array, "H head_dim"], of: Bool[Array, " H"]
) -> Float[Array, " D"]:
    """Return the change of attention's write where some heads mix something else.

    Where a post-norm follows, the heads' sum is edited and the write computed anew.

    Args:
      layer: the layer.
      mixed: the values as its heads mixed them.
      values: the values that take their place.
      of: the heads that this is about.
    """
    change = jnp.where(of[:, None], values - mixed, 0)
    shares = product(layer.config, "i,id->d", change.reshape(-1), layer.weights["attn"]["out"]["kernel"])
    if not layer.config.post_norm:
        return shares
    return _apply(layer, mixed, shares, method="heads_delta")


def head_readouts(
    layer: LayerParams, vector: Float[Array, " D"], mixed: Float[Array, "H head_dim"]
) -> Float[Array, "H head_dim"]:
    """Return the vectors whose products with the heads' mixed values are <head's share of the write, vector>.

    Where a post-norm follows, each share is divided by the norm's divisor of their sum.

    Args:
      layer: the layer.
      vector: a direction of the stream.
      mixed: the values as the heads mixed them.
    """
    c, out = layer.config, layer.weights["attn"]["out"]
    if not c.post_norm:
        return product(c, "id,d->i", out["kernel"], vector).reshape(c.heads, c.head_dim)
    heads = product(c, "i,id->d", mixed.reshape(-1), out["kernel"])
    if c.out_bias:
        heads += out["bias"]
    # Divided last, so that rows that share `vector` share the product.
    readouts = product(c, "id,d->i", out["kernel"], vector * layer.weights["attn_post_norm"]["scale"])
    return readouts.reshape(c.heads, c.head_dim) / Norm(c).divisor(heads)


def _apply(layer: LayerParams, *arguments: Any, method: str | Callable[[Layer], Any] | None = None) -> Any:
    return Layer(layer.config).apply({"params": layer.weights}, *arguments, method=method)
