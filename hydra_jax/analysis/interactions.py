"""Pairs of ablations: what two of them cost together beyond what each costs alone, and who wakes up in between."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from hydra_jax.analysis import stats
from hydra_jax.analysis.bootstrap import LEVEL, interval
from hydra_jax.analysis.names import ablated_names, ablations
from hydra_jax.core.edits import ATTN, WHOLE, Ablation
from hydra_jax.errors import UserError

Pair = tuple[int, int, int]
"""Indices along `ablated`: of two ablations, the first named first, and of both together."""


def pairs(effects: xr.Dataset) -> list[Pair]:
    """Return every two ablations that share no component and were also made together, in order."""
    every = [frozenset(ablation.components) for ablation in ablations(effects)]
    places = {components: index for index, components in enumerate(every)}
    return [
        (first, second, places[every[first] | every[second]])
        for first in range(len(every))
        for second in range(first + 1, len(every))
        if every[first] | every[second] in places and not every[first] & every[second]
    ]


def interactions(effects: xr.Dataset) -> xr.Dataset:
    """Compare what two ablations cost together with what they cost alone.

    Args:
      effects: a sweep of components, or sets of them, and of pairs of these; only its finished prompts are used.

    Returns:
      A dataset along (prompt, first, second, replacement), in logits, `first` and `second` labelled by names:

      * `joint_effect`: the total effect of both together;
      * `single_effect` (prompt, first, replacement): that of each alone;
      * `interaction`: joint_effect less the two single ones. Above zero, each was hiding the other's importance, as a
        component and its repairer do; below, they cost the same loss twice;
      * `effect_after`: the effect of ablating `second` once `first` is gone, joint_effect less first's; beside
        second's own `single_effect` it says how much more it matters then;
      * `woken` (prompt, first, second): by how much `second` changes its contribution when `first` alone is ablated:
        what wakes up only then. 0 upstream.

      `joint_effect` and `interaction` are the same for (a, b) and (b, a). NaN stands where `first` is `second`, where
      the two were not ablated together, and in `woken` for heads of a sweep that did not record heads.

    Raises:
      UserError: if no two ablations were also made together, or no prompt is finished.
    """
    swept, members, place = _members(effects)
    effects = stats.finished(effects)
    total = effects["total_effect"].transpose("prompt", "ablated", "replacement").values
    single = total[:, members]
    joint = np.full((*single.shape[:2], len(members), single.shape[2]), np.nan, single.dtype)
    woken = np.full(joint.shape[:3], np.nan, single.dtype)
    every = ablations(effects)
    for first, second, both in swept:
        for one, other in ((first, second), (second, first)):
            joint[:, place[one], place[other]] = total[:, both]
            woken[:, place[one], place[other]] = _change(effects, one, every[other])
    after = joint - single[:, :, None]
    names = np.array(ablated_names(effects), dtype=object)[members]
    pair = ("prompt", "first", "second", "replacement")
    return xr.Dataset(
        {
            "interaction": (pair, joint - (single[:, :, None] + single[:, None])),
            "joint_effect": (pair, joint),
            "single_effect": (("prompt", "first", "replacement"), single),
            "effect_after": (pair, after),
            "woken": (pair[:3], woken),
        },
        {"first": names, "second": names}
        | {name: coordinate for name, coordinate in effects.coords.items() if coordinate.dims == ("prompt",)},
        {"units": "logits"},
    )


def _members(effects: xr.Dataset) -> tuple[list[Pair], list[int], dict[int, int]]:
    """Return the pairs, the indices along `ablated` of those that are in any, and their places among these."""
    swept = _some(pairs(effects))
    members = sorted({index for first, second, _ in swept for index in (first, second)})
    return swept, members, {index: number for number, index in enumerate(members)}


def mean_matrices(effects: xr.Dataset) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return names, and means over prompts and replacements of `interaction` and `woken` of `interactions`, [M, M].

    Raises:
      UserError: if no two ablations were also made together, or no prompt is finished.
    """
    swept, members, place = _members(effects)
    effects = stats.finished(effects)
    total = effects["total_effect"].mean(("prompt", "replacement"), dtype=np.float64).values
    every, named = ablations(effects), ablated_names(effects)
    interaction, woken = np.full((2, len(members), len(members)), np.nan)
    for first, second, both in swept:
        for one, other in ((first, second), (second, first)):
            interaction[place[one], place[other]] = total[both] - total[first] - total[second]
            woken[place[one], place[other]] = _change(effects, one, every[other]).mean(dtype=np.float64)
    return [named[index] for index in members], interaction, woken


