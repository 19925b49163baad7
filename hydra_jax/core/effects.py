"""A row's effects, as pure functions of a clean and an intervened run (the equations are in the README).

Every effect is in units of the target's centred logit, the logit minus its mean over the vocabulary.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from hydra_jax.core.edits import ATTN, MLP
from hydra_jax.core.prefill import Clean, Reading
from hydra_jax.core.row import Row
from hydra_jax.models import pieces, transformer
from hydra_jax.models.layers import positions
from hydra_jax.models.pieces import LayerParams
from hydra_jax.models.transformer import Params


class Effects(flax.struct.PyTreeNode):
    """One row's effects; a tilde marks the intervened run, c its clamped components.

    Attributes:
      total_effect: [], pi(clean) - pi(ablated); positive where c was promoting the target.
      direct_effect: [], the sum of u(w_c) - u(w~_c), the drop if only the direct paths were cut.
      compensation: [L, 2], u(w~_d) - u(w_d) of all else; positive where d repairs, 0 upstream of c.
      attn_compensation: [], its sum over attention.
      mlp_compensation: [], its sum over MLPs.
      norm_compensation: [], <z~, r> (1 / sigma~ - 1 / sigma), the final norm's repair.
      residual: [], the difference between the identity's two sides below; rounding error alone if the replay is right.

    total_effect = direct_effect - sum(compensation) - norm_compensation
    """

    total_effect: jax.Array
    direct_effect: jax.Array
    compensation: jax.Array
    attn_compensation: jax.Array
    mlp_compensation: jax.Array
    norm_compensation: jax.Array
    residual: jax.Array


def delta_unembed(clean: Clean) -> Float[Array, "L 2"]:
    """Return u(w_d): the addition of each write of the clean run to the target's centred logit."""
    return jax.vmap(jax.vmap(clean.lens))(clean.writes)


def head_unembed(params: Params, clean: Clean) -> Float[Array, "L H"]:
    """Return the addition of each attention head to the target's centred logit.

    A layer's heads, and its output bias where it has one, add up to its `delta_unembed`.
    """
    layers = LayerParams(params.weights["layers"], positions(params.config), params.config)
    readouts = jax.vmap(pieces.head_readouts, (0, None, 0))(layers, clean.readout, clean.mixed)
    return (clean.mixed * readouts).sum(axis=-1) / clean.final_scale


def effects(
    params: Params,
    clean: Reading,
    row: Row,
    frozen_norm: Bool[ArrayLike, ""] = False,
    probed: Bool[ArrayLike, "*L2"] = False,
) -> Effects:
    """Return the effects of a row.

    Args:
      params: the model, of which its layers are not needed.
      clean: what the clean run says at the row's token.
      row: after the last layer.
      frozen_norm: whether the final norm divides by the clean run's sigma.
      probed: [L, 2], whether a component's change was recorded and not passed on; such are in no sum.
    """
    resid = clean.final + row.shift
    scale = jnp.where(frozen_norm, clean.final_scale, transformer.final_scale(params, resid))
    compensation = row.changes / clean.final_scale
    direct = row.direct / clean.final_scale
    ablated = resid @ clean.readout / scale
    total = clean.lens(clean.final) - ablated
    norm = ablated * (1 - scale / clean.final_scale)
    by_site = jnp.where(probed, 0, compensation).sum(axis=0)
    return Effects(
        total_effect=total,
        direct_effect=direct,
        compensation=compensation,
        attn_compensation=by_site[ATTN],
        mlp_compensation=by_site[MLP],
        norm_compensation=norm,
        residual=total - (direct - by_site.sum() - norm),
    )
