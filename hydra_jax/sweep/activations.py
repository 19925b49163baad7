"""One text's clean run, everything that it writes: streams, writes, heads, attention, and what it says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
import xarray as xr
from tokenizers import Tokenizer

from hydra_jax.core.edits import ATTN, MLP
from hydra_jax.core.prefill import MOST_LIKELY
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.memory import SHARE, Asked, BatchSizer, host_bytes, left
from hydra_jax.engine.walk import Sizes, Texts, forward, program
from hydra_jax.errors import UserError
from hydra_jax.models import pieces
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.pieces import LayerParams
from hydra_jax.models.transformer import Contrast
from hydra_jax.sweep.items import Item, batch_of
from hydra_jax.weights.model import Model

WRITTEN = {
    "resid_pre": ("the stream before the layer", ("token", "width")),
    "resid_mid": ("the stream between the layer's two writes", ("token", "width")),
    "resid_post": ("the stream after the layer", ("token", "width")),
    "attn_out": ("attention's write", ("token", "width")),
    "mlp_out": ("the MLP's write", ("token", "width")),
    "mixed": ("the values as each head mixed them", ("token", "head", "head_dim")),
    "keys": ("keys, normed and rotated where the model does so", ("token", "kv_head", "head_dim")),
    "values": ("values", ("token", "kv_head", "head_dim")),
    "pattern": ("the share of its attention that the query gives to the key", ("head", "query", "key")),
}
"""The variables of every layer: their meaning, and their dimensions after `layer`."""


def alone(model: Model, item: Item, places: Sequence[int]) -> tuple[Texts, Sizes]:
    """Return one text before the first layer, read after the tokens at `places`, and how much is computed at once.

    There are as many of it as the devices that texts are spread over, and all are the same.

    Raises:
      UserError: if it does not fit beside the model.
    """
    c, mesh, streamed = model.config, meshes.mesh_of(model.params), model.layers.streamed
    tokens, _ = batch_of([item], mesh.shape[meshes.DATA], c.context)
    asked = Asked(programs=0, draws=1, readings=len(places), streamed=streamed)
    sizer = BatchSizer(c, mesh, asked, left(model.memory, c, mesh, streamed))
    sizer.prompts(tokens.shape[1], clean=True)
    at = np.tile(np.array(places, np.int32), (len(tokens), 1))
    at_once = sizer.sizes(tokens.shape[1])
    return Texts(model.params, tokens, at, at_once), at_once


def first(tree: Any) -> Any:
    """Return the first text's part of arrays [P, ...], on this host."""
    return jax.device_get(jax.tree.map(lambda leaf: leaf[0], tree))


def texts_of(tokenizer: Tokenizer, tokens: Iterable[Any]) -> np.ndarray:
    """Return the text of each token, of those that mark a beginning or an end, too."""
    return np.array([tokenizer.decode([int(token)], skip_special_tokens=False) for token in tokens], object)


def trace(model: Model, item: Item) -> xr.Dataset:
    """Return everything that one text's clean run writes.

    Args:
      model: the model, its layers on the devices or read as they are needed.
      item: the text.

    Returns:
      A dataset of float32: over (layer, token, width) the streams `resid_pre`, `resid_mid` and `resid_post` and the
      writes `attn_out` and `mlp_out`; over heads `mixed`, `keys` and `values` (of K key/value heads); `pattern`
      over (layer, head, query, key), 0 where a query does not see a key; and over (token) the most likely next
      one, `top_id`, `top_text` and `top_probability`.

    Raises:
      UserError: if it would not fit into this machine's memory, or the text not beside the model.
    """
    c, length = model.config, len(item.tokens)
    _check_fits(c, item)
    texts, _ = alone(model, item, range(length))
    shapes = sizes(c, length)
    found = {
        name: np.empty([shapes[dim] for dim in ("layer", *dims)], np.float32) for name, (_, dims) in WRITTEN.items()
    }
    attention = program(texts.mesh, _patterns, (0,))
    for number, layer in enumerate(forward(c, model.layers)):
        stream = texts.stream
        clean = texts.through(layer)
        clean, pattern = first((clean, attention(layer, stream)))  # waits, which makes room for the next layer
        of_layer = {
            "resid_pre": clean.resid_pre,
            "attn_out": clean.writes[:, ATTN],
            "mlp_out": clean.writes[:, MLP],
            "mixed": clean.mixed,
            "keys": np.moveaxis(clean.keys, -1, 0)[:length],
            "values": np.swapaxes(clean.values, 0, 1)[:length],
            "pattern": pattern[:, :length, :length],
        }
        of_layer["resid_mid"] = of_layer["resid_pre"] + of_layer["attn_out"]
        of_layer["resid_post"] = of_layer["resid_mid"] + of_layer["mlp_out"]
        for name, values in of_layer.items():
            found[name][number] = values
    most_likely = Contrast.target(np.full(texts.positions.shape, MOST_LIKELY, np.int32))
    reading = texts.read(most_likely)
    top, probability = first((reading.top, reading.probability))
    variables: dict[str, Any] = {
        name: (("layer", *dims), found[name], {"long_name": meaning}) for name, (meaning, dims) in WRITTEN.items()
    }
    variables |= {
        "top_id": ("token", top.astype(np.int64), {"long_name": "the most likely next token"}),
        "top_text": ("token", texts_of(model.tokenizer, top), {"long_name": "its text"}),
        "top_probability": ("token", probability, {"long_name": "its probability"}),
    }
    labels: dict[str, Any] = {dim: np.arange(shapes[dim]) for dim in ("layer", "head", "kv_head")}
    spelled = texts_of(model.tokenizer, item.tokens)
    for dim in ("token", "query", "key"):
        labels[dim] = np.arange(length)
        labels[f"{dim}_id"] = (dim, np.array(item.tokens))
        labels[f"{dim}_text"] = (dim, spelled)
    return xr.Dataset(variables, labels, {"prompt_id": item.prompt.id, "text": item.prompt.text})


def sizes(config: ModelConfig, tokens: int) -> dict[str, int]:
    """Return the size of each dimension of a trace."""
    return {
        "layer": config.layers,
        "width": config.width,
        "head": config.heads,
        "kv_head": config.kv_heads,
        "head_dim": config.head_dim,
        **dict.fromkeys(("token", "query", "key"), tokens),
    }


def trace_bytes(config: ModelConfig, tokens: int) -> int:
    """Return the bytes of a text's trace on this host."""
    of = sizes(config, tokens)
    # Python's integers, which have no end.
    numbers = sum(np.prod([of[dim] for dim in dims], dtype=object) for _, dims in WRITTEN.values())
    return 4 * config.layers * numbers


def _check_fits(config: ModelConfig, item: Item) -> None:
    wanted, free = trace_bytes(config, len(item.tokens)), SHARE * host_bytes()
    if wanted > free:
        raise UserError(
            f"prompt {item.prompt.name}: a trace of its {len(item.tokens):,} tokens takes {wanted / 1e9:.2g} GB of this"
            f" machine's memory, {free / 1e9:.2g} are free; give a shorter text"
        )


def _patterns(layer: LayerParams, stream: jax.Array) -> jax.Array:
    """Return the patterns [P, H, T, T] of texts whose streams before the layer are [P, T, D]."""
    return jax.vmap(pieces.attn_pattern, (None, 0))(layer, stream)
