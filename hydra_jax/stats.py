"""What a sweep says over its prompts, with bootstrap intervals that resample prompts and replacements."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import xarray as xr

from hydra_jax import store

LEVEL = 0.95
"""Share of the bootstrap distribution inside an interval."""

Means = dict[str, jax.Array]
"""Variables as [P, A] means over replacements (A: ablated components)."""


def _mean(of: Callable[[Means], jax.Array]) -> Callable[[Means], jax.Array]:
    return lambda means: of(means).mean(axis=0)


def _compensation(means: Means) -> jax.Array:
    return means["attn_compensation"] + means["mlp_compensation"] + means["norm_compensation"]


def _restored_share(means: Means) -> jax.Array:
    return _compensation(means).mean(axis=0) / means["direct_effect"].mean(axis=0)


def _fit(means: Means) -> tuple[jax.Array, jax.Array]:
    x, y = (v - v.mean(axis=0, keepdims=True) for v in (means["direct_effect"], _compensation(means)))
    xy, xx, yy = (x * y).sum(axis=0), (x * x).sum(axis=0), (y * y).sum(axis=0)
    return xy / xx, jnp.square(xy) / (xx * yy)


STATISTICS: dict[str, Callable[[Means], jax.Array]] = {
    "delta_unembed": _mean(lambda means: means["delta_unembed"]),
    "direct_effect": _mean(lambda means: means["direct_effect"]),
    "total_effect": _mean(lambda means: means["total_effect"]),
    "compensation": _mean(_compensation),
    "attn_compensation": _mean(lambda means: means["attn_compensation"]),
    "mlp_compensation": _mean(lambda means: means["mlp_compensation"]),
    "norm_compensation": _mean(lambda means: means["norm_compensation"]),
    "restored_share": _restored_share,
    "share_direct_above_total": _mean(
        lambda means: (means["direct_effect"] > means["total_effect"]).astype(jnp.float32)
    ),
    "slope": lambda means: _fit(means)[0],
    "r2": lambda means: _fit(means)[1],
}
"""Per ablated component, [P, A] means -> [A]:

mean effects in logits; `compensation`, all of it (attention, MLP and norm); `restored_share`, mean
compensation over mean direct effect (a ratio of means); `share_direct_above_total`, the share of prompts that are
repaired on balance; `slope` and `r2` of compensation regressed on direct effect over prompts.
"""


def summary(effects: xr.Dataset, samples: int = 1000, seed: int = 0, level: float = LEVEL) -> pd.DataFrame:
    """`STATISTICS` of each ablated component, with nested bootstrap intervals.

    Args:
      effects: a finished sweep.
      samples: bootstrap resamples.
      seed: of the resamples.
      level: of the intervals.

    Returns:
      One row an ablated component: `layer`, `site`, `head` (-1: all of the write), `prompts`, and of each
      statistic its value, `_low` and `_high` (percentiles of the bootstrap). `restored_share` is NaN
      where the interval of the mean direct effect has 0 in it: there is nothing to restore.
    """
    arrays = {name: jnp.asarray(effects[name].transpose("prompt", "replacement", ...).values) for name in store.EFFECTS}
    arrays["delta_unembed"] = jnp.asarray(effects["ablated_delta_unembed"].values)[:, None]
    values = _statistics({name: array.mean(axis=1) for name, array in arrays.items()})
    resampled = _bootstrap(arrays, jax.random.split(jax.random.key(seed), samples))
    tail = (1 - level) / 2
    table: dict[str, np.ndarray] = {
        "layer": effects["ablated_layer"].values,
        "site": effects["ablated_site"].values.astype(object),
        "head": effects["ablated_head"].values,
        "prompts": np.full(effects.sizes["ablated"], effects.sizes["prompt"]),
    }
    for name, value in values.items():
        low, high = np.quantile(np.asarray(resampled[name]), [tail, 1 - tail], axis=0)
        table |= {name: np.asarray(value), f"{name}_low": low, f"{name}_high": high}
    frame = pd.DataFrame(table)
    nothing_to_restore = (frame["direct_effect_low"] <= 0) & (frame["direct_effect_high"] >= 0)
    for column in ("restored_share", "restored_share_low", "restored_share_high"):
        frame[column] = frame[column].mask(nothing_to_restore)
    return frame


def _statistics(means: Means) -> Means:
    return {name: statistic(means) for name, statistic in STATISTICS.items()}


@jax.jit
def _bootstrap(arrays: Means, keys: jax.Array) -> Means:
    """STATISTICS [samples, A] of resamples of [P, R, A] arrays: prompts, and each one's replacements."""
    prompts, draws, _ = arrays["direct_effect"].shape

    def sample(key: jax.Array) -> Means:
        of_prompts, of_draws = jax.random.split(key)
        chosen = jax.random.randint(of_prompts, (prompts,), 0, prompts)
        drawn = jax.random.randint(of_draws, (prompts, draws), 0, draws)
        weights = jax.vmap(functools.partial(jnp.bincount, length=draws))(drawn).astype(jnp.float32) / draws
        return _statistics(
            {
                name: (
                    array[chosen, 0]
                    if array.shape[1] == 1
                    else jnp.einsum("pra,pr->pa", array[chosen], weights, precision="highest")
                )
                for name, array in arrays.items()
            }
        )

    return jax.lax.map(sample, keys, batch_size=8)
