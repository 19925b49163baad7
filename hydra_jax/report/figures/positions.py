"""The figure of effects along a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hydra_jax.analysis.positions import is_single_text
from hydra_jax.analysis.results import Results
from hydra_jax.report.figures.style import blank, zero_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = ("#1f6fb4", "#c1354a", "#d9822b", "#3f8f5a")
"""Colours of the strongest ablations, which are drawn."""

LABELS = 60
"""The most tokens that are named."""


def positions(results: Results) -> Figure:
    """Direct and total effect of the strongest ablations by token of a single text, or by tenths of many."""
    table = results.positions
    assert table is not None
    direct = results.resampled.values["direct_effect"]
    strongest = [results.ablated_names[index] for index in np.argsort(-direct)[: len(LINES)]]
    single = is_single_text(results.effects)
    places = np.unique(table["position"])
    figure = blank((min(max(7.5, 0.22 * len(places)), 18) if single else 8.5, 6.4))
    axes = figure.subplots(2, 1, sharex=True)
    for axis, name in zip(axes, ("direct_effect", "total_effect"), strict=True):
        for ablated, colour in zip(strongest, LINES, strict=False):
            rows = table[table["name"] == ablated]
            x, low, high = rows["position"], rows[f"{name}_low"], rows[f"{name}_high"]
            axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            axis.plot(x, rows[name], color=colour, marker="o", markersize=3, linewidth=1.2, label=ablated)
        zero_line(axis)
        axis.set_ylabel(f"{name.replace('_', ' ')} (logits)")
    axes[0].legend(fontsize=8, ncols=len(LINES), title="ablated", title_fontsize=8)
    if single:
        rows = table[table["name"] == strongest[0]].iloc[:: -(-len(places) // LABELS)]
        texts = [
            repr(token)[1:-1] if token else str(place)
            for token, place in zip(rows["token"], rows["position"], strict=True)
        ]
        axes[1].set_xticks(rows["position"], texts, rotation=90, fontsize=7)
        axes[1].set_xlabel("last token read")
    else:
        axes[1].set(xlabel="position, as a share of the last one read in its text", xlim=(0, 1))
    over = "a point a token" if single else "means and 95% intervals over texts"
    figure.suptitle(f"Effects along the text, of the strongest ablations\n{results.caption}, {over}")
    return figure
