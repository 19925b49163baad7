"""The figure of cascades: cut after cut, until the answer is gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hydra_jax.analysis import cascades
from hydra_jax.analysis.results import Results
from hydra_jax.report.figures.style import COLOURS, blank, image, reach, ticks, zero_line

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REPAIRERS = 20
"""The components shown, those that repair or erode most at any step."""


def cascade(results: Results) -> Figure:
    """The logit and the answer's survival over cuts, and who repaired at each step."""
    table = results.cascade
    assert table is not None
    repairs = cascades.repairs(results.effects)[: int((table["prompts"][1:] > 0).sum())]
    names = np.array(results.component_names)
    strength = np.abs(np.nan_to_num(repairs)).max(axis=0)
    shown = np.sort(np.argsort(-strength, kind="stable")[:REPAIRERS])
    shown = shown[strength[shown] > 0] if (strength > 0).any() else shown
    figure = blank((14, max(1.8 + 0.2 * len(shown), 4.2)))
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    low, high = table["logit_lower_quartile"], table["logit_upper_quartile"]
    left.fill_between(table["cuts"], low, high, color="0.9", linewidth=0, label="quartiles over prompts")
    _line(left, table, "logit", COLOURS["total_effect"], "mean, 95% interval")
    left.plot(table["cuts"], table["logit_median"], color=COLOURS["all"], linestyle="--", label="median")
    zero_line(left)
    left.set(xlabel="cuts", ylabel=results.unit, title="left of the logit")
    _line(middle, table, "probability", COLOURS["direct_effect"], "probability of the target")
    _line(middle, table, "survives", COLOURS["norm"], "share of prompts whose answer survives")
    survived = cascades.survival(results.effects, results.draws, results.samples, results.seed)["mean"]
    middle.set(xlabel="cuts", ylim=(-0.02, 1.02), title=f"cuts survived: {survived.text()}")
    for axis in (left, middle):
        axis.legend(fontsize=8)
        axis.set_xticks(table["cuts"][:: max(1, len(table) // 10)])
    drawn = image(right, repairs[:, shown].T, reach(repairs[:, shown], 1))
    ticks(right, list(names[shown]), [str(step + 1) for step in range(len(repairs))])
    right.tick_params(axis="x", rotation=0)
    right.set(xlabel="cut", title="who moved then")
    figure.colorbar(drawn, ax=right, label="change of contribution (logits); red repairs")
    figure.suptitle(
        "Cascades: the strongest attention is cut, then whoever repairs most, and so on\n"
        f"{results.caption}; a prompt in which nothing repairs any more stays as it is"
    )
    return figure


def _line(axis: Axes, table: pd.DataFrame, name: str, colour: str, label: str) -> None:
    """Draw a statistic over cuts with its interval."""
    axis.fill_between(table["cuts"], table[f"{name}_low"], table[f"{name}_high"], color=colour, alpha=0.25, linewidth=0)
    axis.plot(table["cuts"], table[name], color=colour, marker="o", markersize=3, label=label)
