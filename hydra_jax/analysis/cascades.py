"""Cascades: the strongest attention is ablated, then whoever repairs most, and so on, until the answer is gone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from hydra_jax.analysis import stats
from hydra_jax.analysis.bootstrap import LEVEL, Bootstrap, Estimate, interval
from hydra_jax.analysis.names import component_names
from hydra_jax.errors import UserError

VARIABLES = ("cut_component", "cut_logit", "cut_probability", "cut_rank", "cut_compensation")


def has_cascades(effects: xr.Dataset) -> bool:
    """Return whether a sweep made cascades."""
    return all(name in effects for name in VARIABLES) and effects.sizes["cut"] > 0


def cascade(
    effects: xr.Dataset, draws: Bootstrap | None = None, samples: int = 1000, seed: int = 0, level: float = LEVEL
) -> pd.DataFrame:
    """Tabulate what is left of the answer after each number of cuts.

    A prompt in which nothing repairs any more is cut no further, and stays as its last cut left it.

    Args:
      effects: a sweep with cascades; only its finished prompts are used.
      draws: the prompts that resamples draw; None draws some by `samples` and `seed`.
      samples: how many resamples.
      seed: of the resamples.
      level: share of the resamples inside an interval.

    Returns:
      One row per number of `cuts`, from 0, the clean run. `prompts` is the number of those that had so many;
      `logit`, `logit_median`, `probability` and `survives` have `_low` and `_high`, and the logit `_lower_quartile`
      and `_upper_quartile` over prompts. `logit` and `probability` are means over replacements and prompts;
      `survives` is the share of prompts whose target is still the most likely token in more than half of the
      replacements, NaN for the clean run where the sweep does not say.

    Raises:
      UserError: if the sweep has no cascades, or no prompt is finished.
    """
    effects, draws = _ready(effects, draws, samples, seed)
    made = _made(effects)
    clean = {
        "logit": effects["clean_logit"].values,
        "probability": effects["clean_probability"].values,
        "survives": np.full(effects.sizes["prompt"], _clean_survival(effects)),
    }
    after = {
        "logit": _over_replacements(effects["cut_logit"]),
        "probability": _over_replacements(effects["cut_probability"]),
        "survives": _survives(effects).astype(float),
    }
    rows = []
    last = clean
    for cuts in range(effects.sizes["cut"] + 1):
        if cuts:
            here = made[:, cuts - 1]
            last = {name: np.where(here, after[name][:, cuts - 1], last[name]) for name in clean}
        row: dict[str, Any] = {"cuts": cuts, "prompts": int(made[:, cuts - 1].sum()) if cuts else len(made)}
        for name, values in last.items():
            row |= _ends(name, values.mean(), draws.mean(values[:, None])[:, 0], level)
        logit = last["logit"]
        row |= _ends("logit_median", np.median(logit), draws.median(logit[:, None])[:, 0], level)
        row["logit_lower_quartile"], row["logit_upper_quartile"] = np.quantile(logit, [0.25, 0.75])
        rows.append(row)
    return pd.DataFrame(rows)


def labelled(effects: xr.Dataset) -> xr.Dataset:
    """Return a finished sweep with cascades, and for people `cut_name` (prompt, cut) and `survived` (prompt).

    `cut_name` is the component of a cut, "" where there was none.
    """
    names = np.array([*component_names(effects), ""], dtype=object)[effects["cut_component"].values]
    said = {"long_name": "cuts in a row that the answer survives"}
    return effects.assign(cut_name=(("prompt", "cut"), names), survived=("prompt", survived(effects), said))


def survived(effects: xr.Dataset) -> np.ndarray:
    """Return how many cuts in a row, from the first, each prompt's answer survives: [P], of the finished prompts.

    It survives a cut while the target is the most likely token in more than half of the replacements.

    Raises:
      UserError: if the sweep has no cascades, or no prompt is finished.
    """
    effects, _ = _ready(effects, Bootstrap(np.ones((1, 1))), 0, 0)
    return np.cumprod(_survives(effects) & _made(effects), axis=1).sum(axis=1)


def survival(
    effects: xr.Dataset, draws: Bootstrap | None = None, samples: int = 1000, seed: int = 0, level: float = LEVEL
) -> dict[str, Estimate]:
    """Return the `mean` and the `median` over prompts of `survived`, with intervals; arguments as `cascade`.

    Raises:
      UserError: if the sweep has no cascades, or no prompt is finished.
    """
    effects, draws = _ready(effects, draws, samples, seed)
    counts = survived(effects)[:, None].astype(float)
    both = {"mean": (counts.mean(), draws.mean(counts)), "median": (np.median(counts), draws.median(counts))}
    return {
        name: Estimate(float(value), *(float(end[0]) for end in interval(drawn, level)))
        for name, (value, drawn) in both.items()
    }


def cascade_steps(effects: xr.Dataset) -> pd.DataFrame:
    """Tabulate who was cut at each step, and who repaired then.

    Args:
      effects: a sweep with cascades; only its finished prompts are used.

    Returns:
      One row per `step` (from 1) and `component` that was cut or moved in it: `times_cut`, the number of prompts in
      which it was; `share_cut` of those that had this step; and `repair`, the mean change of its contribution over
      those prompts, in logits: above zero it repairs.

    Raises:
      UserError: if the sweep has no cascades, or no prompt is finished.
    """
    effects, _ = _ready(effects, Bootstrap(np.ones((1, 1))), 0, 0)
    names = np.array(component_names(effects), dtype=object)
    cut = effects["cut_component"].transpose("prompt", "cut").values
    repair = repairs(effects)
    tables = []
    for step in range(cut.shape[1]):
        here = cut[:, step][cut[:, step] >= 0]
        if not len(here):
            break
        times = np.bincount(here, minlength=len(names))
        shown = (times > 0) | (np.nan_to_num(repair[step]) != 0)
        columns = {"component": names, "times_cut": times, "share_cut": times / len(here), "repair": repair[step]}
        tables.append(pd.DataFrame({"step": step + 1} | {name: column[shown] for name, column in columns.items()}))
    return pd.concat(tables, ignore_index=True)


def repairs(effects: xr.Dataset) -> np.ndarray:
    """Return the mean change of every component's contribution after each cut, [K, C], over the prompts that had it."""
    change = effects["cut_compensation"].transpose("prompt", "cut", "component").values.astype(float)
    return _mean(change, _made(effects)[..., None] & np.isfinite(change), axis=0)


