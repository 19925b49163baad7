"""The statistics of a sweep, each defined; the module `bootstrap` resamples them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import xarray as xr

from hydra_jax.analysis.bootstrap import LEVEL, Bootstrap, Estimate, interval, nested
from hydra_jax.core.edits import ATTN, MLP, SITES, Component
from hydra_jax.errors import UserError
from hydra_jax.store import effects as store
from hydra_jax.store import variables

Sums = dict[str, jax.Array]
"""Arrays by name, each [..., A] for A ablated components."""

PARTS = ("", "attn_", "mlp_", "norm_")
"""Parts of compensation: all of it, and what downstream attention, downstream MLPs and the final norm do."""

_PAIRS = {part: ("direct_effect", f"{part}compensation") for part in PARTS}
_PAIRS["total_"] = ("delta_unembed", "total_effect")
"""The variables of each regression, of y on x: (x, y), by the prefix of the statistics' names."""

_RESAMPLED = (*variables.EFFECTS, "compensation")
_ENTERING = (*_RESAMPLED, "delta_unembed")


def _rows(means: jax.Array, given: Mapping[str, Any]) -> tuple[Sums, jax.Array]:
    """Each prompt's terms in the sums that every statistic is made of, and whether it is repaired on balance.

    Args:
      means: [P, V * A], means over replacements of the variables of `_RESAMPLED`, less their centres.
      given: `centre` by variable [1, A], and `delta_unembed` [P, A], less its centre: it has no replacements.
    """
    centre = given["centre"]
    variables = dict(zip(_RESAMPLED, jnp.split(means, len(_RESAMPLED), axis=1), strict=True))
    direct, total = (variables[name] + centre[name] for name in ("direct_effect", "total_effect"))
    variables["delta_unembed"] = given["delta_unembed"]
    products = {
        f"{a}*{b}": variables[a] * variables[b] for x, y in _PAIRS.values() for a, b in ((x, y), (x, x), (y, y))
    }
    return variables | products, (direct > total).astype(jnp.float32)


def _statistics(sums: tuple[Sums, jax.Array], given: Mapping[str, Any]) -> Sums:
    """`STATISTICS` [N, A] from means over prompts of `_rows`, [N, A]."""
    means, above = sums
    centred = {name: means[name] + given["centre"][name] for name in _ENTERING}
    fits: Sums = {}
    for part, (x, y) in _PAIRS.items():
        xy, xx, yy = (means[f"{a}*{b}"] - means[a] * means[b] for a, b in ((x, y), (x, x), (y, y)))
        slope = xy / xx
        fits |= {f"{part}slope": slope, f"{part}r2": xy * xy / (xx * yy)}
        fits[f"{part}intercept"] = centred[y] - slope * centred[x]
    share = {"restored_share": centred["compensation"] / centred["direct_effect"], "share_direct_above_total": above}
    every = centred | share | fits
    return {name: every[name] for name in STATISTICS}


STATISTICS = (
    *("delta_unembed", "direct_effect", "total_effect", *(f"{part}compensation" for part in PARTS)),
    *("restored_share", "share_direct_above_total", "intercept"),
    *(f"{part}slope" for part in PARTS),
    *(f"{part}r2" for part in PARTS),
    "total_r2",
)
"""Names of the statistics of each ablated component; all are of means over replacements.

The first are mean effects in logits: `compensation` is all of it, the others its parts. `restored_share` is mean
compensation over mean direct effect (a ratio of means); `share_direct_above_total`, the share of prompts
that are repaired on balance; `slope`, `intercept` and `r2` are of compensation regressed on direct effect over
prompts, with slope and R^2 of each part; `total_r2` is of the total effect and delta_unembed.
"""

MEDIANS = ("responders", "participation_ratio")
"""Names of the statistics of `coupling`, which are medians over prompts: how many downstream components move by more
than a tenth of the direct effect, and how many share the movement."""

RESPONSE = 0.1
"""Share of the direct effect by which a component moves that counts as responding."""


def coupling(effects: xr.Dataset) -> dict[str, np.ndarray]:
    """Return `responders` and `participation_ratio` = (sum |x|)^2 / sum x^2 of each ablation, [P, A].

    x are the compensations by component. Few and large ones mean that layers are loosely coupled.
    """
    moved = np.abs(effects["compensation"].transpose("prompt", "ablated", "component").values)
    direct = np.abs(effects["direct_effect"].mean("replacement").transpose("prompt", "ablated").values)
    squares = np.square(moved).sum(axis=2)
    return {
        "responders": (moved > RESPONSE * direct[..., None]).sum(axis=2).astype(np.float32),
        "participation_ratio": np.square(moved.sum(axis=2)) / np.where(squares > 0, squares, 1),
    }


