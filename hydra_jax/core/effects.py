"""An ablation's effects, as pure functions of a clean and an ablated run (its equations are in the README).

Every effect is in units of the target's centred logit, the logit minus its mean over the vocabulary.
"""

from __future__ import annotations

import flax.struct
import jax
from jaxtyping import Array, Float

from hydra_jax.core.edits import ATTN, MLP
from hydra_jax.core.prefill import Clean
from hydra_jax.core.replay import Replayed
from hydra_jax.models import transformer
from hydra_jax.models.transformer import Params


class Effects(flax.struct.PyTreeNode):
    """One ablation's effects in one prompt; a tilde marks the ablated run, c the ablated component.

    Attributes:
      total_effect: [], pi(clean) - pi(ablated); positive where c was promoting the target.
      direct_effect: [], u(w_c) - u(w~_c), the drop if only the direct path were cut.
      compensation: [L, 2], u(w~_d) - u(w_d); positive where d repairs, 0 upstream of c.
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
    readouts = transformer.head_readouts(params, clean.readout, clean.mixed)
    return (clean.mixed * readouts).sum(axis=-1) / clean.final_scale


def effects(clean: Clean, delta: Float[Array, " D"], replayed: Replayed) -> Effects:
    """Return the effects of the edit `delta`, whose run was `replayed`."""
    ablated = replayed.logit - clean.constant
    total = clean.lens(clean.resid_post[-1]) - ablated
    direct = clean.lens(-delta)
    norm = ablated * (1 - replayed.final_scale / clean.final_scale)
    by_site = replayed.compensation.sum(axis=0)
    return Effects(
        total_effect=total,
        direct_effect=direct,
        compensation=replayed.compensation,
        attn_compensation=by_site[ATTN],
        mlp_compensation=by_site[MLP],
        norm_compensation=norm,
        residual=total - (direct - by_site.sum() - norm),
    )
