"""Figures of a dataset, for notebooks: functions of a sweep that return a Matplotlib figure in the project's style."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import xarray as xr

from hydra_jax.analysis import stats
from hydra_jax.analysis.results import Results
from hydra_jax.errors import UserError
from hydra_jax.report import figures
from hydra_jax.report.figures.style import styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEEDS = {
    "effects_by_layer": "whole layers' attention or MLPs ablated one by one",
    "compensation_by_layer": f"components ablated one by one in {stats.FIT} prompts or more",
    "regression": f"whole layers' attention or MLPs ablated one by one in {stats.FIT} prompts or more",
    "erasure": f"{stats.FIT} prompts or more",
    "heads": "heads ablated one by one; sweep with sites='heads'",
    "sets": "several components ablated together",
    "interactions": "two ablations that were also made together",
    "cascade": "cascades",
    "frozen_against_free": "something frozen",
    "head_responders": "heads recorded as responders",
    "positions": "texts that were read at several positions",
}
"""The figures that not every sweep has, and what it takes."""


def _plot(name: str, dataset: xr.Dataset, bootstrap: int, seed: int) -> Figure:
    """Draw the figure `name` of a sweep.

    Args:
      name: of `figures.figures_of`.
      dataset: a sweep; only its finished prompts are used.
      bootstrap: resamples behind each interval.
      seed: of the resamples.

    Raises:
      UserError: if the sweep does not have what the figure shows, or no prompt is finished.
    """
    drawn: dict[str, Callable[[], Figure]] = figures.figures_of(
        Results(stats.finished(dataset), samples=bootstrap, seed=seed)
    )
    if name not in drawn:
        raise UserError(f"{name}: this sweep has nothing to draw there; it takes {NEEDS[name]}")
    return styled(drawn[name])()


def effects_by_layer(dataset: xr.Dataset, bootstrap: int = 1000, seed: int = 0) -> Figure:
    """Contribution, direct and total effect by layer: median and quartiles over prompts."""
    return _plot("effects_by_layer", dataset, bootstrap, seed)


def direct_against_total(dataset: xr.Dataset, bootstrap: int = 1000, seed: int = 0) -> Figure:
    """Every prompt and ablation, direct against total effect."""
    return _plot("direct_against_total", dataset, bootstrap, seed)


def compensation(dataset: xr.Dataset, bootstrap: int = 1000, seed: int = 0) -> Figure:
    """The mean change of every component's contribution under each ablation, as a matrix."""
    return _plot("compensation", dataset, bootstrap, seed)


def compensation_by_layer(dataset: xr.Dataset, bootstrap: int = 1000, seed: int = 0) -> Figure:
    """Compensation against direct effect with the regression, a panel per layer."""
    return _plot("compensation_by_layer", dataset, bootstrap, seed)


def regression(dataset: xr.Dataset, bootstrap: int = 1000, seed: int = 0) -> Figure:
    """Slope and R^2 of compensation on direct effect by layer."""
    return _plot("regression", dataset, bootstrap, seed)


def erasure(dataset: xr.Dataset, bootstrap: int = 1000, seed: int = 0) -> Figure:
    """Each MLP's contribution, clean and with the strongest attention layers ablated."""
    return _plot("erasure", dataset, bootstrap, seed)


def heads(dataset: xr.Dataset, bootstrap: int = 1000, seed: int = 0) -> Figure:
    """The strongest heads, and every head's direct effect and repair."""
    return _plot("heads", dataset, bootstrap, seed)


def sets(dataset: xr.Dataset, bootstrap: int = 1000, seed: int = 0) -> Figure:
    """Direct and total effect, and the restored share, of components ablated by themselves and together."""
    return _plot("sets", dataset, bootstrap, seed)


def interactions(dataset: xr.Dataset, bootstrap: int = 1000, seed: int = 0) -> Figure:
    """The mean interaction of every two ablations, and who wakes up when only the other is gone."""
    return _plot("interactions", dataset, bootstrap, seed)


def cascade(dataset: xr.Dataset, bootstrap: int = 1000, seed: int = 0) -> Figure:
    """The logit and the answer's survival cut after cut, and who repaired."""
    return _plot("cascade", dataset, bootstrap, seed)


def frozen_against_free(dataset: xr.Dataset, bootstrap: int = 1000, seed: int = 0) -> Figure:
    """The total effect of each ablation with repairers frozen, and with everything free."""
    return _plot("frozen_against_free", dataset, bootstrap, seed)


def head_responders(dataset: xr.Dataset, bootstrap: int = 1000, seed: int = 0) -> Figure:
    """The heads that respond to the strongest ablations, as maps of layer by head."""
    return _plot("head_responders", dataset, bootstrap, seed)


def positions(dataset: xr.Dataset, bootstrap: int = 1000, seed: int = 0) -> Figure:
    """Effects of the strongest ablations along the text."""
    return _plot("positions", dataset, bootstrap, seed)
