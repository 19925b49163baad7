"""An ablation as one decoded token: add `delta` to the stream at one component and go on from there.

At the last position attention carries nothing back to earlier tokens, so their clean keys and values
stay true under any edit of a last-token write, and nothing before the edit has to be run again.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from hydra_jax.edits import ATTN, MLP
from hydra_jax.models import transformer
from hydra_jax.models.transformer import Params
from hydra_jax.prefill import Clean


class Replayed(flax.struct.PyTreeNode):
    """The ablated run, read at the last token.

    Attributes:
      compensation: [L, 2], u^(ablated write) - u^(clean write) of each component; 0 upstream of the edit.
      logit: [], the target's centred logit.
      final_scale: [], sigma of the ablated run.
    """

    compensation: jax.Array
    logit: jax.Array
    final_scale: jax.Array


def replay(params: Params, clean: Clean, component: tuple[jax.Array, jax.Array], delta: jax.Array) -> Replayed:
    """The run in which `delta` was added to what `component` wrote at the last token.

    The layer and site stay arrays: under `vmap` over edits of one component they select a loop start
    and a branch, so a batch costs only what is downstream of it, and all components share a compilation.

    Args:
      params: the model.
      clean: the prompt's clean run.
      component: layer [] and site [] (0 attention, 1 MLP), int.
      delta: [D], ablated minus clean write.
    """
    layer, site = component

    def write(layer, site, out, state):
        resid, compensation = state
        change = clean.lens(out - clean.writes[layer, site])
        return resid + out, compensation.at[layer, site].set(change)

    def mlp(layer, state):
        return write(layer, MLP, transformer.mlp_write(params, layer, state[0]), state)

    def attn_mlp(layer, state):
        cache = clean.keys[layer], clean.values[layer]
        out = transformer.attn_decode(params, layer, state[0], clean.position, *cache)
        return mlp(layer, write(layer, ATTN, out, state))

    edited = jnp.where(site == ATTN, clean.resid_mid[layer], clean.resid_post[layer]) + delta
    state = edited, jnp.zeros((params.config.layers, 2))
    state = jax.lax.cond(site == ATTN, lambda state: mlp(layer, state), lambda state: state, state)
    resid, compensation = jax.lax.fori_loop(layer + 1, params.config.layers, attn_mlp, state)
    scale = transformer.final_scale(params, resid)
    return Replayed(compensation, resid @ clean.readout / scale, scale)
