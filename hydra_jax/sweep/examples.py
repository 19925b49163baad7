"""A few prompts of a sweep with every replacement, for the figure of single prompts."""

from __future__ import annotations

import numpy as np
import xarray as xr

from hydra_jax.core.edits import ATTN, SITES
from hydra_jax.errors import UserError, shown
from hydra_jax.store import variables
from hydra_jax.sweep.ablations import ablate_each
from hydra_jax.sweep.plan import Plan

BLOCK = 256
"""Prompts whose effects are in memory at once, where all are looked through."""

EXAMPLES = 4
COORDINATES = (
    *("prompt_id", "text", "target_text", "foil_text", "clean_logit", "clean_probability"),
    *("ablated_name", "ablated_layer", "ablated_site", "ablated_head"),
)


def examples(plan: Plan, effects: xr.Dataset, prompt_id: str = "") -> xr.Dataset:
    """Ablate in a few prompts the strongest attention layer, the one of the largest direct effect.

    They are the prompt that is asked for, and those in which that ablation is repaired most, at the
    quartiles, and least (or made worse most), in logits.

    Args:
      plan: the sweep.
      effects: its results.
      prompt_id: the prompt that comes first; "" for none in particular.

    Raises:
      UserError: if the sweep has no such prompt.

    Returns:
      `ablations.ablate_each`, along the dimension `example`.
    """
    if prompt_id and prompt_id not in plan.ids:
        raise UserError(f"config.example: {shown(prompt_id)} is not among the prompts swept; see prompts.csv")
    strongest, repaired = _strongest(effects)
    asked = [plan.ids.index(prompt_id)] if prompt_id else []
    order = np.argsort(-repaired)[: np.isfinite(repaired).sum()]
    if not len(order):
        raise UserError("prompts: no prompt's values are all finite; sweep in float32, into another --workdir")
    spread = order[np.linspace(0, len(order) - 1, EXAMPLES).round().astype(int)]
    ablated = []
    chosen = list(dict.fromkeys([*asked, *spread.tolist()]))[:EXAMPLES]
    for one in ablate_each(plan, [(index, plan.ablations[int(strongest[index])]) for index in chosen]):
        named = {name: np.array(one.attrs[name]) for name in COORDINATES}
        named |= {name: value.astype(object) for name, value in named.items() if value.dtype.kind == "U"}
        ablated.append(one.assign_coords(named).drop_attrs(deep=False))
    shared = {"kind": str(plan.ablation.kind), "units": variables.LOGITS}
    return xr.concat(ablated, "example", coords=list(COORDINATES), compat="override").assign_attrs(shared)


def _strongest(effects: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Find each prompt's ablation of the largest direct effect, of attention where there are some.

    Returns:
      [P], its index along `ablated`; and [P], by how much it is repaired: NaN where values are not finite.
    """
    strongest, repaired = [], []
    for start in range(0, effects.sizes["prompt"], BLOCK):
        block = effects[["direct_effect", "total_effect"]].isel(prompt=slice(start, start + BLOCK))
        means = block.mean("replacement", skipna=False)
        attention = means["ablated_site"] == SITES[ATTN]
        direct = means["direct_effect"].where(attention if attention.any() else True, -np.inf).fillna(-np.inf).values
        strongest.append(direct.argmax(axis=1))
        chosen = np.arange(len(direct)), strongest[-1]
        repaired.append((means["direct_effect"] - means["total_effect"]).values[chosen])
    return np.concatenate(strongest), np.concatenate(repaired)
