"""Effects by position, for sweeps that read a text at several of its tokens."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from hydra_jax.analysis import stats
from hydra_jax.analysis.bootstrap import interval, ratio
from hydra_jax.analysis.names import ablated_names

BINS = 10
"""Parts of their length that texts are divided into where there are several."""

EFFECTS = ("direct_effect", "total_effect")


def has_positions(effects: xr.Dataset) -> bool:
    """Return whether some text was read at several positions."""
    if "position" not in effects.coords or "text_id" not in effects.coords:
        return False
    return len(set(_texts(effects))) < effects.sizes["prompt"]


def is_single_text(effects: xr.Dataset) -> bool:
    """Return whether all positions are of one text."""
    return len(set(_texts(effects))) == 1


def relative(effects: xr.Dataset) -> np.ndarray:
    """Return each position as a share, 0 to 1, of the last one that was read in its text: [P]."""
    _, texts = np.unique(_texts(effects), return_inverse=True)
    position = effects["position"].values
    last = np.zeros(texts.max() + 1, position.dtype)
    np.maximum.at(last, texts, position)
    return np.clip(position / np.maximum(last[texts], 1), 0, 1)


def _texts(effects: xr.Dataset) -> list[str]:
    return [str(text) for text in effects["text_id"].values]


def by_position(effects: xr.Dataset, resampled: stats.Resampled) -> pd.DataFrame:
    """Tabulate effects along the text: by token where there is one text, else by tenths of the texts' length.

    Args:
      effects: a sweep of several positions a text; only its finished ones are used.
      resampled: its bootstrap; resamples draw texts.

    Returns:
      One row per ablation and position: `name`; `position`, the token's index, or a tenth's middle as a share of the
      length; `token`, its text, "" for tenths; `count` of positions read there; `direct_effect` and `total_effect`,
      means, with `_low` and `_high`, NaN where a single position was read: it has no interval.
    """
    effects = stats.finished(effects)
    single = is_single_text(effects)
    if single:
        places, groups = np.unique(effects["position"].values, return_inverse=True)
    else:
        groups = np.minimum((relative(effects) * BINS).astype(int), BINS - 1)
        present, groups = np.unique(groups, return_inverse=True)
        places = (present + 0.5) / BINS
    member = (groups[:, None] == np.arange(len(places))).astype(float)
    counts = member.sum(axis=0)
    tokens = np.full(len(places), "", dtype=object)
    if single and "token_text" in effects.coords:
        tokens[groups] = effects["token_text"].values
    drawn = resampled.draws.mean(member)
    means = {name: effects[name].mean("replacement").transpose("prompt", "ablated").values for name in EFFECTS}
    tables = []
    for index, ablated in enumerate(ablated_names(effects)):
        table = {"name": ablated, "position": places, "token": tokens, "count": counts.astype(int)}
        for name, mean in means.items():
            values = member * mean[:, [index]]
            low, high = interval(ratio(resampled.draws.mean(values), drawn))
            known = counts > 1
            table |= {name: values.sum(axis=0) / counts}
            table |= {f"{name}_low": np.where(known, low, np.nan), f"{name}_high": np.where(known, high, np.nan)}
        tables.append(pd.DataFrame(table))
    return pd.concat(tables, ignore_index=True)
