"""What a sweep says over its prompts, with bootstrap intervals that resample prompts and replacements."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import xarray as xr

from hydra_jax import store
from hydra_jax.errors import UserError

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


def _fit(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Least squares of y on x over prompts, [P, A] -> slope, intercept and R^2 [A]."""
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    x, y = x - mean_x[None], y - mean_y[None]
    xy, xx, yy = (x * y).sum(axis=0), (x * x).sum(axis=0), (y * y).sum(axis=0)
    slope = xy / xx
    return slope, mean_y - slope * mean_x, jnp.square(xy) / (xx * yy)


def _fit_of(part: Callable[[Means], jax.Array], which: int) -> Callable[[Means], jax.Array]:
    return lambda means: _fit(means["direct_effect"], part(means))[which]


def _named(name: str) -> Callable[[Means], jax.Array]:
    return lambda means: means[name]


_PARTS = {
    "": _compensation,
    "attn_": _named("attn_compensation"),
    "mlp_": _named("mlp_compensation"),
    "norm_": _named("norm_compensation"),
}

STATISTICS: dict[str, Callable[[Means], jax.Array]] = {
    "delta_unembed": _mean(_named("delta_unembed")),
    "direct_effect": _mean(_named("direct_effect")),
    "total_effect": _mean(_named("total_effect")),
    **{f"{part}compensation": _mean(of) for part, of in _PARTS.items()},
    "restored_share": _restored_share,
    "share_direct_above_total": _mean(
        lambda means: (means["direct_effect"] > means["total_effect"]).astype(jnp.float32)
    ),
    "intercept": _fit_of(_compensation, 1),
    **{f"{part}slope": _fit_of(of, 0) for part, of in _PARTS.items()},
    **{f"{part}r2": _fit_of(of, 2) for part, of in _PARTS.items()},
    "total_r2": lambda means: _fit(means["delta_unembed"], means["total_effect"])[2],
    "responders": lambda means: jnp.median(means["responders"], axis=0),
    "participation_ratio": lambda means: jnp.median(means["participation_ratio"], axis=0),
}
"""Per ablated component, [P, A] means over replacements -> [A]:

mean effects in logits, `compensation` being all of it and the others its parts; `restored_share`, mean
compensation over mean direct effect (a ratio of means); `share_direct_above_total`, the share of prompts
that are repaired on balance; `slope`, `intercept` and `r2` of compensation regressed on direct effect over
prompts, and slope and R^2 of each part; `total_r2`, of the total effect and delta_unembed; `responders`,
how many downstream components move by more than a tenth of the direct effect, and
`participation_ratio`, how many share the movement: medians over prompts.
"""

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


def summary(effects: xr.Dataset, samples: int = 1000, seed: int = 0, level: float = LEVEL) -> pd.DataFrame:
    """`STATISTICS` of each ablated component, with nested bootstrap intervals.

    Args:
      effects: a sweep; of an unfinished one, the prompts that are finished.
      samples: bootstrap resamples.
      seed: of the resamples.
      level: of the intervals.

    Raises:
      UserError: if no prompt is finished.

    Returns:
      One row an ablated component: `layer`, `site`, `head` (-1: all of the write), `prompts`, and of each
      statistic its value, `_low` and `_high` (percentiles of the bootstrap). `restored_share` is NaN
      where the interval of the mean direct effect has 0 in it: there is nothing to restore.
    """
    effects = effects.isel(prompt=np.flatnonzero(effects["finished"].values))
    if not effects.sizes["prompt"]:
        raise UserError("sweep: none of its prompts is finished; go on with it first")
    arrays = {name: jnp.asarray(effects[name].transpose("prompt", "replacement", ...).values) for name in store.EFFECTS}
    alone = coupling(effects) | {"delta_unembed": effects["ablated_delta_unembed"].values}
    arrays |= {name: jnp.asarray(values)[:, None] for name, values in alone.items()}
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
        counts = (drawn[:, :, None] == jnp.arange(draws)[None, None]).sum(axis=1)
        weights = (counts / draws).astype(jnp.float32)[:, :, None]

        def share(array: jax.Array) -> jax.Array:
            return weights if array.shape[1] == draws else jnp.ones((1, 1, 1))

        # Summed, not a product: that fuses with the choice, and nothing of the size of `arrays` is made.
        return _statistics({name: (array[chosen] * share(array)).sum(axis=1) for name, array in arrays.items()})

    return jax.lax.map(sample, keys)
