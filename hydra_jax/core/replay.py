"""An ablation as one decoded token: add `delta` to the stream at one component and go on from there.

At the last position attention carries nothing back to earlier tokens, so their clean keys and values
stay true under any edit of a last-token write, and nothing before the edit has to be run again.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hydra_jax.core.edits import ATTN, MLP
from hydra_jax.core.prefill import Clean
from hydra_jax.models import transformer
from hydra_jax.models.transformer import Params

Place = tuple[Int[Array, ""], Int[Array, ""]]
"""A component as arrays: its layer, and its site (0 attention, 1 MLP)."""

State = tuple[Float[Array, " D"], Float[Array, "L 2"]]
"""A loop's state on its way downstream: the stream's shift, and the changes of contributions."""


class Replayed(flax.struct.PyTreeNode):
    """The ablated run, read at the last token.

    Attributes:
      compensation: [L, 2], u^(ablated write) - u^(clean write) of each component; 0 upstream of the edit.
      logit: [], the target's centred logit, before any final soft-cap.
      final_scale: [], sigma of the ablated run.
    """

    compensation: jax.Array
    logit: jax.Array
    final_scale: jax.Array


def replay(params: Params, clean: Clean, component: Place, delta: Float[Array, " D"]) -> Replayed:
    """Return the run in which `delta` was added to `component`'s write at the last token.

    Args:
      params: the model.
      clean: the prompt's clean run.
      component: layer and site (0 attention, 1 MLP).
      delta: ablated minus clean write.
    """
    shift, compensation = _downstream(params, clean, component, delta, passed_on=True)
    resid = clean.resid_post[-1] + shift
    scale = transformer.final_scale(params, resid)
    return Replayed(compensation, resid @ clean.readout / scale + clean.constant, scale)


def direct_edges(params: Params, clean: Clean, component: Place, delta: Float[Array, " D"]) -> Float[Array, "L 2"]:
    """Return the change of each component's contribution when it alone sees the edit.

    Component d reads the clean stream plus `delta`; all between the edit and d is frozen. Where nothing
    is passed on, this is d's compensation. The arguments and the cost are those of `replay`.
    """
    return _downstream(params, clean, component, delta, passed_on=False)[1]


def _downstream(params: Params, clean: Clean, component: Place, delta: Float[Array, " D"], passed_on: bool) -> State:
    """Return the stream's shift at the end, and the change of each component's contribution.

    Every component downstream reads the clean stream plus a shift: the edit, and, where changes are
    `passed_on`, those of the writes between. The layer and site stay arrays: under `vmap` over edits of
    one component they select a loop start and a branch, so a batch costs only what is downstream of it,
    and all components share a compilation.
    """
    edited, edited_site = component

    def read(layer: Int[Array, ""], site: int, write: Float[Array, " D"], state: State) -> State:
        shift, changes = state
        change = write - clean.writes[layer, site]
        shift = shift + change if passed_on else shift
        return shift, changes.at[layer, site].set(clean.lens(change))

    def mlp(layer: Int[Array, ""], resid: Float[Array, " D"], state: State) -> State:
        return read(layer, MLP, transformer.mlp_write(params, layer, resid), state)

    def attn_mlp(layer: Int[Array, ""], state: State) -> State:
        cache = clean.keys[layer], clean.values[layer]
        resid_pre = clean.resid_post[layer - 1] + state[0]
        state = read(layer, ATTN, transformer.attn_decode(params, layer, resid_pre, clean.position, *cache), state)
        return mlp(layer, resid_pre if params.config.parallel else clean.resid_mid[layer] + state[0], state)

    def same_layer(state: State) -> State:
        return mlp(edited, clean.resid_mid[edited] + state[0], state)

    state = delta, jnp.zeros((params.config.layers, 2))
    if not params.config.parallel:
        state = jax.lax.cond(edited_site == ATTN, same_layer, lambda state: state, state)
    return jax.lax.fori_loop(edited + 1, params.config.layers, attn_mlp, state)
