"""Figures of ablations one below the other: components by themselves and together, repairers frozen and free."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hydra_jax.analysis.names import is_set
from hydra_jax.analysis.results import Results
from hydra_jax.report.figures.style import COLOURS, bars, blank

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ROWS = 40
"""Ablations with bars of their own: of more, those of the largest total effects, sets before others."""


def sets(results: Results) -> Figure:
    """Direct and total effect of each ablation, and the share that is restored, as bars with intervals."""
    rows = _chosen(results, is_set(results.effects))
    figure = blank((10.5, 1.6 + 0.3 * max(len(rows), 4)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    heights = np.arange(len(rows))
    for name, offset, label in (("direct_effect", 0.2, "direct effect"), ("total_effect", -0.2, "total effect")):
        bars(left, heights + offset, rows, name, COLOURS[name], label)
    bars(right, heights, rows, "restored_share", COLOURS["norm"], "restored share", 0.6)
    left.set_yticks(heights, rows["name"], fontsize=8)
    left.set_ylim(-0.6, len(rows) - 0.4)
    left.set(xlabel=results.unit)
    left.legend(fontsize=8, loc="best")
    right.set(xlabel="restored share (none where the\ndirect effect is not clearly above 0)")
    for axis in (left, right):
        axis.axvline(0, color="0.7", linewidth=0.8)
    figure.suptitle(f"Ablated by themselves and together\n{results.caption}, means and 95% intervals")
    return figure


def frozen_against_free(results: Results) -> Figure:
    """The total effect of each ablation with repairers frozen beside that with everything free, and as points."""
    table = results.summary
    rows = _chosen(results, np.zeros(len(table), bool))
    figure = blank((12, max(1.6 + 0.3 * len(rows), 5)))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    heights = np.arange(len(rows))
    bars(left, heights + 0.2, rows, "total_effect", COLOURS["total_effect"], "frozen")
    bars(left, heights - 0.2, rows, "free_total_effect", COLOURS["delta_unembed"], "free")
    left.set_yticks(heights, rows["name"], fontsize=8)
    left.set_ylim(-0.6, len(rows) - 0.4)
    left.set(xlabel="total effect (logits)")
    left.axvline(0, color="0.7", linewidth=0.8)
    left.legend(fontsize=8)
    free, frozen = (
        (table[name], np.abs(table[[f"{name}_low", f"{name}_high"]].to_numpy() - table[[name]].to_numpy()).T)
        for name in ("free_total_effect", "total_effect")
    )
    points = {"fmt": "o", "color": COLOURS["total_effect"], "ecolor": "0.6", "elinewidth": 0.7, "ms": 4}
    right.errorbar(free[0], frozen[0], frozen[1], free[1], **points)
    ends = table[["free_total_effect", "total_effect"]].to_numpy()
    right.plot([ends.min(), ends.max()], [ends.min(), ends.max()], color="0.4", linewidth=0.8, linestyle="--")
    corners = {"transform": right.transAxes, "color": "0.3", "fontsize": 8}
    right.text(0.03, 0.97, "worse with the freeze:\nwhat is frozen repairs", va="top", **corners)
    right.text(0.97, 0.03, "better with the freeze:\nwhat is frozen erodes", ha="right", **corners)
    right.set(xlabel="total effect, all free (logits)", ylabel="total effect, frozen (logits)")
    named = results.protocol.get("ablation", {}).get("freeze") or "repairers"
    named = named if isinstance(named, str) else ", ".join(map(str, named))
    figure.suptitle(f"With {named} frozen, and with everything free\n{results.caption}, means and 95% intervals")
    return figure


def _chosen(results: Results, first: np.ndarray) -> pd.DataFrame:
    """The rows of the summary that get bars, bottom up: all, or the largest total effects, `first` before others."""
    summary = results.summary
    order = np.lexsort((-np.abs(summary["total_effect"]), ~first))[:ROWS]
    return summary.iloc[np.sort(order)[::-1]]
