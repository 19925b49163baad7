"""The statistics of a sweep, each defined; the module `bootstrap` resamples them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import xarray as xr

from hydra_jax.analysis.bootstrap import LEVEL, Bootstrap, Estimate, clusters, interval, nested, ratio
from hydra_jax.analysis.names import ablated_names
from hydra_jax.core.edits import ATTN, MLP, SITES
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

FREE_TOTAL, GAIN = "free_total_effect", "frozen_gain"
OPTIONAL = (*(name for name, *_ in variables.METRICS.values()), FREE_TOTAL)
"""Variables of which there are means, too, in sweeps that have them."""

FIT = 4
"""The fewest prompts from which there is something to regress: a line through three says next to nothing."""

REGRESSED = (*(f"{part}{name}" for part in (*PARTS, "total_") for name in ("slope", "r2")), "intercept")
"""Statistics of regressions."""


def _rows(means: jax.Array, given: Mapping[str, Any]) -> tuple[Sums, jax.Array]:
    """Each prompt's terms in the sums that every statistic is made of, and whether it is repaired on balance.

    Args:
      means: [P, V * A], means over replacements of the variables of `_drawn`, less their centres.
      given: `centre` by variable [1, A], and `delta_unembed` [P, A], less its centre: it has no replacements.
    """
    centre = given["centre"]
    names = _drawn(centre)
    variables = dict(zip(names, jnp.split(means, len(names), axis=1), strict=True))
    direct, total = (variables[name] + centre[name] for name in ("direct_effect", "total_effect"))
    variables["delta_unembed"] = given["delta_unembed"]
    products = {
        f"{a}*{b}": variables[a] * variables[b] for x, y in _PAIRS.values() for a, b in ((x, y), (x, x), (y, y))
    }
    return variables | products, (direct > total).astype(jnp.float32)


def _drawn(names: Collection[str]) -> tuple[str, ...]:
    """Return the variables with replacements in order, of all the `names`."""
    return (*_RESAMPLED, *(name for name in OPTIONAL if name in names))


def _statistics(sums: tuple[Sums, jax.Array], given: Mapping[str, Any]) -> Sums:
    """`STATISTICS` [N, A] from means over prompts of `_rows`, [N, A]; and means of `OPTIONAL`."""
    means, above = sums
    centre = given["centre"]
    centred = {name: means[name] + centre[name] for name in (*_ENTERING, *_drawn(centre))}
    fits: Sums = {}
    for part, (x, y) in _PAIRS.items():
        xy, xx, yy = (means[f"{a}*{b}"] - means[a] * means[b] for a, b in ((x, y), (x, x), (y, y)))
        # What does not vary but by rounding has neither a slope nor a fit.
        varies, moves = (
            square > 1e-6 * means[f"{a}*{a}"] + jnp.square(4 * jnp.finfo(jnp.float32).eps * centre[a])
            for a, square in ((x, xx), (y, yy))
        )
        slope = jnp.where(varies, xy / xx, jnp.nan)
        r2 = jnp.where(varies & moves, jnp.clip(xy * xy / (xx * yy), max=1), jnp.nan)
        fits |= {f"{part}slope": slope, f"{part}r2": r2}
        fits[f"{part}intercept"] = centred[y] - slope * centred[x]
    share = {"restored_share": centred["compensation"] / centred["direct_effect"], "share_direct_above_total": above}
    every = centred | share | fits
    if FREE_TOTAL in centre:
        every[GAIN] = every["total_effect"] - every[FREE_TOTAL]
    return {name: every[name] for name in (*STATISTICS, *OPTIONAL, GAIN) if name in every}


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
prompts, with slope and R^2 of each part, none of fewer than `FIT` prompts; `total_r2` is of the total effect and
delta_unembed. Sweeps with variables of `OPTIONAL` have their means besides, and those with something frozen
`frozen_gain`, by how much the total effect is larger than with nothing frozen.
"""

MEDIANS = ("responders", "participation_ratio", "total_effect_median", "direct_effect_median")
"""Names of the statistics that are medians over prompts.

Those of `coupling`: how many downstream components move by more than a tenth of the direct effect, and how many share
the movement; and the effects, each a mean over replacements. Their resamples draw prompts alone.
"""

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


