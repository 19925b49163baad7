"""Figures in which components meet components: who responds to whom, and heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hydra_jax.analysis.results import Results
from hydra_jax.core.edits import Component
from hydra_jax.report.figures.style import COLOURS, DIVERGING, blank, reach, ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANKED = 20


def compensation_matrix(results: Results) -> Figure:
    """Mean change of every component's contribution (columns) under ablation of each component (rows).

    Beside it, where the sweep has direct edges: the same where each component alone sees the edit, and the rest,
    which changes of components in between passed on.
    """
    matrices = {"compensation": results.effects["compensation"].values.mean(axis=0)}
    if "direct_edge" in results.effects:
        edges = results.effects["direct_edge"].values.mean(axis=0)
        matrices |= {"direct edges": edges, "passed on: compensation less edges": matrices["compensation"] - edges}
    limit = reach(np.stack(list(matrices.values())))
    rows, columns = results.ablated_names, results.component_names
    height = 2 + 5.5 * min(max(len(rows) / len(columns), 0.3), 2)
    figure = blank((2 + 5.2 * len(matrices), height))
    axes = figure.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=True):
        image = axis.imshow(
            matrix, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest", rasterized=True
        )
        ticks(axis, rows, columns)
        axis.set(title=title, xlabel="responding component")
    axes[0].set_ylabel("ablated component")
    figure.colorbar(image, ax=axes, label="change of contribution (logits); red repairs, blue erodes", extend="both")
    figure.suptitle(f"Who responds to whose ablation\n{results.caption}, mean over prompts and replacements")
    return figure


def heads(results: Results) -> Figure:
    """The strongest heads, ranked, and every head's direct effect and repair as maps of layer by head."""
    summary = results.summary
    layers = np.unique(summary["layer"])
    maps = {
        "direct effect": summary["direct_effect"],
        "repaired: direct less total effect": summary["direct_effect"] - summary["total_effect"],
    }
    limit = reach(np.stack(list(maps.values())), 0.99)
    figure = blank((14, 2 + 0.22 * len(layers)))
    ranked, *axes = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    strongest = summary.nlargest(RANKED, "direct_effect").iloc[::-1]
    for name, offset, label in (("direct_effect", 0.2, "direct effect"), ("total_effect", -0.2, "total effect")):
        errors = np.abs(strongest[[f"{name}_low", f"{name}_high"]].to_numpy() - strongest[[name]].to_numpy()).T
        heights = np.arange(len(strongest)) + offset
        ranked.barh(heights, strongest[name], 0.38, xerr=errors, color=COLOURS[name], label=label, error_kw={"lw": 0.8})
    names = [str(Component.named(row.layer, row.site, row.head)) for row in strongest.itertuples()]
    ranked.set_yticks(range(len(names)), names, fontsize=7)
    ranked.set(title=f"the {len(names)} strongest", xlabel="logits, with 95% interval")
    ranked.legend(loc="lower right", fontsize=8)
    for axis, (title, values) in zip(axes, maps.items(), strict=True):
        grid = values.to_numpy().reshape(len(layers), -1)
        image = axis.imshow(
            grid, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest", rasterized=True
        )
        axis.set(title=title, xlabel="head", xticks=range(grid.shape[1]))
        axis.set_yticks(range(len(layers)), layers, fontsize=7)
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="logits", extend="both")
    figure.suptitle(f"Attention heads ablated one by one\n{results.caption}, means over prompts and replacements")
    return figure
