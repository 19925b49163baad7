"""The paper's two motifs in their smallest form, as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hydra_jax.core import causal
from hydra_jax.report.figures.style import COLOURS, blank, zero_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOTIFS = {
    "erasure: f(x, u) = −x": causal.ERASURE,
    "self-repair: f(x, u) = u where x ≠ u, else 0": causal.SELF_REPAIR,
}


def causal_motifs() -> Figure:
    """Direct, total and compensatory effect in each motif, against what x is ablated to (u = 1)."""
    figure = blank((10, 4.4))
    axes = figure.subplots(2, 2, height_ratios=(1, 3.2), sharex="row")
    values = np.linspace(-1, 2, 120, dtype=np.float32)  # 1 is not among them: there self-repair has nothing to do
    for column, (title, model) in enumerate(MOTIFS.items()):
        _graph(axes[0, column], title)
        exogenous = {"u": np.ones_like(values)}
        arguments = model, exogenous, "x", values, "y"
        lines = {
            "direct effect": (causal.direct_effect(*arguments), COLOURS["direct_effect"], "-"),
            "total effect": (causal.total_effect(*arguments), COLOURS["total_effect"], "-"),
            "compensation by f": (causal.compensation(*arguments)["f"], COLOURS["norm"], "--"),
        }
        for label, (effect, colour, dashes) in lines.items():
            axes[1, column].plot(values, effect, color=colour, linestyle=dashes, label=label)
        axes[1, column].plot(1, 0, color="0.3", marker="o", markersize=4)
        zero_line(axes[1, column])
        axes[1, column].set(xlabel="what x is set to (clean: 1)", ylim=(-1.6, 2.4))
    axes[1, 0].set_ylabel("effect on y")
    axes[1, 0].legend(fontsize=8)
    figure.suptitle("Two ways in which a later layer f undoes an ablation of x, where y = x + f(x, u)")
    return figure


def _graph(axis: Axes, title: str) -> None:
    """The causal graph u -> x -> y, with f between."""
    axis.set(xlim=(-0.3, 3.3), ylim=(-0.6, 1.4), title=title)
    axis.axis("off")
    positions = {"u": (0, 0.4), "x": (1, 0), "f": (2, 0.9), "y": (3, 0)}
    for name, (x, y) in positions.items():
        axis.text(x, y, name, ha="center", va="center", bbox={"boxstyle": "circle", "fc": "white", "ec": "0.4"})
    for start, end in (("u", "x"), ("u", "f"), ("x", "f"), ("x", "y"), ("f", "y")):
        arrow = {"arrowstyle": "->", "color": "0.4", "shrinkA": 10, "shrinkB": 10}
        axis.annotate("", positions[end], positions[start], arrowprops=arrow)
