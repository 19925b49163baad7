"""Self-repair by arm of training: statistics of sweeps of matched models, with intervals.

Models are matched: the same prompts and targets in all of them, the same replacements, and in every arm the
same seeds. So a bootstrap sample draws seeds, prompts and, for each prompt, replacements once for all models,
and differences between arms have intervals of their own. A bootstrap of few seeds is too narrow, so an arm is
said to differ only where the seeds' own differences say so too (a paired t-test).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from hydra_jax.analysis import stats
from hydra_jax.analysis.bootstrap import LEVEL, Bootstrap, Estimate, interval
from hydra_jax.analysis.findings import LATE
from hydra_jax.core.edits import MLP, SITES
from hydra_jax.store import variables
from hydra_jax.training.config import REFERENCE

MATTERS = 0.1
"""The share of a site's largest mean direct effect in a model from which an ablated layer counts."""

MEASURES = {
    "layers": "layers that matter",
    "direct_effect": "direct effect (logits)",
    "restored_share": "restored share",
    "attn_share": "restored by attention",
    "mlp_share": "restored by MLPs",
    "norm_share": "restored by the final norm",
    "slope": "slope on the direct effect",
    "r2": "R² of it",
    "erasure": "late MLPs' contribution (logits)",
    "erasure_change": "its change per direct effect",
    "responding": "components that respond",
}
"""The measures, with their titles: of the ablated layers that matter (see MATTERS), attention and MLPs apart.

These layers are chosen once in each model; `layers` is their number. `direct_effect` is their sum; shares are ratios
of sums over layers of means over prompts; `slope` and `r2` are of the regression of compensation on direct effect
within layers, pooled; `erasure` is what the last third of the MLPs adds to the answer's logit, below zero where they
push it down, and `erasure_change` how that changes under ablation; `responding` is the share of downstream components
that move by more than a tenth of the direct effect. The last three are of means over replacements, so their resamples
draw prompts alone. Measures are averaged over seeds.
"""

OF_DIRECT = ("restored_share", "attn_share", "mlp_share", "norm_share", "erasure_change")
"""Measures divided by the direct effect: they have no value where that is not clearly above 0."""

Measured = Mapping[tuple[str, str], np.ndarray]
"""Measures by ablated site and name, [1 + S]: the value over all prompts, then those of the resamples."""


@dataclasses.dataclass(frozen=True)
class Key:
    """The model that a sweep is of."""

    arm: str
    seed: int
    step: int


def measures(effects: xr.Dataset, draws: Bootstrap) -> Measured:
    """Compute MEASURES of one model.

    Args:
      effects: a sweep of layers, its prompts in the draws' order.
      draws: from `Bootstrap.draw_all`, the same for all models.
    """
    sites = [site for site in SITES if (effects["ablated_site"].values == site).any()]
    return {(site, name): values for site in sites for name, values in _of_site(effects, site, draws).items()}


def _of_site(effects: xr.Dataset, site: str, draws: Bootstrap) -> dict[str, np.ndarray]:
    effects = effects.isel(ablated=np.flatnonzero(effects["ablated_site"].values == site))
    direct = effects["direct_effect"].values.mean(axis=(0, 2))
    least = MATTERS * direct.max() if direct.max() > 0 else -np.inf
    effects = effects.isel(ablated=np.flatnonzero(direct >= least))
    arrays = {name: effects[name].values for name in variables.EFFECTS}
    arrays["compensation"] = np.sum([arrays[f"{part}compensation"] for part in stats.PARTS[1:]], axis=0)
    # [P, S, A]: means over the replacements that a sample drew.
    means = {name: draws.mean_over_replacements(array) for name, array in arrays.items()}
    x, y = means["direct_effect"], means["compensation"]
    mean_x, mean_y = draws.mean_of_drawn(x), draws.mean_of_drawn(y)
    xy, xx, yy = (
        (draws.mean_of_drawn(a * b) - mean_a * mean_b).sum(axis=-1)
        for a, b, mean_a, mean_b in ((x, y, mean_x, mean_y), (x, x, mean_x, mean_x), (y, y, mean_y, mean_y))
    )
    total = mean_x.sum(axis=-1)
    values = {"layers": np.full_like(total, effects.sizes["ablated"]), "direct_effect": total}
    values |= {"restored_share": _ratio(mean_y.sum(axis=-1), total), "slope": _ratio(xy, xx)}
    values["r2"] = _ratio(xy * xy, xx * yy)
    for part in stats.PARTS[1:]:
        values[f"{part}share"] = _ratio(draws.mean_of_drawn(means[f"{part}compensation"]).sum(axis=-1), total)
    layers = effects["layer"].values
    first_late = layers.max() + 1 - max(1, round((layers.max() + 1) * LATE))
    late = np.flatnonzero((effects["site"].values == SITES[MLP]) & (layers >= first_late))
    moved = effects["compensation"].values
    values["erasure"] = draws.mean(effects["delta_unembed"].values[:, late].sum(axis=1))
    direct = effects["direct_effect"].values.mean(axis=2)
    values["erasure_change"] = _ratio(draws.mean(moved[:, :, late].sum(axis=(1, 2))), draws.mean(direct.sum(axis=1)))
    downstream = (moved != 0).any(axis=0)
    responds = np.abs(moved) > stats.RESPONSE * np.abs(direct)[..., None]
    share = (responds & downstream).sum(axis=2) / np.maximum(downstream.sum(axis=1), 1)
    values["responding"] = draws.mean(share.mean(axis=1))
    return {name: values[name] for name in MEASURES}


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return the quotient; NaN where there is none."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)


