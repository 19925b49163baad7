"""Figures in which prompts are points or lines."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from hydra_jax.analysis.names import example_name, is_set
from hydra_jax.analysis.results import Results
from hydra_jax.analysis.stats import PARTS
from hydra_jax.core.edits import SET, SITES, WHOLE
from hydra_jax.report.figures.style import COLOURS, MOST_POINTS, SITE_NAMES, band, blank, zero_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = 36
"""The most layers with a panel of their own: of a deeper model, evenly spread ones."""


def direct_against_total(results: Results) -> Figure:
    """Every prompt and ablated layer, direct against total effect; below, by layer, R^2 and the share above."""
    panels = [*results.sites, *([SET] if results.has_sets else [])]
    by_layer = bool(results.sites) and not results.by_head
    figure = blank((max(5.5 * len(panels), 6.5), 8.5 if by_layer else 6))
    axes = figure.subplots(2 if by_layer else 1, len(panels), squeeze=False, height_ratios=(5, 2.4)[: 1 + by_layer])
    for column, site in enumerate(panels):
        axis = axes[0, column]
        indices = results.ablated(site)
        direct, total = (results.means[name].values[:, indices].ravel() for name in ("direct_effect", "total_effect"))
        layer = np.tile(results.effects["ablated_layer"].values[indices], results.effects.sizes["prompt"])
        shown = np.random.default_rng(0).permutation(direct.size)[:MOST_POINTS]
        points = axis.scatter(
            direct[shown],
            total[shown],
            c=layer[shown],
            s=6,
            alpha=0.6,
            cmap="viridis",
            linewidth=0,
            rasterized=True,
            vmin=0,
            vmax=results.effects["layer"].values.max(),
        )
        limits = np.array([min(axis.get_xlim()[0], axis.get_ylim()[0]), max(axis.get_xlim()[1], axis.get_ylim()[1])])
        axis.plot(limits, limits, color="0.4", linewidth=0.8, linestyle="--")
        axis.text(0.97, 0.03, "downstream repair", transform=axis.transAxes, ha="right", color="0.3")
        axis.text(0.03, 0.97, "downstream breakage", transform=axis.transAxes, va="top", color="0.3")
        axis.set(
            title=f"{SITE_NAMES[site]} ablated",
            xlabel="direct effect (logits)",
            xlim=limits,
            ylim=limits,
            aspect="equal",
        )
        if by_layer and site != SET:
            rows = results.summary[results.summary["site"] == site]
            band(axes[1, column], rows, "total_r2", COLOURS["all"], "R² of delta_unembed and total effect")
            band(axes[1, column], rows, "share_direct_above_total", COLOURS["norm"], "share of prompts repaired")
            axes[1, column].set(ylim=(-0.02, 1.02), xlabel="layer")
            axes[1, column].xaxis.get_major_locator().set_params(integer=True)
        elif by_layer:
            axes[1, column].set_visible(False)
    axes[0, 0].set_ylabel("total effect (logits)")
    if by_layer:
        axes[1, 0].legend(loc="upper left", fontsize=8)
    figure.colorbar(
        points, ax=axes[0], label="ablated layer" + (" (the first of several)" if results.has_sets else ""), shrink=0.8
    )
    figure.suptitle(f"Direct against total effect of each ablation in each prompt\n{results.caption}")
    return figure


def compensation_by_layer(results: Results) -> Figure:
    """Compensation against direct effect with the regression, a small panel per layer."""
    from matplotlib.lines import Line2D

    single = ~is_set(results.effects)
    layers = np.unique(results.effects["ablated_layer"].values[single])
    if len(layers) > PANELS:
        layers = layers[np.linspace(0, len(layers) - 1, PANELS).round().astype(int)]
    columns = min(6, len(layers))
    lines = math.ceil(len(layers) / columns)
    figure = blank((2.1 * columns + 0.5, 1.9 * lines + 1))
    axes = figure.subplots(lines, columns, squeeze=False)
    direct = results.means["direct_effect"].values
    compensation = np.sum([results.means[f"{part}compensation"].values for part in PARTS[1:]], axis=0)
    for axis, layer in zip(axes.flat, layers, strict=False):
        for index in np.flatnonzero((results.effects["ablated_layer"].values == layer) & single):
            colour = COLOURS[str(results.effects["ablated_site"].values[index])]
            x, y = direct[:, index], compensation[:, index]
            shown = np.random.default_rng(0).permutation(x.size)[: MOST_POINTS // 20]
            axis.scatter(x[shown], y[shown], s=3, alpha=0.35, color=colour, linewidth=0, rasterized=True)
            row = results.summary.iloc[index]
            ends = np.array([x.min(), x.max()])
            if not results.by_head and np.isfinite(row["slope"]):
                axis.plot(ends, row["intercept"] + row["slope"] * ends, color=colour, linewidth=1.2)
        axis.axhline(0, color="0.8", linewidth=0.6, zorder=0)
        axis.axvline(0, color="0.8", linewidth=0.6, zorder=0)
        axis.set_title(f"layer {layer}", fontsize=8)
        axis.tick_params(labelsize=6)
    for axis in axes.flat[len(layers) :]:
        axis.set_visible(False)
    handles = [
        Line2D([], [], color=COLOURS[site], marker="o", markersize=3, label=f"{SITE_NAMES[site]} ablated")
        for site in results.sites
    ]
    figure.legend(handles=handles, loc="outside lower right", ncols=2, fontsize=8)
    figure.supxlabel("direct effect (logits)", fontsize=9)
    figure.supylabel("compensation (logits)", fontsize=9)
    figure.suptitle(
        f"Compensation against direct effect, a point a prompt, by ablated layer\n{results.caption};"
        " slope 1 restores all"
    )
    return figure


def single_prompts(examples: xr.Dataset) -> Figure:
    """Each component's contribution before and after an ablation: replacements faint, their mean strong."""
    count = examples.sizes["example"]
    figure = blank((11, 1.2 + 3.4 * count))
    for part, index in zip(np.atleast_1d(np.array(figure.subfigures(count, 1))), range(count), strict=True):
        _one_prompt(part, examples.isel(example=index), examples.attrs["kind"], legend=index == 0)
    return figure


