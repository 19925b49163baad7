"""Contributions to what one text's clean run says: what each part adds to a logit, and what the stream says on its way.

The final stream z is the sum of the embedding and all writes, and a contrast is <z, r> / sigma + const: so each part w
of the sum contributes u(w) = <w, r> / sigma, and the parts add up to what is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from hydra_jax.config import SweepConfig
from hydra_jax.core.edits import ATTN, MLP, SITES, WHOLE, Component
from hydra_jax.core.prefill import MOST_LIKELY, LayerClean, Reading
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.batching import fill_up, round_up
from hydra_jax.engine.walk import Texts, forward, program
from hydra_jax.errors import UserError
from hydra_jax.models import pieces, transformer
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.layers import softcap
from hydra_jax.models.pieces import LayerParams
from hydra_jax.models.transformer import Contrast, Params
from hydra_jax.store.variables import LOGITS
from hydra_jax.sweep.activations import alone, first, texts_of
from hydra_jax.sweep.items import Item
from hydra_jax.weights.model import Model

EMBEDDING, CONSTANT = "embedding", "constant"
"""The parts that no component writes: the stream before the first layer, and the final norm's bias."""

NOWHERE = -1
"""The layer of those parts."""


class Part(NamedTuple):
    """A part of what is read.

    Attributes:
      name: "embedding", "attn 3", "attn 3.5", "attn 3 bias", "mlp 3" or "constant".
      layer: NOWHERE where it has none.
      site: "attn" or "mlp", or its name.
      head: WHOLE where it is not a head's.
    """

    name: str
    layer: int
    site: str
    head: int = WHOLE


class Lens(NamedTuple):
    """The next token that each of S streams would say as the final one: arrays [S].

    Attributes:
      logit: the contrast, before any soft-cap.
      probability: the target's.
      rank: int, the number of tokens that are more likely than the target.
      top: int, the most likely token.
    """

    logit: jax.Array
    probability: jax.Array
    rank: jax.Array
    top: jax.Array


def contributions(model: Model, item: Item, place: int, contrast: Contrast, by_head: bool = False) -> xr.Dataset:
    """Return what every part of the model adds to what a text says after one of its tokens.

    Args:
      model: the model, its layers on the devices or read as they are needed.
      item: the text.
      place: the token after which it is read, from 0.
      contrast: [K] tokens and weights; MOST_LIKELY among the tokens stands for the most likely next one.
      by_head: whether the parts of attention are its heads, and its output bias where it has one.

    Returns:
      A dataset over (part), in forward order: `contribution`, in logits, and `accumulated`, the sum of those up to it,
      both by the final stream's sigma; and over (stage), the streams before every layer and after the last:
      `lens_logit`, the contrast that a stream would say if it were the final one, `lens_probability` and `lens_rank`
      (0 for the most likely) of the contrast's first token, and the most likely token, `lens_top_id` and
      `lens_top_text`.

    Raises:
      UserError: if the text has no such token, does not fit beside the model, or if the parts do not add up.
    """
    if not 0 <= place < len(item.tokens):
        raise UserError(
            f"position {place}: prompt {item.prompt.name} has tokens 0-{len(item.tokens) - 1}; give one of them"
        )
    config = model.config
    # Later tokens do not matter to this one.
    texts, sizes = alone(model, Item(item.prompt, item.tokens[: place + 1]), [place])
    streams, of_layers = _walk(model, texts, by_head)
    asked = Contrast(np.asarray(contrast.tokens, np.int32), np.asarray(contrast.weights, np.float32))
    texts_and_readings = (*texts.positions.shape, len(asked.tokens))
    reading = texts.read(jax.tree.map(lambda leaf: np.broadcast_to(leaf, texts_and_readings), asked))
    said = jax.tree.map(lambda leaf: leaf[0], first(reading))
    asked = asked.replace(tokens=np.where(asked.tokens == MOST_LIKELY, said.top, asked.tokens).astype(np.int32))

    readout, writes = said.readout.astype(np.float64) / said.final_scale, np.concatenate([streams[:1], *of_layers])
    summands = np.append(writes.astype(np.float64) @ readout, said.constant)
    _check_sum(item, summands.sum(), said.centred_logit, _rounding(config, writes, said.final, readout))

    of_parts = parts(config, by_head)
    lens = _lens(texts, np.concatenate([streams, said.final[None]]), asked, sizes.logits)
    spelled = texts_of(model.tokenizer, lens.top)
    variables: dict[str, Any] = {
        "contribution": ("part", summands, {"long_name": "contribution to what is read", "units": LOGITS}),
        "accumulated": ("part", summands.cumsum(), {"long_name": "sum of contributions so far", "units": LOGITS}),
        "lens_logit": ("stage", lens.logit, {"long_name": "what the stream would say", "units": LOGITS}),
        "lens_probability": ("stage", lens.probability, {"long_name": "probability of the target there"}),
        "lens_rank": ("stage", lens.rank.astype(np.int64), {"long_name": "tokens more likely than the target there"}),
        "lens_top_id": ("stage", lens.top.astype(np.int64), {"long_name": "the most likely token there"}),
        "lens_top_text": ("stage", spelled, {"long_name": "its text"}),
    }
    stages = [*(f"resid_pre {layer}" for layer in range(config.layers)), f"resid_post {config.layers - 1}"]
    labels = {
        "part": np.array([part.name for part in of_parts], object),
        "layer": ("part", np.array([part.layer for part in of_parts])),
        "site": ("part", np.array([part.site for part in of_parts], object)),
        "head": ("part", np.array([part.head for part in of_parts])),
        "stage": np.array(stages, object),
    }
    dataset = xr.Dataset(variables, labels, _attributes(model, item, place, asked, said))
    for name in ("contribution", "accumulated"):
        dataset[name] = dataset[name].astype(np.float32)
    return dataset


