"""Do arms of training repair alike? Statistics of sweeps of matched models, by arm, with intervals.

Models are matched: the same prompts and targets in all of them, the same replacements, and in every arm the
same seeds. So a bootstrap sample draws seeds, prompts and, for each prompt, replacements once for all models,
and differences between arms have intervals of their own. A bootstrap of few seeds is too narrow, so an arm is
only said to differ where the seeds' own differences agree, too (a paired t-test).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import xarray as xr

from hydra_jax.analysis import stats
from hydra_jax.analysis.findings import LATE
from hydra_jax.core.edits import MLP, SITES
from hydra_jax.store import variables
from hydra_jax.training.config import REFERENCE

MATTERS = 0.1
"""Share of a site's largest mean direct effect in a model from which on an ablated layer counts."""

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
"""What is compared, of ablated attention and of ablated MLPs, over the layers of each that matter (see MATTERS).

These are chosen once in each model, `layers` says how many. `direct_effect` is their sum; shares are ratios of sums
over layers of means over prompts; `slope` and `r2` are of the regression of compensation on direct effect within
layers, pooled; `erasure` is what the last third of the MLPs adds to the answer's logit, below zero where they push it
down, and `erasure_change` how that changes under ablation; `responding` is the share of downstream components that
move by more than a tenth of the direct effect. The last three are of means over replacements, so that resamples of
them draw prompts alone. Over seeds, measures are averaged.
"""

OF_DIRECT = ("restored_share", "attn_share", "mlp_share", "norm_share", "erasure_change")
"""Those divided by the direct effect: without a value where that is not clearly above 0."""

Measured = Mapping[tuple[str, str], np.ndarray]
"""By ablated site and measure, [1 + S]: of all prompts, then of every resample."""


@dataclasses.dataclass(frozen=True)
class Key:
    """Which model a sweep is of."""

    arm: str
    seed: int
    step: int


@dataclasses.dataclass(frozen=True)
class Draws:
    """What a bootstrap draws once for all models.

    Attributes:
      replacements: [P, S, R], how often each replacement of a prompt is drawn, as shares.
      prompts: [S, P], the same of prompts.
    """

    replacements: np.ndarray
    prompts: np.ndarray


def draw(prompts: int, replacements: int, samples: int, seed: int) -> Draws:
    """Draws of `samples` resamples; the first of them is no resample but all prompts and replacements, once each."""
    random = np.random.default_rng(seed)
    of_replacements = random.multinomial(
        replacements, np.full(replacements, 1 / replacements), size=(prompts, samples + 1)
    )
    of_prompts = random.multinomial(prompts, np.full(prompts, 1 / prompts), size=samples + 1)
    of_replacements[:, 0], of_prompts[0] = 1, 1
    return Draws((of_replacements / replacements).astype(np.float32), (of_prompts / prompts).astype(np.float32))


def measures(effects: xr.Dataset, draws: Draws) -> Measured:
    """MEASURES of one model.

    Args:
      effects: a sweep of layers, its prompts in the draws' order.
      draws: from `draw`.
    """
    sites = [site for site in SITES if (effects["ablated_site"].values == site).any()]
    return {(site, name): values for site in sites for name, values in _of_site(effects, site, draws).items()}


def _of_site(effects: xr.Dataset, site: str, draws: Draws) -> dict[str, np.ndarray]:
    effects = effects.isel(ablated=np.flatnonzero(effects["ablated_site"].values == site))
    direct = effects["direct_effect"].values.mean(axis=(0, 2))
    least = MATTERS * direct.max() if direct.max() > 0 else -np.inf
    effects = effects.isel(ablated=np.flatnonzero(direct >= least))
    arrays = {name: effects[name].values for name in variables.EFFECTS}
    arrays["compensation"] = np.sum([arrays[f"{part}compensation"] for part in stats.PARTS[1:]], axis=0)
    # [P, S, A]: means over the replacements that a sample drew.
    means = {
        name: np.einsum("psr,par->psa", draws.replacements, array, optimize=True) for name, array in arrays.items()
    }

    def over_prompts(values: np.ndarray) -> np.ndarray:
        return np.einsum("sp,ps...->s...", draws.prompts, values, optimize=True)

    x, y = means["direct_effect"], means["compensation"]
    mean_x, mean_y = over_prompts(x), over_prompts(y)
    xy, xx, yy = (
        (over_prompts(a * b) - mean_a * mean_b).sum(axis=-1)
        for a, b, mean_a, mean_b in ((x, y, mean_x, mean_y), (x, x, mean_x, mean_x), (y, y, mean_y, mean_y))
    )
    total = mean_x.sum(axis=-1)
    found = {"layers": np.full_like(total, effects.sizes["ablated"]), "direct_effect": total}
    found |= {"restored_share": _ratio(mean_y.sum(axis=-1), total), "slope": _ratio(xy, xx)}
    found["r2"] = _ratio(xy * xy, xx * yy)
    for part in stats.PARTS[1:]:
        found[f"{part}share"] = _ratio(over_prompts(means[f"{part}compensation"]).sum(axis=-1), total)
    layers = effects["layer"].values
    first_late = layers.max() + 1 - max(1, round((layers.max() + 1) * LATE))
    late = np.flatnonzero((effects["site"].values == SITES[MLP]) & (layers >= first_late))
    moved = effects["compensation"].values
    found["erasure"] = draws.prompts @ effects["delta_unembed"].values[:, late].sum(axis=1)
    of_prompts = effects["direct_effect"].values.mean(axis=2)
    found["erasure_change"] = _ratio(
        draws.prompts @ moved[:, :, late].sum(axis=(1, 2)), draws.prompts @ of_prompts.sum(axis=1)
    )
    downstream = (moved != 0).any(axis=0)
    responds = np.abs(moved) > stats.RESPONSE * np.abs(of_prompts)[..., None]
    share = (responds & downstream).sum(axis=2) / np.maximum(downstream.sum(axis=1), 1)
    found["responding"] = draws.prompts @ share.mean(axis=1)
    return {name: found[name] for name in MEASURES}


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Their quotient; NaN where there is none."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)


