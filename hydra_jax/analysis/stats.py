"""What a sweep says over its prompts, with bootstrap intervals that resample prompts and replacements."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import xarray as xr

from hydra_jax.core.edits import ATTN, MLP, SITES, Component
from hydra_jax.errors import UserError
from hydra_jax.store import effects as store
from hydra_jax.store import variables

LEVEL = 0.95
"""Share of the bootstrap distribution inside an interval."""

Sums = dict[str, jax.Array]
"""By name, [..., A]: A ablated components."""

PARTS = ("", "attn_", "mlp_", "norm_")
"""Of compensation: all of it, and what downstream attention, downstream MLPs and the final norm do."""

_PAIRS = {part: ("direct_effect", f"{part}compensation") for part in PARTS}
_PAIRS["total_"] = ("delta_unembed", "total_effect")
"""What is regressed: on what, and what is."""

_RESAMPLED = (*variables.EFFECTS, "compensation")
_ENTERING = (*_RESAMPLED, "delta_unembed")

GROUP, AGAIN = 10, 4
"""Bootstrap samples that share draws of replacements, and how often each prompt's are drawn for them."""


def _rows(means: Sums) -> Sums:
    """What each prompt adds to the sums that every statistic is made of."""
    products = {f"{a}*{b}": means[a] * means[b] for x, y in _PAIRS.values() for a, b in ((x, y), (x, x), (y, y))}
    return {name: means[name] for name in _ENTERING} | products


def _statistics(sums: Sums, centre: Sums, above: jax.Array) -> Sums:
    """Statistics from means over prompts of `_rows`, of variables less their `centre`."""
    mean = {name: sums[name] + centre[name] for name in _ENTERING}
    fits: Sums = {}
    for part, (x, y) in _PAIRS.items():
        xy, xx, yy = (sums[f"{a}*{b}"] - sums[a] * sums[b] for a, b in ((x, y), (x, x), (y, y)))
        slope = xy / xx
        fits |= {f"{part}slope": slope, f"{part}r2": xy * xy / (xx * yy)}
        fits[f"{part}intercept"] = mean[y] - slope * mean[x]
    share = {"restored_share": mean["compensation"] / mean["direct_effect"], "share_direct_above_total": above}
    every = mean | share | fits
    return {name: every[name] for name in STATISTICS}


STATISTICS = (
    *("delta_unembed", "direct_effect", "total_effect", *(f"{part}compensation" for part in PARTS)),
    *("restored_share", "share_direct_above_total", "intercept"),
    *(f"{part}slope" for part in PARTS),
    *(f"{part}r2" for part in PARTS),
    "total_r2",
)
"""Per ablated component, of means over replacements:

mean effects in logits, `compensation` being all of it and the others its parts; `restored_share`, mean
compensation over mean direct effect (a ratio of means); `share_direct_above_total`, the share of prompts
that are repaired on balance; `slope`, `intercept` and `r2` of compensation regressed on direct effect over
prompts, and slope and R^2 of each part; `total_r2`, of the total effect and delta_unembed.
"""

MEDIANS = ("responders", "participation_ratio")
"""Of `coupling`, as medians over prompts: how many downstream components move by more than a tenth of the
direct effect, and how many share the movement."""

RESPONSE = 0.1
"""Share of the direct effect by which a component moves that counts as responding."""


def coupling(effects: xr.Dataset) -> dict[str, np.ndarray]:
    """`responders` and `participation_ratio` = (sum |x|)^2 / sum x^2 of each ablation, [P, A].

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
class Bootstrap:
    """A sweep's statistics, and the same of nested resamples: prompts, then each one's replacements.

    Every sample draws the same prompts for all components, so that sums and differences of them have intervals.

    Attributes:
      values: by name, [A].
      samples: by name, [S, A].
      weights: [S, P], how often each sample drew each prompt, over P: of what has no replacements to draw.
    """

    values: dict[str, np.ndarray]
    samples: dict[str, np.ndarray]
    weights: np.ndarray

    def mean(self, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mean over prompts of [P, ...] and of its resamples, [...] and [S, ...]."""
        flat = array.reshape(len(array), -1)
        return array.mean(axis=0), (self.weights @ flat).reshape(len(self.weights), *array.shape[1:])


