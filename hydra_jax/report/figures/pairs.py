"""The figure of two ablations at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hydra_jax.analysis import interactions as analysis
from hydra_jax.analysis.results import Results
from hydra_jax.report.figures.style import blank, image, reach, ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ANNOTATED = 10
"""The most components whose cells have their numbers written in."""


def interactions(results: Results) -> Figure:
    """Mean interaction of every two components and, beside it, who wakes up when only the other is gone."""
    names, interaction, woken = analysis.mean_matrices(results.effects)
    matrices = {
        "interaction: both together less each alone": interaction,
        "woken: change of contribution": woken,
    }
    size = min(max(2.8 + 0.36 * len(names), 4.2), 9)
    figure = blank((2 * size + 1.5, size + 0.6))
    axes = figure.subplots(1, 2)
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=True):
        limit = reach(matrix, 1)
        drawn = image(axis, matrix, limit)
        ticks(axis, names, names)
        axis.set_title(title, fontsize=10)
        axis.set_facecolor("0.93")
        if len(names) <= ANNOTATED:
            for (row, column), value in np.ndenumerate(matrix):
                if np.isfinite(value):
                    colour = "white" if abs(value) > 0.6 * limit else "black"
                    axis.text(column, row, f"{value:+.2f}", ha="center", va="center", fontsize=7, color=colour)
        figure.colorbar(drawn, ax=axis, label="logits", shrink=0.8)
    axes[0].set(xlabel="and this one", ylabel="this one ablated")
    axes[1].set(xlabel="this one responds", ylabel="this one alone ablated")
    figure.suptitle(
        "Two ablations at once: red, they cost more together than apart (left); red, it repairs (right)\n"
        f"{results.caption}, means"
    )
    return figure
