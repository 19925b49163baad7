"""An ablation as one decoded token: a row whose program clamps one component."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hydra_jax.core.edits import SITES
from hydra_jax.core.prefill import Clean
from hydra_jax.core.programs import Word
from hydra_jax.core.row import Row, Values, Words, walk
from hydra_jax.models.layers import positions
from hydra_jax.models.pieces import LayerParams
from hydra_jax.models.transformer import Params

Place = tuple[Int[Array, ""], Int[Array, ""]]
"""A component as arrays: its layer, and its site (0 attention, 1 MLP)."""


def replay(params: Params, clean: Clean, component: Place, delta: Float[Array, " D"]) -> Row:
    """Return the run in which `delta` was added to `component`'s write at the last token: CLAMP it, FOLLOW the rest.

    Args:
      params: the model.
      clean: the prompt's clean run.
      component: layer and site (0 attention, 1 MLP).
      delta: ablated minus clean write.
    """
    return _clamped(params, clean, component, delta, Word.FOLLOW)


def direct_edges(params: Params, clean: Clean, component: Place, delta: Float[Array, " D"]) -> Float[Array, "L 2"]:
    """Return the change of each component's contribution when it alone sees the edit: CLAMP it, PROBE the rest.

    Component d reads the clean stream plus `delta`; all between the edit and d is frozen. Where nothing
    is passed on, this is d's compensation. The arguments are those of `replay`.
    """
    return _clamped(params, clean, component, delta, Word.PROBE).changes / clean.final_scale


def _clamped(params: Params, clean: Clean, component: Place, delta: Float[Array, " D"], rest: Word) -> Row:
    """Return the row of one clamp, in which the rest does as `rest` says."""
    c, (layer, site) = params.config, component
    layers, sites = jnp.arange(c.layers)[:, None], jnp.arange(len(SITES))[None]
    here = (layers == layer) & (sites == site)
    after = (layers > layer) | ((layers == layer) & (sites > site) & (not c.parallel))
    words = Words(
        writes=jnp.where(here, int(Word.CLAMP), int(rest)),
        heads=jnp.full((c.layers, c.heads), int(Word.FOLLOW)),
        living=after,
    )
    values = Values(clean.writes + delta[None, None], jnp.zeros((c.layers, c.heads, c.head_dim)))
    return walk(LayerParams(params.weights["layers"], positions(c), c), clean, words, values)
