"""Figures in which components meet components: who responds to whom, and heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hydra_jax.analysis.results import Results
from hydra_jax.core.edits import WHOLE
from hydra_jax.report.figures.style import COLOURS, bars, blank, image, reach, ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANKED, RESPONSES = 20, 4
"""The strongest heads that are ranked, and the strongest ablations whose responding heads are shown."""


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
        drawn = image(axis, matrix, limit)
        ticks(axis, rows, columns)
        axis.set(title=title, xlabel="responding component")
    axes[0].set_ylabel("ablated component")
    figure.colorbar(drawn, ax=axes, label="change of contribution (logits); red repairs, blue erodes", extend="both")
    figure.suptitle(f"Who responds to whose ablation\n{results.caption}, mean over prompts and replacements")
    return figure


def heads(results: Results) -> Figure:
    """The strongest heads, ranked, and every head's direct effect and repair as maps of layer by head."""
    summary = results.summary[results.summary["head"] != WHOLE]
    layers = np.unique(summary["layer"])
    maps = {
        "direct effect": summary["direct_effect"],
        "repaired: direct less total effect": summary["direct_effect"] - summary["total_effect"],
    }
    limit = reach(np.stack(list(maps.values())), 0.99)
    figure = blank((14, max(2 + 0.22 * len(layers), 3.5)))
    ranked, *axes = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    strongest = summary.nlargest(RANKED, "direct_effect").iloc[::-1]
    for name, offset, label in (("direct_effect", 0.2, "direct effect"), ("total_effect", -0.2, "total effect")):
        bars(ranked, np.arange(len(strongest)) + offset, strongest, name, COLOURS[name], label)
    ranked.set_yticks(range(len(strongest)), strongest["name"], fontsize=7)
    ranked.set(title=f"the {len(strongest)} strongest", xlabel="logits, with 95% interval")
    ranked.legend(loc="lower right", fontsize=8)
    places = np.searchsorted(layers, summary["layer"]), summary["head"].to_numpy()
    for axis, (title, values) in zip(axes, maps.items(), strict=True):
        grid = np.full((len(layers), summary["head"].max() + 1), np.nan)
        grid[places] = values
        drawn = image(axis, grid, limit)
        axis.set(title=title, xlabel="head", xticks=range(grid.shape[1]))
        axis.set_yticks(range(len(layers)), layers, fontsize=7)
    axes[0].set_ylabel("layer")
    figure.colorbar(drawn, ax=axes, label="logits", extend="both")
    figure.suptitle(f"Attention heads ablated one by one\n{results.caption}, means over prompts and replacements")
    return figure


def head_responders(results: Results) -> Figure:
    """Mean change of every head's contribution under each of the strongest ablations, a map of layer by head each."""
    changes = results.effects["head_compensation"].transpose("ablated", "attn_layer", "head", "prompt").values
    means = changes.mean(axis=-1, dtype=np.float64)
    direct = results.resampled.values["direct_effect"]
    order = np.argsort(-direct)
    moving = order[means[order].any(axis=(1, 2))]  # below the last layers there is no head to respond
    strongest = (moving if moving.size else order)[:RESPONSES]
    maps = means[strongest]
    limit = reach(maps, 0.99)
    columns, (layers, heads) = min(2, len(maps)), maps.shape[1:]
    lines = -(-len(maps) // columns)
    figure = blank((1.5 + min(max(0.3 * heads, 3.2), 6) * columns, 1.3 + min(max(0.2 * layers, 2.2), 7) * lines))
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axis, index, grid in zip(axes.flat, strongest, maps, strict=False):
        drawn = image(axis, grid, limit)
        axis.set_title(f"{results.ablated_names[index]} ablated (direct effect {direct[index]:+.2f})", fontsize=9)
        axis.set_xticks(range(0, heads, max(1, heads // 16)))
        axis.set_yticks(range(0, layers, max(1, layers // 16)))
    for axis in axes.flat[len(maps) :]:
        axis.set_visible(False)
    figure.supxlabel("head", fontsize=10)
    figure.supylabel("layer", fontsize=10)
    figure.colorbar(drawn, ax=axes, label="change of contribution (logits)\nred repairs, blue erodes", extend="both")
    figure.suptitle(f"Heads that respond to the strongest ablations\n{results.caption}, means")
    return figure
