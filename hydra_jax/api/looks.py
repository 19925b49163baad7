"""One text's clean run, looked at: what every part of the model adds to a token's logit, and all that it writes."""

from __future__ import annotations

from typing import Any

import xarray as xr

from hydra_jax.api.arguments import Token, one
from hydra_jax.config import AUTO, LAST
from hydra_jax.core.edits import Kind
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.cluster import Cluster
from hydra_jax.engine.memory import Asked, BatchSizer, left
from hydra_jax.errors import UserError, speaks_of_arguments
from hydra_jax.models.transformer import Contrast
from hydra_jax.sweep import activations
from hydra_jax.sweep import contributions as attribution
from hydra_jax.sweep.bank import Bank
from hydra_jax.sweep.clean import CleanPass
from hydra_jax.sweep.items import Positions, itemise, uncut
from hydra_jax.sweep.readout import Readout, contrasts
from hydra_jax.weights.model import Model


@speaks_of_arguments
def contributions(
    model: Model,
    text: Any,
    target: Token = AUTO,
    foil: Token = AUTO,
    heads: bool = False,
    *,
    positions: Positions = LAST,
) -> xr.Dataset:
    """Return what every part of the model adds to a token's logit: direct logit attribution, and the logit lens.

    Args:
      model: from `load`.
      text: one prompt, as of `sweep`.
      target: the token, as of `sweep`.
      foil: a token whose logit is subtracted, as of `sweep`.
      heads: whether attention is told apart by heads.
      positions: the one token after which the text is read, as of `sweep`.

    Returns:
      A dataset over `part`, the embedding, each attention (or head, and the output bias where there is one) and MLP,
      and the constant of a final LayerNorm: `contribution`, which add up to `clean_logit`, and `accumulated`, their
      running sum, both with the final stream's divisor; and over `stage`, before each layer and after the last, what
      the stream would say itself: `lens_logit`, `lens_probability`, `lens_rank`, `lens_top_text`.

    Raises:
      UserError: if the text is not one prompt, or the token not one token.
    """
    items = itemise(model, one(text), positions)
    if len(items) != 1:
        raise UserError(f"positions: are {len(items)} of the text; give one")
    mesh, streamed = meshes.mesh_of(model.params), model.layers.streamed
    sizer = BatchSizer(
        model.config, mesh, Asked(1, 1, streamed=streamed), left(model.memory, model.config, mesh, streamed)
    )
    clean = CleanPass(model, Kind.ZERO, [], sizer, Bank(model.config.dtype), Cluster(0, 1))
    with clean.bar(1) as bar:
        clean.run(items, bar)
    read = contrasts(Readout(model, items, target, foil).tokens(items, clean.bank))
    contrast = Contrast(read.tokens[0], read.weights[0])
    return attribution.contributions(model, items[0], items[0].position, contrast, heads)


@speaks_of_arguments
def trace(model: Model, text: Any) -> xr.Dataset:
    """Return all that a text's clean run writes: streams, writes, what heads mix, and attention patterns.

    Args:
      model: from `load`.
      text: one prompt, as of `sweep`.

    Returns:
      A dataset of `resid_pre`, `resid_mid`, `resid_post`, `attn_out` and `mlp_out` over (layer, token, width), `mixed`
      over (layer, token, head, head_dim), `keys` and `values` over (layer, token, kv_head, head_dim), `pattern` over
      (layer, head, query, key), and of each token the most likely next one. Tokens are labelled by `token_text`.

    Raises:
      UserError: if the text is not one prompt, or this would not fit into memory.
    """
    return activations.trace(model, uncut(model, one(text))[0])