def _ready(effects: xr.Dataset, draws: Bootstrap | None, samples: int, seed: int) -> tuple[xr.Dataset, Bootstrap]:
    if not has_cascades(effects):
        raise UserError("cascade: the sweep made none; sweep with --config.ablation.cascade=N for up to N cuts")
    effects = stats.finished(effects)
    if not _made(effects)[:, 0].any():
        raise UserError("cascade: no prompt was cut; sweep other components or prompts")
    if draws is None and not effects.sizes["ablated"]:  # nothing else has draws that these should share
        draws = Bootstrap.draw(effects.sizes["prompt"], samples, np.random.default_rng(seed))
    return effects, draws or stats.bootstrap(effects, samples, seed).draws


def _made(effects: xr.Dataset) -> np.ndarray:
    """Return whether each cut was made, and has values: [P, K]."""
    cut = effects["cut_component"].transpose("prompt", "cut").values >= 0
    return cut & np.isfinite(_values(effects["cut_logit"])).any(axis=2)


def _values(array: xr.DataArray) -> np.ndarray:
    return array.transpose("prompt", "cut", "replacement").values.astype(float)


def _over_replacements(array: xr.DataArray) -> np.ndarray:
    """Return means over the replacements that have a value, [P, K]; NaN where none has."""
    values = _values(array)
    return _mean(values, np.isfinite(values), axis=2)


def _survives(effects: xr.Dataset) -> np.ndarray:
    """Return whether the target is the most likely token in more than half of the replacements, [P, K]."""
    rank = _values(effects["cut_rank"])
    return 2 * (rank == 0).sum(axis=2) > np.isfinite(rank).sum(axis=2)


def _clean_survival(effects: xr.Dataset) -> float:
    """Return 1 where the target is known to be the clean run's most likely token, else NaN."""
    protocol = stats.protocol(effects)
    target = protocol.get("readout", {}).get("target") or protocol.get("prompts", {}).get("target", "top")
    return 1.0 if target == "top" or protocol.get("prompts", {}).get("correct_only") else np.nan


def _mean(values: np.ndarray, known: np.ndarray, axis: int) -> np.ndarray:
    """Return means of what is known; NaN where nothing is."""
    count = known.sum(axis=axis)
    return np.where(count > 0, np.where(known, values, 0).sum(axis=axis) / np.maximum(count, 1), np.nan)


def _ends(name: str, value: float, samples: np.ndarray, level: float) -> dict[str, float]:
    low, high = interval(samples, level)
    return {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