def by_arm(measured: Mapping[Key, Measured], draws: Bootstrap, seed: int) -> dict[tuple[str, int], Measured]:
    """Average each arm's measures at each step, [1 + S], over the seeds that a resample draws for all arms alike.

    Args:
      measured: the measures of every model.
      draws: those that `measures` had.
      seed: of the draws of training seeds.
    """
    arms = sorted({(key.arm, key.step) for key in measured})
    seeds = sorted({key.seed for key in measured})
    names = next(iter(measured.values())).keys()
    draws = draws.with_seeds(len(seeds), np.random.default_rng([seed, 1]))
    result: dict[tuple[str, int], Measured] = {}
    for arm, step in arms:
        present = [index for index, number in enumerate(seeds) if Key(arm, number, step) in measured]
        models = [measured[Key(arm, seeds[index], step)] for index in present]
        weights = draws.seed_weights(present)
        # A seed without a value counts only in the samples that have drawn it.
        result[arm, step] = {
            name: np.sum(
                [
                    np.where(weight > 0, weight * model[name], 0)
                    for weight, model in zip(weights.T, models, strict=True)
                ],
                axis=0,
            )
            for name in names
        }
    return result


def compared(arms: Mapping[tuple[str, int], Measured], measured: Mapping[Key, Measured]) -> pd.DataFrame:
    """Tabulate the arms' measures, and their differences from the reference arm's.

    Args:
      arms: the measures of each arm and step, from `by_arm`.
      measured: those of every model.

    Returns:
      One row per arm, step, ablated site and measure: `arm`, `step`, `ablated`, `measure`, `value`, `low`, `high`;
      `difference` from the reference arm at that step with `difference_low`, `difference_high` and a `verdict`; and
      `seeds`, each seed's value. Whatever is divided by a direct effect that is not clearly above 0 is NaN.
    """
    rows = []
    for (arm, step), values in arms.items():
        reference = arms.get((REFERENCE, step))
        for (site, name), samples in values.items():
            row: dict[str, Any] = {"arm": arm, "step": step, "ablated": site, "measure": name}
            row |= _estimate(
                "value", samples, nothing=name in OF_DIRECT and _not_above_0(values[site, "direct_effect"])
            )
            if reference is not None and arm != REFERENCE:
                nothing = np.isnan(row["value"]) or (
                    name in OF_DIRECT and _not_above_0(reference[site, "direct_effect"])
                )
                row |= _estimate("difference", samples - reference[site, name], nothing)
                pairs = [
                    measured[key][site, name][0] - measured[matched][site, name][0]
                    for key in measured
                    if (key.arm, key.step) == (arm, step)
                    and (matched := dataclasses.replace(key, arm=REFERENCE)) in measured
                ]
                row["verdict"] = verdict(row["difference_low"], row["difference_high"], pairs)
            by_seed = {
                key.seed: model[site, name][0] for key, model in measured.items() if (key.arm, key.step) == (arm, step)
            }
            row["seeds"] = "; ".join(f"{seed}: {value:.4g}" for seed, value in sorted(by_seed.items()))
            rows.append(row)
    return pd.DataFrame(rows)


def _estimate(name: str, samples: np.ndarray, nothing: bool) -> dict[str, float]:
    """Return a value and the interval of its resamples, as columns; all NaN where there is `nothing` to tell."""
    estimate = Estimate.resampled(samples[0], samples[1:])
    ends = ("low", "high") if name == "value" else (f"{name}_low", f"{name}_high")
    values = dict(zip((name, *ends), dataclasses.astuple(estimate), strict=True))
    return dict.fromkeys(values, float("nan")) if nothing else values


def _not_above_0(direct: np.ndarray) -> bool:
    low, _ = interval(direct[1:])
    return not low > 0


def verdict(low: float, high: float, pairs: Sequence[float]) -> str:
    """Judge whether arms differ: whether the bootstrap's interval and Student's t over matched seeds both exclude 0.

    Args:
      low: the lower end of the bootstrap's interval of the difference.
      high: its upper end.
      pairs: the differences of matched seeds; from fewer than two nothing can be told.
    """
    if len(pairs) < 2 or not np.isfinite([low, high, *pairs]).all():
        return "cannot be told"
    import scipy.stats  # takes a second to import, and not every report compares

    spread = np.std(pairs, ddof=1) / np.sqrt(len(pairs))
    reach = scipy.stats.t.ppf((1 + LEVEL) / 2, len(pairs) - 1) * spread
    if low > 0 and np.mean(pairs) - reach > 0:
        return "higher"
    return "lower" if high < 0 and np.mean(pairs) + reach < 0 else "no clear difference"
