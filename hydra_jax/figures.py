"""A sweep as pictures. Every effect is in logits of the target token, centred over the vocabulary."""

from __future__ import annotations

import functools
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hydra_jax import store
from hydra_jax.edits import SITES, WHOLE, Component

SITE_NAMES = {"attn": "attention", "mlp": "MLP"}
COLOURS = {"clean": "#3b4a5c", "ablated": "#d1495b", "delta_unembed": "#1f77b4", "total_effect": "#d1495b"}
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "legend.frameon": False,
    "savefig.dpi": 160,
    "text.parse_math": False,  # prompts are text, dollar signs and all
}


def draw(workdir: Path, effects: xr.Dataset, summary: pd.DataFrame) -> list[Path]:
    """Draw every figure of a finished sweep as PNG into `workdir`; returns their paths."""
    example = store.open_example(workdir)
    by_head = bool((effects["ablated_head"] != WHOLE).any())
    overview = "effects_by_head" if by_head else "effects_by_layer"
    figures: dict[str, Callable[[], Figure]] = {
        overview: lambda: head_map(effects, summary) if by_head else effects_by_layer(effects, summary),
        "direct_against_total": lambda: direct_against_total(effects),
        "example": lambda: one_prompt(example),
        "compensation": lambda: compensation_matrix(effects),
    }
    paths = []
    for name, figure in figures.items():
        paths.append(workdir / f"{name}.png")
        with mpl.rc_context(STYLE):
            store.write_whole(paths[-1], functools.partial(figure().savefig, format="png"))
    return paths


def effects_by_layer(effects: xr.Dataset, summary: pd.DataFrame) -> Figure:
    """Mean contribution and total effect by layer, attention beside MLP, with intervals."""
    lines = {
        "delta_unembed": "contributes directly (delta_unembed)",
        "total_effect": "is lost when it is ablated (total effect)",
    }
    sites = [site for site in SITES if site in set(summary["site"])]
    figure = Figure(figsize=(5.5 * len(sites), 4))
    axes = figure.subplots(1, len(sites), sharey=True, squeeze=False)[0]
    for axis, site in zip(axes, sites, strict=True):
        rows = summary[summary["site"] == site]
        for name, label in lines.items():
            axis.fill_between(rows["layer"], rows[f"{name}_low"], rows[f"{name}_high"], color=COLOURS[name], alpha=0.2)
            axis.plot(rows["layer"], rows[name], color=COLOURS[name], marker="o", markersize=3, label=label)
        axis.axhline(0, color="0.7", linewidth=0.8)
        axis.set(title=SITE_NAMES[site], xlabel="layer")
    axes[0].set_ylabel("logits of the target token")
    axes[0].legend(loc="upper left")
    figure.suptitle(
        f"What a layer contributes, and what its ablation costs\n{_caption(effects)}, mean and 95% interval"
    )
    return figure


def head_map(effects: xr.Dataset, summary: pd.DataFrame) -> Figure:
    """Layer by head: the mean direct effect of ablating it, and how much of that is repaired."""
    maps = {
        "direct effect": summary["direct_effect"],
        "repaired: direct less total effect": summary["direct_effect"] - summary["total_effect"],
    }
    layers = np.unique(summary["layer"])
    reach = float(max(np.abs(values).max() for values in maps.values()))
    figure = Figure(figsize=(10, 1.5 + 0.24 * len(layers)))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (title, values) in zip(axes, maps.items(), strict=True):
        grid = values.to_numpy().reshape(len(layers), -1)
        image = axis.imshow(grid, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto", interpolation="nearest")
        axis.set(title=title, xlabel="head", xticks=range(grid.shape[1]))
    axes[0].set_yticks(range(len(layers)), layers, fontsize=7)
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="logits")
    figure.suptitle(f"Attention heads ablated one by one\n{_caption(effects)}, mean over prompts and replacements")
    return figure


def direct_against_total(effects: xr.Dataset) -> Figure:
    """Every prompt and ablated layer: the drop if only the direct path were cut, against the drop there was."""
    means = effects[["direct_effect", "total_effect"]].mean("replacement")
    sites = [site for site in SITES if (means["ablated_site"] == site).any()]
    figure = Figure(figsize=(5.5 * len(sites), 5))
    axes = figure.subplots(1, len(sites), squeeze=False)[0]
    for axis, site in zip(axes, sites, strict=True):
        chosen = means.isel(ablated=np.flatnonzero(means["ablated_site"] == site))
        layer = np.broadcast_to(chosen["ablated_layer"].values, chosen["direct_effect"].shape)
        points = axis.scatter(
            chosen["direct_effect"], chosen["total_effect"], c=layer, s=6, alpha=0.6, cmap="viridis", linewidth=0
        )
        limits = np.array([min(axis.get_xlim()[0], axis.get_ylim()[0]), max(axis.get_xlim()[1], axis.get_ylim()[1])])
        axis.plot(limits, limits, color="0.4", linewidth=0.8, linestyle="--")
        axis.text(0.97, 0.03, "repaired downstream", transform=axis.transAxes, ha="right", color="0.3")
        axis.text(0.03, 0.97, "broken downstream", transform=axis.transAxes, va="top", color="0.3")
        axis.set(title=SITE_NAMES[site], xlabel="direct effect (logits)", xlim=limits, ylim=limits, aspect="equal")
    axes[0].set_ylabel("total effect (logits)")
    figure.colorbar(points, ax=axes, label="ablated layer", shrink=0.8)
    figure.suptitle(f"Direct against total effect of each ablation in each prompt\n{_caption(effects)}")
    return figure