def _medians(effects: xr.Dataset) -> dict[str, np.ndarray]:
    """Return the arrays [P, A] of which `MEDIANS` are medians."""
    means = {name: effects[name].mean("replacement").transpose("prompt", "ablated") for name in _MEDIAN_EFFECTS}
    return coupling(effects) | {f"{name}_median": mean.values for name, mean in means.items()}


_MEDIAN_EFFECTS = ("total_effect", "direct_effect")


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

    Where several prompts are positions of one text (`text_id`), whole texts are drawn: see `bootstrap.clusters`.

    Args:
      effects: a sweep; only its finished prompts are used.
      samples: S, how many resamples.
      seed: of the resamples.

    Raises:
      UserError: if no prompt is finished.
    """
    effects = finished(effects)
    if not effects.sizes["ablated"]:
        raise UserError(
            "dataset: has cascades and no ablations, of which statistics are; see its cuts, or hj.plot.cascade, or ask"
            " hj.sweep for ablations and cascades together"
        )
    names = [*variables.EFFECTS, *(name for name in OPTIONAL if name in effects)]
    arrays = {name: effects[name].transpose("prompt", "replacement", ...).values for name in names}
    parts = [arrays[f"{part}compensation"] for part in PARTS[1:]]
    arrays["compensation"] = parts[0] + parts[1] + parts[2]
    arrays["delta_unembed"] = effects["ablated_delta_unembed"].values[:, None]
    # Less their means, so that variances lose no digits to a difference of large numbers.
    centre = {name: array.mean(axis=(0, 1), dtype=np.float64).astype(np.float32) for name, array in arrays.items()}
    drawn = np.concatenate([arrays[name] - centre[name] for name in _drawn(arrays)], axis=2)
    given = {
        "centre": {name: array[None] for name, array in centre.items()},
        "delta_unembed": arrays["delta_unembed"][:, 0] - centre["delta_unembed"],
    }
    texts = clusters(effects["text_id"].values if "text_id" in effects.coords else None)
    values, resamples, draws = nested(drawn, given, _rows, _statistics, samples, seed, texts)
    values = dict(values)
    if effects.sizes["prompt"] < FIT:
        for name in set(REGRESSED) & values.keys():
            values[name], resamples[name] = np.full_like(values[name], np.nan), np.full_like(resamples[name], np.nan)
    for name, array in _medians(effects).items():
        values[name] = np.median(array, axis=0)
        resamples[name] = draws.median(array)
    return Resampled(values, resamples, draws)


def finished(effects: xr.Dataset) -> xr.Dataset:
    """Return the prompts whose effects are computed and all finite.

    Raises:
      UserError: if there are none, or it is no sweep.
    """
    if "finished" not in effects:
        raise UserError(
            "dataset: is no sweep; give what hj.sweep returned (of pairs hj.sweep(..., interactions=True), not"
            " hj.interactions)"
        )
    effects = effects.isel(prompt=np.flatnonzero(effects["finished"].values))
    if not effects.sizes["prompt"]:
        raise UserError("sweep: none of its prompts is finished; continue it first")
    return store.finite(effects, "sweep")


def protocol(effects: xr.Dataset) -> dict[str, Any]:
    """Return all that a sweep's results depend on; empty where it does not say."""
    return json.loads(effects.attrs.get("protocol", "{}"))


def summary(
    effects: xr.Dataset, samples: int = 1000, seed: int = 0, level: float = LEVEL, select: float | None = None
) -> pd.DataFrame:
    """Tabulate `STATISTICS` and `MEDIANS` of each ablated component with nested bootstrap intervals: see `tabulate`.

    Args:
      effects: a sweep; only its finished prompts are used.
      samples: S, how many resamples.
      seed: of the resamples.
      level: share of the resamples inside an interval.
      select: a share of the prompts; the table has further columns, `selected_...`, of those alone in which a
        component's direct effect is largest: see `selected`.

    Raises:
      UserError: if no prompt is finished, or `select` is no share.
    """
    resampled = bootstrap(effects, samples, seed)
    table = tabulate(effects, resampled, level)
    if select is None:
        return table
    of_those = selected(effects, resampled, select, level).drop(columns=["name", "layer", "site", "head"])
    return table.join(of_those.add_prefix("selected_"))