def interaction_table(
    effects: xr.Dataset,
    resampled: stats.Resampled | None = None,
    samples: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
) -> pd.DataFrame:
    """Tabulate the pairs of a sweep, those that interact most first.

    Args:
      effects: a sweep of components and their pairs.
      resampled: its bootstrap; None draws one by `samples` and `seed`.
      samples: how many resamples.
      seed: of the resamples.
      level: share of the resamples inside an interval.

    Returns:
      One row per pair, `first` the one that was named first: `first_effect`, `second_effect`, `joint_effect`,
      `interaction`, `effect_after` and `woken` as means over prompts (see `interactions`) and `interaction_median`,
      each with `_low` and `_high`. Means draw prompts and replacements; medians and `woken` draw prompts.

    Raises:
      UserError: if no two ablations were also made together, or no prompt is finished.
    """
    swept = _some(pairs(effects))
    effects = stats.finished(effects)
    resampled = resampled or stats.bootstrap(effects, samples, seed)
    first, second, both = np.array(swept).T
    names, every = np.array(ablated_names(effects), dtype=object), ablations(effects)
    total = effects["total_effect"].mean("replacement").transpose("prompt", "ablated").values
    woken = np.stack([_change(effects, one, every[other]) for one, other, _ in swept], axis=1)
    means, samples_of = resampled.values["total_effect"], resampled.samples["total_effect"]
    excess = total[:, both] - total[:, first] - total[:, second]
    columns = {
        "interaction": (
            means[both] - means[first] - means[second],
            samples_of[:, both] - samples_of[:, first] - samples_of[:, second],
        ),
        "interaction_median": (np.median(excess, axis=0), resampled.draws.median(excess)),
        "joint_effect": (means[both], samples_of[:, both]),
        "first_effect": (means[first], samples_of[:, first]),
        "second_effect": (means[second], samples_of[:, second]),
        "effect_after": (means[both] - means[first], samples_of[:, both] - samples_of[:, first]),
        "woken": resampled.mean(woken),
    }
    table = {"first": names[first], "second": names[second]}
    for name, (value, drawn) in columns.items():
        low, high = interval(drawn, level)
        table |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return pd.DataFrame(table).sort_values("interaction", key=abs, ascending=False, ignore_index=True)


def _some(swept: list[Pair]) -> list[Pair]:
    if not swept:
        raise UserError(
            "interactions: no two ablations of this sweep were also made together; sweep with"
            " --config.ablation.interactions"
        )
    return swept


def _change(effects: xr.Dataset, ablated: int, ablation: Ablation) -> np.ndarray:
    """Return by how much components change their contribution under an ablation of others, [P]."""
    whole = effects["compensation"].isel(ablated=ablated).transpose("prompt", "component").values
    changes = np.zeros(len(whole), whole.dtype)
    for component in ablation.components:
        if component.head == WHOLE:
            changes = changes + whole[:, component.index]
        elif "head_compensation" in effects and component.site == ATTN:
            heads = effects["head_compensation"].isel(ablated=ablated, attn_layer=component.layer, head=component.head)
            changes = changes + heads.values
        else:
            return np.full(len(whole), np.nan, whole.dtype)
    return changes
