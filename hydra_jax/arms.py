"""Do arms of training repair alike? Statistics of sweeps of matched models, by arm, with intervals.

Models are matched: the same prompts and targets in all of them, the same replacements, and in every arm the
same seeds. So a bootstrap sample draws seeds, prompts and, for each prompt, replacements once for all models,
and differences between arms have intervals of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from hydra_jax import stats, store
from hydra_jax.edits import ATTN, MLP, SITES
from hydra_jax.findings import LATE

REFERENCE = "no_dropout"
"""The arm that others are compared with, where it is among them."""

MATTERS = 0.1
"""Share of a model's largest mean direct effect from which on an ablated attention layer counts."""

MEASURES = {
    "restored_share": "restored share of the direct effect",
    "attn_share": "restored by attention",
    "mlp_share": "restored by MLPs",
    "norm_share": "restored by the final norm",
    "slope": "slope of compensation on direct effect",
    "r2": "R² of compensation on direct effect",
    "erasure": "late MLPs' contribution to the answer (logits)",
    "erasure_change": "its change under ablation, per direct effect",
    "responding": "share of downstream components that respond",
}
"""What is compared, over the ablated attention layers that matter (see MATTERS):

shares are ratios of sums over layers of means over prompts; `slope` and `r2` are of the regression within
layers, pooled; `erasure` is what the last third of the MLPs adds to the answer's logit, below zero where they
push it down; `responding` counts components that move by more than a tenth of the direct effect.
"""


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


def measures(effects: xr.Dataset, draws: Draws) -> dict[str, np.ndarray]:
    """MEASURES of one model, [1 + S] each: of all prompts, then of every resample.

    Args:
      effects: a sweep of attention layers, its prompts in the draws' order.
      draws: from `draw`.
    """
    attention = np.flatnonzero(effects["ablated_site"].values == SITES[ATTN])
    effects = effects.isel(ablated=attention)
    direct = effects["direct_effect"].values.mean(axis=(0, 2))
    effects = effects.isel(ablated=np.flatnonzero(direct >= MATTERS * direct.max()))
    arrays = {name: effects[name].values for name in store.EFFECTS}
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
    found = {"restored_share": mean_y.sum(axis=-1) / total, "slope": xy / xx, "r2": xy * xy / (xx * yy)}
    for part in stats.PARTS[1:]:
        found[f"{part}share"] = over_prompts(means[f"{part}compensation"]).sum(axis=-1) / total
    layers = effects["layer"].values
    first_late = layers.max() + 1 - max(1, round((layers.max() + 1) * LATE))
    late = np.flatnonzero((effects["site"].values == SITES[MLP]) & (layers >= first_late))
    moved = effects["compensation"].values
    found["erasure"] = draws.prompts @ effects["delta_unembed"].values[:, late].sum(axis=1)
    found["erasure_change"] = draws.prompts @ moved[:, :, late].sum(axis=(1, 2)) / total
    downstream = (moved != 0).any(axis=0)
    responds = np.abs(moved) > stats.RESPONSE * np.abs(effects["direct_effect"].values.mean(axis=2))[..., None]
    share = (responds & downstream).sum(axis=2) / np.maximum(downstream.sum(axis=1), 1)
    found["responding"] = draws.prompts @ share.mean(axis=1)
    return {name: found[name] for name in MEASURES}


def by_arm(found: Mapping[Key, Mapping[str, np.ndarray]], seed: int) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    """Measures of each arm and step, [1 + S]: means over seeds, which a resample draws for all arms alike."""
    arms = sorted({(key.arm, key.step) for key in found})
    seeds = sorted({key.seed for key in found})
    samples = len(next(iter(next(iter(found.values())).values())))
    times = np.random.default_rng(seed).multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=samples)
    times[0] = 1
    result = {}
    for arm, step in arms:
        here = [number for number, each in enumerate(seeds) if Key(arm, each, step) in found]
        weights = times[:, here].astype(np.float64)
        # A sample with none of the seeds that this arm has takes all of them.
        weights = np.where(weights.sum(axis=1, keepdims=True) > 0, weights, 1)
        weights /= weights.sum(axis=1, keepdims=True)
        result[arm, step] = {
            name: np.sum([weights[:, i] * found[Key(arm, seeds[n], step)][name] for i, n in enumerate(here)], axis=0)
            for name in MEASURES
        }
    return result


def compared(
    arms: Mapping[tuple[str, int], Mapping[str, np.ndarray]], found: Mapping[Key, Mapping[str, np.ndarray]]
) -> pd.DataFrame:
    """One row an arm, step and measure.

    Returns:
      `arm`, `step`, `measure`, `value`, `low`, `high`; `difference` from the reference arm at that step with
      `difference_low`, `difference_high` and a `verdict`; and `seeds`, each seed's value.
    """
    rows = []
    for (arm, step), values in arms.items():
        reference = arms.get((REFERENCE, step))
        for name, samples in values.items():
            low, high = stats.interval(samples[1:])
            row = {"arm": arm, "step": step, "measure": name, "value": samples[0], "low": low, "high": high}
            if reference is not None and arm != REFERENCE:
                difference = samples - reference[name]
                low, high = stats.interval(difference[1:])
                row |= {"difference": difference[0], "difference_low": low, "difference_high": high}
                row["verdict"] = verdict(float(low), float(high))
            of_seeds = {key.seed: each[name][0] for key, each in found.items() if (key.arm, key.step) == (arm, step)}
            row["seeds"] = "; ".join(f"{seed}: {value:.4g}" for seed, value in sorted(of_seeds.items()))
            rows.append(row)
    return pd.DataFrame(rows)


def verdict(low: float, high: float) -> str:
    """What an interval of a difference says."""
    return "higher" if low > 0 else "lower" if high < 0 else "no clear difference"


def answer(table: pd.DataFrame, arms: Sequence[str]) -> str:
    """In a sentence or two, whether self-repair needs dropout, of `compared` at one step."""
    chosen = table[table["measure"] == "restored_share"].set_index("arm")
    sentences = []
    if REFERENCE in chosen.index:
        row = chosen.loc[REFERENCE]
        how = "is" if row["low"] > 0 else "is not" if row["high"] < 0 else "is not clearly"
        sentences.append(
            f"Without dropout, what the ablation of attention takes away {how} repaired:"
            f" {row['value']:.0%} ({row['low']:.0%} to {row['high']:.0%}) of it is restored."
        )
    for arm in arms:
        if arm == REFERENCE or arm not in chosen.index:
            continue
        row = chosen.loc[arm]
        text = f"With {arm}: {row['value']:.0%} ({row['low']:.0%} to {row['high']:.0%})"
        if REFERENCE in chosen.index:
            what = {"higher": "more", "lower": "less"}.get(str(row["verdict"]), "no clear difference")
            text += (
                f", {what} ({row['difference']:+.0%}, {row['difference_low']:+.0%} to {row['difference_high']:+.0%})"
            )
        sentences.append(text + ".")
    return " ".join(sentences)