def _one_prompt(figure: Figure, example: xr.Dataset, kind: str, legend: bool) -> None:
    layer, site, head = (example[f"ablated_{name}"].item() for name in ("layer", "site", "head"))
    if site in SITES:
        named = f"{SITE_NAMES[site]} {layer}" + ("" if head == WHOLE else f", head {head},")
    else:
        named = example_name(example)
    axes = figure.subplots(1, len(SITES), sharey=True)
    for axis, name in zip(axes, SITES, strict=True):
        chosen = example.isel(component=np.flatnonzero(example["site"].values == name))
        clean, ablated = chosen["delta_unembed"].values, chosen["ablated_unembed"].values
        for replacement in ablated:
            axis.plot(chosen["layer"], replacement, color=COLOURS["ablated"], linewidth=0.7, alpha=0.25)
        lines = {"clean run": (clean, "clean"), "ablated run": (ablated.mean(axis=0), "ablated")}
        for label, (values, colour) in lines.items():
            axis.plot(chosen["layer"], values, color=COLOURS[colour], marker="o", markersize=3.5, label=label)
        if name == site:
            axis.axvline(layer, color="0.5", linestyle=":", label="the ablated layer")
        zero_line(axis)
        axis.set(xlabel=f"{SITE_NAMES[name]} layer")
    axes[0].set_ylabel("contribution (logits)")
    if legend:
        axes[SITES.index(site) if site in SITES else 0].legend(loc="upper left", fontsize=8)
    text = textwrap.fill(f"“{example['text'].item()}”", width=110, max_lines=2)
    drop, direct = float(example["total_effect"].mean()), float(example["direct_effect"].mean())
    foil = example["foil_text"].item().strip() if "foil_text" in example.coords else ""
    less = f" less “{foil}”" if foil else ""
    figure.suptitle(
        f"{text} → “{example['target_text'].item().strip()}”{less} (p = {example['clean_probability'].item():.2f})\n"
        f"{kind} ablation of {named} takes {direct:.2f} logits away directly;"
        f" in the end the logit {'falls' if drop >= 0 else 'rises'} by {abs(drop):.2f}",
        fontsize=10,
    )