def one_prompt(example: xr.Dataset) -> Figure:
    """Each component's contribution before and after an ablation: replacements faint, their mean strong."""
    attributes = example.attrs
    layer, site = attributes["ablated_layer"], attributes["ablated_site"]
    figure = Figure(figsize=(11, 5))
    axes = figure.subplots(1, len(SITES), sharey=True)
    for axis, name in zip(axes, SITES, strict=True):
        chosen = example.isel(component=np.flatnonzero(example["site"] == name))
        clean, ablated = chosen["delta_unembed"].values, chosen["ablated_unembed"].values
        for replacement in ablated:
            axis.plot(chosen["layer"], replacement, color=COLOURS["ablated"], linewidth=0.7, alpha=0.25)
        axis.plot(chosen["layer"], clean, color=COLOURS["clean"], marker="o", markersize=4, label="clean run")
        axis.plot(
            chosen["layer"],
            ablated.mean(axis=0),
            color=COLOURS["ablated"],
            marker="o",
            markersize=4,
            label="ablated run",
        )
        if name == site:
            axis.axvline(layer, color="0.5", linestyle=":", label="the ablated layer")
        axis.axhline(0, color="0.7", linewidth=0.8)
        axis.set(title=SITE_NAMES[name], xlabel="layer")
    axes[0].set_ylabel("contribution to the target's logit")
    axes[SITES.index(site)].legend(loc="upper left")
    of_head = "" if attributes["ablated_head"] == WHOLE else f", head {attributes['ablated_head']},"
    text = textwrap.fill(f"“{attributes['text']}”", width=100, max_lines=3)
    drop, direct = float(example["total_effect"].mean()), float(example["direct_effect"].mean())
    figure.suptitle(
        f"{text} → “{attributes['target_text'].strip()}” (p = {attributes['clean_probability']:.2f})\n"
        f"{attributes['kind']} ablation of {SITE_NAMES[site]} {layer}{of_head} takes {direct:.2f} logits away directly;"
        f" in the end the logit falls by {drop:.2f}"
    )
    return figure


def compensation_matrix(effects: xr.Dataset) -> Figure:
    """Mean change of every component's contribution (columns) under ablation of each component (rows)."""
    matrix = effects["compensation"].mean("prompt").values
    ablated = _names(effects, "ablated_layer", "ablated_site", "ablated_head")
    responding = _names(effects, "layer", "site")
    moved = np.abs(matrix[matrix != 0])
    reach = float(np.quantile(moved, 0.98)) if moved.size else 1.0
    figure = Figure(figsize=(9, 2 + 7 * min(len(ablated) / len(responding), 2)))
    axis = figure.subplots()
    image = axis.imshow(matrix, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto", interpolation="nearest")
    _ticks(axis, ablated, responding)
    axis.set(xlabel="responding component", ylabel="ablated component")
    figure.colorbar(image, ax=axis, label="change of contribution (logits); red repairs, blue erodes", extend="both")
    figure.suptitle(f"Who responds to whose ablation\n{_caption(effects)}, mean over prompts and replacements")
    return figure


def _names(effects: xr.Dataset, *coordinates: str) -> list[str]:
    labels = zip(*(effects[coordinate].values for coordinate in coordinates), strict=True)
    return [str(Component.named(*label)) for label in labels]


def _ticks(axis: Axes, rows: list[str], columns: list[str]) -> None:
    step, stride = max(1, len(rows) // 30), max(1, len(columns) // 30)
    axis.set_yticks(range(0, len(rows), step), rows[::step], fontsize=7)
    axis.set_xticks(range(0, len(columns), stride), columns[::stride], fontsize=7, rotation=90)


def _caption(effects: xr.Dataset) -> str:
    protocol = json.loads(effects.attrs["protocol"])
    return f"{protocol['model']['name']}, {protocol['ablation']['kind']} ablation, {effects.sizes['prompt']} prompts"