def parts(config: ModelConfig, by_head: bool) -> list[Part]:
    """Return the parts that add up to what is read, in forward order."""
    found = [Part(EMBEDDING, NOWHERE, EMBEDDING)]
    for layer in range(config.layers):
        attention = Component(layer, ATTN)
        heads = [Component(layer, ATTN, head) for head in range(config.heads)] if by_head else [attention]
        found += [Part(str(one), layer, SITES[ATTN], one.head) for one in heads]
        if by_head and config.out_bias:
            found.append(Part(f"{attention} bias", layer, SITES[ATTN]))
        found.append(Part(str(Component(layer, MLP)), layer, SITES[MLP]))
    return [*found, Part(CONSTANT, NOWHERE, CONSTANT)]


def _walk(model: Model, texts: Texts, by_head: bool) -> tuple[np.ndarray, list[np.ndarray]]:
    """Take a text through all layers; return streams before them [L, D], and of each its parts' writes [n, D]."""
    layers, writes_of = model.layers, program(texts.mesh, _writes, (0,), by_head=by_head)
    seen = []
    for layer in forward(model.config, layers):
        clean = texts.through(layer)
        seen.append((clean.resid_pre[:, 0], writes_of(layer, clean)))
        if layers.streamed:  # room has to be made for the next layer
            jax.block_until_ready((seen[-1], texts.stream))
    streams, writes = zip(*first(seen), strict=True)
    return np.stack(streams), list(writes)


def _writes(layer: LayerParams, clean: LayerClean, by_head: bool) -> jax.Array:
    """Return the writes [P, n, D] of a layer's parts at the first of the tokens that texts are read after."""
    if not by_head:
        return clean.writes[:, 0]
    heads, bias = jax.vmap(pieces.head_writes, (None, 0))(layer, clean.mixed[:, 0])
    every = [heads, *([bias[:, None]] if layer.config.out_bias else []), clean.writes[:, 0, MLP:]]
    return jnp.concatenate(every, axis=1)


def _lens(texts: Texts, streams: np.ndarray, contrast: Contrast, at_once: int) -> Lens:
    """Return what each of some streams [S, D] would say as the final one."""
    mesh = texts.mesh
    filled = np.stack(fill_up(list(streams), round_up(len(streams), mesh.shape[meshes.DATA])))
    read = program(mesh, _read_streams, (0, 2), at_once=at_once)
    found = jax.device_get(read(texts.params, texts.put(filled), contrast))
    return jax.tree.map(lambda leaf: leaf[: len(streams)], found)


def _read_streams(params: Params, streams: jax.Array, contrast: Contrast, at_once: int) -> Lens:
    def one(stream: jax.Array) -> Lens:
        logits = transformer.unembed(params, stream)
        target = contrast.tokens[0]
        probability = jax.nn.softmax(softcap(logits, params.config.final_softcap))[target]
        return Lens(contrast.of(logits), probability, (logits > logits[target]).sum(), logits.argmax())

    return jax.lax.map(one, streams, batch_size=at_once)


def _rounding(config: ModelConfig, writes: np.ndarray, final: np.ndarray, readout: np.ndarray) -> float:
    """Return how far rounding may move what is read: of the stream at each addition, and of what is unembedded."""
    of_stream, of_products = (float(jnp.finfo(dtype).eps) for dtype in (jnp.float32, config.dtype))
    return (of_stream * np.abs(writes).sum(axis=0) + of_products * np.abs(final)) @ np.abs(readout)


def _check_sum(item: Item, found: float, said: float, rounding: float) -> None:
    """Refuse parts that do not add up to what the model says."""
    if not abs(found - said) <= SweepConfig().identity_tolerance + rounding:  # nor where one is not a number
        raise UserError(
            f"prompt {item.prompt.name}: contributions add up to {found:.6g} and not to what the model says,"
            f" {said:.6g} logits; the activations lose precision: use float32 and precision=highest"
        )


def _attributes(model: Model, item: Item, place: int, contrast: Contrast, said: Reading) -> dict[str, Any]:
    """Return what there is once."""

    def spelled(tokens: Iterable[Any]) -> list[str]:
        return texts_of(model.tokenizer, tokens).tolist()

    found = {
        "prompt_id": item.prompt.id,
        "text": item.prompt.text,
        "position": place,
        "token": spelled([item.tokens[place]])[0],
        "target_id": int(said.target),
        "target_text": spelled([said.target])[0],
        "clean_logit": float(said.centred_logit),
        "clean_probability": float(said.probability),
        "final_scale": float(said.final_scale),
        "units": LOGITS,
    }
    foils = np.asarray(contrast.tokens)[np.asarray(contrast.weights) < 0].tolist()
    return found | ({"foil_ids": foils, "foil_texts": spelled(foils)} if foils else {})
