"""The look of every figure: colours that stay apart for the colour-blind, and the parts that figures share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from hydra_jax.core.edits import SET

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

SITE_NAMES = {"attn": "attention", "mlp": "MLP", SET: "several components"}
COLOURS = {
    "clean": "#3b4a5c",
    "ablated": "#c1354a",
    "delta_unembed": "#8a94a0",
    "total_effect": "#c1354a",
    "direct_effect": "#1f6fb4",
    "attn": "#1f6fb4",
    "mlp": "#d9822b",
    "norm": "#3f8f5a",
    "all": "#2b2f36",
}
KIND_COLOURS = {"resample": "#2b2f36", "mean": "#1f6fb4", "zero": "#c1354a", "noise": "#d9822b"}
DIVERGING = "RdBu_r"
MOST_POINTS = 20_000
"""Points in a scatter at most; of more, some are drawn at random."""

STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
    "savefig.dpi": 160,
    "text.parse_math": False,  # prompts are text, dollar signs and all
}


P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Return a function that draws a figure in this style, whatever the style around it."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        import matplotlib as mpl

        with mpl.rc_context(STYLE):
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()  # ticks and their texts are made only now
        return figure

    return drawn


def blank(size: tuple[float, float]) -> Figure:
    """Return an empty figure of a size in inches. Matplotlib is imported here, so only where something is drawn."""
    from matplotlib.figure import Figure

    return Figure(figsize=size)


def zero_line(axis: Axes) -> None:
    """Draw the line where nothing changes."""
    axis.axhline(0, color="0.7", linewidth=0.8)


def band(axis: Axes, rows: pd.DataFrame, name: str, colour: str, label: str | None = None) -> None:
    """Draw a statistic by layer with its interval."""
    if len(rows) == 1:  # a band of one layer has no width
        axis.vlines(rows["layer"], rows[f"{name}_low"], rows[f"{name}_high"], color=colour, alpha=0.5, linewidth=3)
    axis.fill_between(rows["layer"], rows[f"{name}_low"], rows[f"{name}_high"], color=colour, alpha=0.2, linewidth=0)
    axis.plot(rows["layer"], rows[name], color=colour, marker="o", markersize=2.5, linewidth=1.3, label=label)


def bars(
    axis: Axes, heights: np.ndarray, rows: pd.DataFrame, name: str, colour: str, label: str, width: float = 0.38
) -> None:
    """Draw a statistic as horizontal bars with its interval, a whisker where there is one."""
    ends = rows[[f"{name}_low", f"{name}_high"]].to_numpy(float)
    errors = np.nan_to_num(np.abs(ends - rows[[name]].to_numpy(float)).T)
    axis.barh(heights, rows[name], width, xerr=errors, color=colour, label=label, error_kw={"lw": 0.8})


def image(axis: Axes, matrix: np.ndarray, limit: float) -> AxesImage:
    """Draw a matrix in diverging colours from -limit to limit; what is not known stays empty."""
    shown = np.ma.masked_invalid(matrix)
    return axis.imshow(
        shown, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest", rasterized=True
    )


def reach(values: np.ndarray, share: float = 0.98) -> float:
    """Return the end of a diverging colour scale, chosen so that a few large values do not wash out the rest."""
    moved = np.abs(values[np.isfinite(values) & (values != 0)])
    return float(np.quantile(moved, share)) if moved.size else 1.0


def ticks(axis: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Put names along both axes of a matrix, as many as can be read."""
    step, stride = max(1, len(rows) // 30), max(1, len(columns) // 30)
    axis.set_yticks(range(0, len(rows), step), rows[::step], fontsize=7)
    axis.set_xticks(range(0, len(columns), stride), columns[::stride], fontsize=7, rotation=90)