def tabulate(effects: xr.Dataset, resampled: Resampled, level: float = LEVEL) -> pd.DataFrame:
    """Return a sweep's statistics as a table.

    Returns:
      One row per ablated component or set of them: `name`, `layer`, `site` ("set": several together), `head` (-1: all
      of the write), `prompts`, and for each statistic its value, `_low` and `_high` (percentiles of the bootstrap).
      `restored_share` is NaN where the interval of the mean direct effect is not above 0: there is nothing to restore.
    """
    table: dict[str, np.ndarray] = labels(effects) | {
        "prompts": np.full(effects.sizes["ablated"], resampled.draws.prompts.shape[1]),
    }
    for name, value in resampled.values.items():
        low, high = interval(resampled.samples[name], level)
        table |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return without_shares_of_nothing(pd.DataFrame(table))


def labels(effects: xr.Dataset) -> dict[str, np.ndarray]:
    """Return the columns that say what was ablated: `name`, `layer`, `site`, `head`, [A] each."""
    return {
        "name": np.array(ablated_names(effects), dtype=object),
        "layer": effects["ablated_layer"].values,
        "site": effects["ablated_site"].values.astype(object),
        "head": effects["ablated_head"].values,
    }


def without_shares_of_nothing(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table without the restored shares of direct effects that are not clearly above 0."""
    something = table["direct_effect_low"] > 0
    columns = ["restored_share", "restored_share_low", "restored_share_high"]
    return table.assign(**{column: table[column].where(something) for column in columns})


def selected(effects: xr.Dataset, resampled: Resampled, share: float, level: float = LEVEL) -> pd.DataFrame:
    """Tabulate each ablation in the prompts alone in which its direct effect is largest.

    A component that matters in few prompts is judged by those (Rushing and Nanda 2024, who take the top 2 %).

    Args:
      effects: a sweep; only its finished prompts are used.
      resampled: its bootstrap. Resamples draw prompts and select among them anew; effects are means over replacements.
      share: the share of the prompts that are kept, at least one of them; other ones for each ablation.
      level: share of the resamples inside an interval.

    Returns:
      One row per ablation: `name`, `layer`, `site`, `head`, the number of prompts `kept`, and `direct_effect`,
      `total_effect` and `restored_share` (1 - total / direct, a ratio of means) with `_low` and `_high`. The share is
      NaN where the interval of the direct effect is not above 0.

    Raises:
      UserError: if no prompt is finished, or `share` is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise UserError(f"select: is {share}; give a share of the prompts, above 0 and at most 1")
    effects = finished(effects)
    arrays = [effects[name].mean("replacement").transpose("prompt", "ablated").values for name in _SELECTED]
    table: dict[str, np.ndarray] = labels(effects)
    all_once = Bootstrap(np.ones((1, effects.sizes["prompt"])))
    table["kept"] = np.full(effects.sizes["ablated"], int(all_once.kept(share)[0]))
    (direct, total), (drawn_direct, drawn_total) = (
        draws.mean_of_top(arrays, share) for draws in (all_once, resampled.draws)
    )
    for name, value, samples in (
        ("direct_effect", direct, drawn_direct),
        ("total_effect", total, drawn_total),
        ("restored_share", ratio(direct - total, direct), ratio(drawn_direct - drawn_total, drawn_direct)),
    ):
        low, high = interval(samples, level)
        table |= {name: value[0], f"{name}_low": low, f"{name}_high": high}
    return without_shares_of_nothing(pd.DataFrame(table))


_SELECTED = ("direct_effect", "total_effect")


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
    names = ablated_names(effects)
    for index in strongest_attention(resampled, effects, ablations):
        layer = int(effects["ablated_layer"].values[index])
        runs.append((names[index], layer, effects["compensation"].values[:, index][:, mlps]))
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