@dataclasses.dataclass(frozen=True)
class Resampled:
    """A sweep's statistics, and the same of nested resamples.

    Every sample draws the same prompts for all components, so that sums and differences of them have intervals.

    Attributes:
      values: by name, [A].
      samples: by name, [S, A].
      draws: the prompts that each sample drew, for what has no replacements to draw.
    """

    values: dict[str, np.ndarray]
    samples: dict[str, np.ndarray]
    draws: Bootstrap

    def mean(self, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean over prompts of [P, ...], [...], and the means of its resamples, [S, ...]."""
        return array.mean(axis=0), self.draws.mean(array)

    def estimate(self, function: Callable[[dict[str, np.ndarray]], np.ndarray]) -> Estimate:
        """Return the value and interval of a function of the statistics by name: from [..., A] each to [...]."""
        return Estimate.resampled(function(self.values), function(self.samples))


def bootstrap(effects: xr.Dataset, samples: int = 1000, seed: int = 0) -> Resampled:
    """Compute `STATISTICS` and `MEDIANS` of each ablated component, and of resamples of prompts and replacements.

    Args:
      effects: a sweep; only its finished prompts are used.
      samples: S, how many resamples.
      seed: of the resamples.

    Raises:
      UserError: if no prompt is finished.
    """
    effects = finished(effects)
    arrays = {name: effects[name].transpose("prompt", "replacement", ...).values for name in variables.EFFECTS}
    parts = [arrays[f"{part}compensation"] for part in PARTS[1:]]
    arrays["compensation"] = parts[0] + parts[1] + parts[2]
    arrays["delta_unembed"] = effects["ablated_delta_unembed"].values[:, None]
    # Less their means, so that variances lose no digits to a difference of large numbers.
    centre = {name: array.mean(axis=(0, 1), dtype=np.float64).astype(np.float32) for name, array in arrays.items()}
    drawn = np.concatenate([arrays[name] - centre[name] for name in _RESAMPLED], axis=2)
    given = {
        "centre": {name: array[None] for name, array in centre.items()},
        "delta_unembed": arrays["delta_unembed"][:, 0] - centre["delta_unembed"],
    }
    values, resamples, draws = nested(drawn, given, _rows, _statistics, samples, seed)
    for name, array in coupling(effects).items():
        values[name] = np.median(array, axis=0)
        resamples[name] = draws.median(array)
    return Resampled(values, resamples, draws)


def finished(effects: xr.Dataset) -> xr.Dataset:
    """Return the prompts whose effects are computed and all finite.

    Raises:
      UserError: if there are none.
    """
    effects = effects.isel(prompt=np.flatnonzero(effects["finished"].values))
    if not effects.sizes["prompt"]:
        raise UserError("sweep: none of its prompts is finished; continue it first")
    return store.finite(effects, "sweep")


def summary(effects: xr.Dataset, samples: int = 1000, seed: int = 0, level: float = LEVEL) -> pd.DataFrame:
    """Tabulate `STATISTICS` and `MEDIANS` of each ablated component with nested bootstrap intervals: see `tabulate`."""
    return tabulate(effects, bootstrap(effects, samples, seed), level)


def tabulate(effects: xr.Dataset, resampled: Resampled, level: float = LEVEL) -> pd.DataFrame:
    """Return a sweep's statistics as a table.

    Returns:
      One row per ablated component: `layer`, `site`, `head` (-1: all of the write), `prompts`, and for each
      statistic its value, `_low` and `_high` (percentiles of the bootstrap). `restored_share` is NaN
      where the interval of the mean direct effect contains 0: there is nothing to restore.
    """
    table: dict[str, np.ndarray] = {
        "layer": effects["ablated_layer"].values,
        "site": effects["ablated_site"].values.astype(object),
        "head": effects["ablated_head"].values,
        "prompts": np.full(effects.sizes["ablated"], resampled.draws.prompts.shape[1]),
    }
    for name, value in resampled.values.items():
        low, high = interval(resampled.samples[name], level)
        table |= {name: value, f"{name}_low": low, f"{name}_high": high}
    frame = pd.DataFrame(table)
    nothing_to_restore = (frame["direct_effect_low"] <= 0) & (frame["direct_effect_high"] >= 0)
    for column in ("restored_share", "restored_share_low", "restored_share_high"):
        frame[column] = frame[column].mask(nothing_to_restore)
    return frame


def strongest_attention(resampled: Resampled, effects: xr.Dataset, count: int) -> list[int]:
    """Return the indices along `ablated` of the attention layers (or heads) of largest mean direct effect."""
    direct = np.where(effects["ablated_site"].values == SITES[ATTN], resampled.values["direct_effect"], -np.inf)
    chosen = np.argsort(-direct)[:count]
    return sorted(int(index) for index in chosen if np.isfinite(direct[index]))


def erasure(effects: xr.Dataset, resampled: Resampled, ablations: int = 3) -> pd.DataFrame:
    """Tabulate what each MLP contributes, clean and with the strongest attention layers ablated: means over prompts.

    Args:
      effects: a sweep.
      resampled: its bootstrap.
      ablations: how many of the strongest attention layers.

    Returns:
      One row per MLP and run: `layer`; `ablated`, the component ("" for the clean run); `delta_unembed` with `_low`
      and `_high`; and the same for `change`, ablated less clean. Only MLPs downstream of an ablation have a row for
      it. Erasure is a negative contribution that becomes less negative once what it erases is ablated.
    """
    effects = finished(effects)
    mlps = np.flatnonzero(effects["site"].values == SITES[MLP])
    layers = effects["layer"].values[mlps]
    clean = effects["delta_unembed"].values[:, mlps]
    runs = [("", -1, np.zeros_like(clean))]
    for index in strongest_attention(resampled, effects, ablations):
        named = Component.named(*(effects[f"ablated_{name}"].values[index] for name in ("layer", "site", "head")))
        runs.append((str(named), named.layer, effects["compensation"].values[:, index][:, mlps]))
    tables = []
    for name, from_layer, change in runs:
        seen = layers >= from_layer
        columns: dict[str, np.ndarray] = {"layer": layers[seen], "ablated": np.full(seen.sum(), name, object)}
        for column, contributions in (("delta_unembed", clean + change), ("change", change)):
            value, samples = resampled.mean(contributions[:, seen])
            low, high = interval(samples)
            columns |= {column: value, f"{column}_low": low, f"{column}_high": high}
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)