def interval(samples: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of [S, ...] resamples; NaN where a resample has no value."""
    tail = (1 - level) / 2
    low, high = np.quantile(samples, [tail, 1 - tail], axis=0)
    return low, high


def bootstrap(effects: xr.Dataset, samples: int = 1000, seed: int = 0) -> Bootstrap:
    """`STATISTICS` and `MEDIANS` of each ablated component, and of resamples of prompts and replacements.

    Args:
      effects: a sweep; of an unfinished one, the prompts that are finished.
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
    stacked = jnp.asarray(np.concatenate([arrays[name] - centre[name] for name in _RESAMPLED], axis=2))
    alone = jnp.asarray(arrays["delta_unembed"][:, 0] - centre["delta_unembed"])
    groups = jax.random.split(jax.random.key(seed), -(-samples // GROUP))
    values, found, counts = jax.device_get(_bootstrap(stacked, alone, jax.tree.map(jnp.asarray, centre), groups))
    found = {name: each.reshape(-1, each.shape[-1])[:samples] for name, each in found.items()}
    counts = counts.reshape(-1, counts.shape[-1])[:samples]
    for name, each in coupling(effects).items():
        values[name] = np.median(each, axis=0)
        found[name] = _medians(each, counts)
    return Bootstrap(values, found, counts / len(stacked))


def finished(effects: xr.Dataset) -> xr.Dataset:
    """The prompts whose effects are computed, and all finite.

    Raises:
      UserError: if there are none.
    """
    effects = effects.isel(prompt=np.flatnonzero(effects["finished"].values))
    if not effects.sizes["prompt"]:
        raise UserError("sweep: none of its prompts is finished; go on with it first")
    return store.finite(effects, "sweep")


def summary(effects: xr.Dataset, samples: int = 1000, seed: int = 0, level: float = LEVEL) -> pd.DataFrame:
    """`STATISTICS` and `MEDIANS` of each ablated component, with nested bootstrap intervals: see `tabulate`."""
    return tabulate(effects, bootstrap(effects, samples, seed), level)


def tabulate(effects: xr.Dataset, resampled: Bootstrap, level: float = LEVEL) -> pd.DataFrame:
    """A sweep's statistics as a table.

    Returns:
      One row an ablated component: `layer`, `site`, `head` (-1: all of the write), `prompts`, and of each
      statistic its value, `_low` and `_high` (percentiles of the bootstrap). `restored_share` is NaN
      where the interval of the mean direct effect has 0 in it: there is nothing to restore.
    """
    table: dict[str, np.ndarray] = {
        "layer": effects["ablated_layer"].values,
        "site": effects["ablated_site"].values.astype(object),
        "head": effects["ablated_head"].values,
        "prompts": np.full(effects.sizes["ablated"], resampled.weights.shape[1]),
    }
    for name, value in resampled.values.items():
        low, high = interval(resampled.samples[name], level)
        table |= {name: value, f"{name}_low": low, f"{name}_high": high}
    frame = pd.DataFrame(table)
    nothing_to_restore = (frame["direct_effect_low"] <= 0) & (frame["direct_effect_high"] >= 0)
    for column in ("restored_share", "restored_share_low", "restored_share_high"):
        frame[column] = frame[column].mask(nothing_to_restore)
    return frame


def strongest_attention(resampled: Bootstrap, effects: xr.Dataset, count: int) -> list[int]:
    """Places along `ablated` of the attention layers (or heads) of the largest mean direct effect, in order."""
    direct = np.where(effects["ablated_site"].values == SITES[ATTN], resampled.values["direct_effect"], -np.inf)
    chosen = np.argsort(-direct)[:count]
    return sorted(int(place) for place in chosen if np.isfinite(direct[place]))


def erasure(effects: xr.Dataset, resampled: Bootstrap, ablations: int = 3) -> pd.DataFrame:
    """What each MLP contributes, clean and with the strongest attention layers ablated, means over prompts.

    Args:
      effects: a sweep.
      resampled: its bootstrap.
      ablations: how many of the strongest attention layers.

    Returns:
      One row an MLP and run: `layer`; `ablated`, the component, "" for the clean run; `delta_unembed` with
      `_low` and `_high`; and the same of `change`, ablated less clean. Only MLPs that see the ablation have a
      row of it. Erasure: a negative contribution that is less so where what it erases was ablated.
    """
    effects = finished(effects)
    mlps = np.flatnonzero(effects["site"].values == SITES[MLP])
    layers = effects["layer"].values[mlps]
    clean = effects["delta_unembed"].values[:, mlps]
    runs = [("", -1, np.zeros_like(clean))]
    for place in strongest_attention(resampled, effects, ablations):
        named = Component.named(*(effects[f"ablated_{name}"].values[place] for name in ("layer", "site", "head")))
        runs.append((str(named), named.layer, effects["compensation"].values[:, place][:, mlps]))
    tables = []
    for name, from_layer, change in runs:
        seen = layers >= from_layer
        columns: dict[str, np.ndarray] = {"layer": layers[seen], "ablated": np.full(seen.sum(), name, object)}
        for column, of in (("delta_unembed", clean + change), ("change", change)):
            value, samples = resampled.mean(of[:, seen])
            low, high = interval(samples)
            columns |= {column: value, f"{column}_low": low, f"{column}_high": high}
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def _medians(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Medians [S, A] of columns [P, A], each prompt counted [S, P] times."""
    total = len(values)
    middles = [(total - 1) // 2, total // 2]
    medians = np.empty((len(counts), values.shape[1]), np.float32)
    for column, each in enumerate(values.T):
        order = np.argsort(each)
        reached = np.cumsum(counts[:, order], axis=1)
        places = [(reached > middle).argmax(axis=1) for middle in middles]
        medians[:, column] = each[order][np.stack(places)].mean(axis=0)
    return medians


@jax.jit
def _bootstrap(stacked: jax.Array, alone: jax.Array, centre: Sums, keys: jax.Array) -> tuple[Sums, Sums, jax.Array]:
    """Statistics [A], those of resamples [G, GROUP, A], and how often each drew which prompt [G, GROUP, P].

    Args:
      stacked: [P, R, V * A], the variables of `_RESAMPLED` less their centres.
      alone: [P, A], delta_unembed less its centre: it has no replacements.
      centre: of each variable, [A].
      keys: [G], of groups of GROUP samples. A group draws replacements `AGAIN` times for each prompt, and the
        n-th time that a sample has a prompt it takes the n-th of these draws: then a group's sums are products
        of matrices, and no sample has a prompt twice with the same replacements (but beyond AGAIN times).
    """
    prompts, draws, _ = stacked.shape

    def sums(joined: jax.Array, weights: jax.Array) -> tuple[Sums, jax.Array]:
        """Means of `_rows` under weights [S, P], and the share with direct above total."""
        means = dict(zip(_RESAMPLED, jnp.split(joined, len(_RESAMPLED), axis=1), strict=True))
        above = means["direct_effect"] + centre["direct_effect"][None] > (
            means["total_effect"] + centre["total_effect"][None]
        )
        rows = _rows(means | {"delta_unembed": alone})
        return {name: weights @ row for name, row in rows.items()}, weights @ above.astype(jnp.float32)

    def group(key: jax.Array) -> tuple[Sums, jax.Array]:
        of_prompts, of_draws = jax.random.split(key)
        chosen = jax.random.randint(of_prompts, (GROUP, prompts), 0, prompts)
        counts = jax.vmap(lambda row: jnp.bincount(row, length=prompts))(chosen)
        drawn = jax.random.randint(of_draws, (prompts, AGAIN, draws), 0, draws)
        share = (drawn[..., None] == jnp.arange(draws)[None, None, None]).sum(axis=2) / draws
        means = jnp.einsum("pjr,pra->jpa", share, stacked)
        times = (counts[None] + AGAIN - 1 - jnp.arange(AGAIN)[:, None, None]) // AGAIN
        parts = jax.lax.map(lambda each: sums(*each), (means, times.astype(jnp.float32) / prompts))
        total, above = jax.tree.map(lambda each: each.sum(axis=0), parts)
        spread = {name: array[None] for name, array in centre.items()}
        return _statistics(total, spread, above), counts

    whole, above = sums(stacked.mean(axis=1), jnp.full((1, prompts), 1 / prompts))
    values = _statistics({name: each[0] for name, each in whole.items()}, centre, above[0])
    return values, *jax.lax.map(group, keys)
