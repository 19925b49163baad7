"""Figures by layer: contributions and effects, regressions, erasure, kinds of ablation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hydra_jax.analysis.results import Results
from hydra_jax.analysis.stats import PARTS
from hydra_jax.report.figures.style import COLOURS, KIND_COLOURS, SITE_NAMES, band, blank, zero_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PART_NAMES = {
    "": ("all of it", COLOURS["all"]),
    "attn_": ("downstream attention", COLOURS["attn"]),
    "mlp_": ("downstream MLPs", COLOURS["mlp"]),
    "norm_": ("final norm", COLOURS["norm"]),
}


def _by_site(results: Results, rows: int, height: float) -> tuple[Figure, np.ndarray]:
    """A grid of panels, one column per ablated site."""
    figure = blank((5.5 * len(results.sites), height))
    axes = figure.subplots(rows, len(results.sites), sharex=True, sharey="row", squeeze=False)
    for axis, site in zip(axes[0], results.sites, strict=True):
        axis.set_title(f"{SITE_NAMES[site]} ablated")
    for axis in axes[-1]:
        axis.set_xlabel("layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure, axes


def effects_by_layer(results: Results) -> Figure:
    """Contribution, direct and total effect by layer, attention beside MLP: median and quartiles over prompts."""
    lines = {
        "delta_unembed": ("contributes directly (delta_unembed)", results.effects["ablated_delta_unembed"].values),
        "direct_effect": ("is lost directly when it is ablated (direct effect)", results.means["direct_effect"].values),
        "total_effect": ("is lost in the end (total effect)", results.means["total_effect"].values),
    }
    figure, axes = _by_site(results, 1, 4)
    for axis, site in zip(axes[0], results.sites, strict=True):
        indices = results.ablated(site)
        layers = results.effects["ablated_layer"].values[indices]
        for name, (label, values) in lines.items():
            low, middle, high = np.quantile(values[:, indices], [0.25, 0.5, 0.75], axis=0)
            axis.fill_between(layers, low, high, color=COLOURS[name], alpha=0.2, linewidth=0)
            dashes = "--" if name == "delta_unembed" else "-"
            axis.plot(layers, middle, color=COLOURS[name], marker="o", markersize=3, linestyle=dashes, label=label)
        zero_line(axis)
    axes[0, 0].set_ylabel(results.unit)
    axes[0, 0].legend(loc="upper left")
    figure.suptitle(
        f"What a layer contributes, and what its ablation costs\n{results.caption}, median and quartiles over prompts"
    )
    return figure


def regression(results: Results) -> Figure:
    """Slope and R^2 of compensation on direct effect by layer, split by what compensates."""
    figure, axes = _by_site(results, 2, 6)
    for column, site in enumerate(results.sites):
        rows = results.summary[results.summary["site"] == site]
        for part in PARTS:
            label, colour = PART_NAMES[part]
            band(axes[0, column], rows, f"{part}slope", colour, label)
            band(axes[1, column], rows, f"{part}r2", colour)
        zero_line(axes[0, column])
        axes[1, column].set_ylim(-0.02, 1.02)
    _clip(axes[0], results.summary[[f"{part}slope" for part in PARTS]].to_numpy())
    axes[0, 0].set_ylabel("slope")
    axes[1, 0].set_ylabel("R²")
    axes[0, 0].legend(loc="lower left", ncols=2, fontsize=8)
    figure.suptitle(f"Compensation regressed on direct effect over prompts\n{results.caption}, 95% intervals")
    return figure


def _clip(axes: np.ndarray, values: np.ndarray) -> None:
    """Keep the scale to what most layers do: where a layer writes next to nothing, slopes run away."""
    values = values[np.isfinite(values)]
    if not values.size:
        return
    low, high = np.quantile(values, [0.03, 0.97])
    margin = 0.3 * (high - low) + 0.05
    axes[0].set_ylim(low - margin, high + margin)


def erasure(results: Results) -> Figure:
    """Each MLP's contribution, clean and with the strongest attention layers ablated; and the change."""
    table = results.erasure
    figure = blank((11, 4))
    left, right = figure.subplots(1, 2, sharex=True)
    colours = [COLOURS["clean"], COLOURS["ablated"], COLOURS["mlp"], COLOURS["norm"]]
    for ablated, colour in zip(table["ablated"].unique(), colours, strict=False):
        rows = table[table["ablated"] == ablated]
        band(left, rows, "delta_unembed", colour, f"{ablated} ablated" if ablated else "clean run")
        if ablated:
            band(right, rows, "change", colour, f"{ablated} ablated")
    for axis, title in ((left, "contribution"), (right, "change under ablation")):
        zero_line(axis)
        axis.set(title=title, xlabel="MLP layer")
    left.set_ylabel(results.unit)
    left.legend(loc="upper left", fontsize=8)
    figure.suptitle(
        "Erasure: below zero an MLP pushes the target down; a change above zero pushes it down less\n"
        f"{results.caption}, mean and 95% interval"
    )
    return figure


def kinds(sweeps: Sequence[Results]) -> Figure:
    """Sweeps of different ablation kinds on the same prompts, one line per kind."""
    panels = {"direct_effect": "direct effect", "total_effect": "total effect", "compensation": "compensation"}
    figure, axes = _by_site(sweeps[0], len(panels), 8)
    for sweep in sweeps:
        for column, site in enumerate(sweeps[0].sites):
            rows = sweep.summary[sweep.summary["site"] == site]
            for row, name in enumerate(panels):
                band(axes[row, column], rows, name, KIND_COLOURS[sweep.kind], sweep.kind)
    for row, title in enumerate(panels.values()):
        axes[row, 0].set_ylabel(f"{title} (logits)")
        for axis in axes[row]:
            zero_line(axis)
    axes[0, 0].legend(loc="upper left", fontsize=8)
    first = sweeps[0]
    figure.suptitle(
        f"The same prompts under each kind of ablation\n{first.protocol['model']['name']}, the"
        f" {first.effects.sizes['prompt']:,} prompts that all sweeps have, mean and 95% interval"
    )
    return figure