def by_arm(found: Mapping[Key, Measured], seed: int) -> dict[tuple[str, int], Measured]:
    """Measures of each arm and step, [1 + S]: means over seeds, which a resample draws for all arms alike."""
    arms = sorted({(key.arm, key.step) for key in found})
    seeds = sorted({key.seed for key in found})
    first = next(iter(found.values()))
    samples = len(next(iter(first.values())))
    times = np.random.default_rng([seed, 1]).multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=samples)
    times[0] = 1
    result: dict[tuple[str, int], Measured] = {}
    for arm, step in arms:
        here = [number for number, each in enumerate(seeds) if Key(arm, each, step) in found]
        weights = times[:, here].astype(np.float64)
        # A sample with none of the seeds that this arm has takes all of them.
        weights = np.where(weights.sum(axis=1, keepdims=True) > 0, weights, 1)
        weights /= weights.sum(axis=1, keepdims=True)
        # A seed without a value counts only in the samples that have drawn it.
        result[arm, step] = {
            name: np.sum(
                [
                    np.where(weights[:, i] > 0, weights[:, i] * found[Key(arm, seeds[n], step)][name], 0)
                    for i, n in enumerate(here)
                ],
                axis=0,
            )
            for name in first
        }
    return result


def compared(arms: Mapping[tuple[str, int], Measured], found: Mapping[Key, Measured]) -> pd.DataFrame:
    """One row an arm, step, ablated site and measure.

    Returns:
      `arm`, `step`, `ablated`, `measure`, `value`, `low`, `high`; `difference` from the reference arm at that step
      with `difference_low`, `difference_high` and a `verdict`; and `seeds`, each seed's value. What is divided by a
      direct effect that is not clearly above 0 is NaN.
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
                    found[key][site, name][0] - found[matched][site, name][0]
                    for key in found
                    if (key.arm, key.step) == (arm, step)
                    and (matched := dataclasses.replace(key, arm=REFERENCE)) in found
                ]
                row["verdict"] = verdict(row["difference_low"], row["difference_high"], pairs)
            of_seeds = {
                key.seed: each[site, name][0] for key, each in found.items() if (key.arm, key.step) == (arm, step)
            }
            row["seeds"] = "; ".join(f"{seed}: {value:.4g}" for seed, value in sorted(of_seeds.items()))
            rows.append(row)
    return pd.DataFrame(rows)


def _estimate(name: str, samples: np.ndarray, nothing: bool) -> dict[str, float]:
    """A value and the interval of its resamples, as columns."""
    low, high = stats.interval(samples[1:])
    ends = ("low", "high") if name == "value" else (f"{name}_low", f"{name}_high")
    values = dict(zip((name, *ends), (float(samples[0]), float(low), float(high)), strict=True))
    return dict.fromkeys(values, float("nan")) if nothing else values


def _not_above_0(direct: np.ndarray) -> bool:
    low, _ = stats.interval(direct[1:])
    return not low > 0


def verdict(low: float, high: float, pairs: Sequence[float]) -> str:
    """Whether arms differ: where the bootstrap's interval and that of Student's t over matched seeds both leave out 0.

    Args:
      low: of the bootstrap's interval of the difference.
      high: of the same.
      pairs: the differences of matched seeds; of fewer than two nothing can be told.
    """
    if len(pairs) < 2 or not np.isfinite([low, high, *pairs]).all():
        return "cannot be told"
    spread = np.std(pairs, ddof=1) / np.sqrt(len(pairs))
    reach = scipy.stats.t.ppf((1 + stats.LEVEL) / 2, len(pairs) - 1) * spread
    if low > 0 and np.mean(pairs) - reach > 0:
        return "higher"
    return "lower" if high < 0 and np.mean(pairs) + reach < 0 else "no clear difference"
