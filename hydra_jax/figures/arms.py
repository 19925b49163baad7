"""Matched models side by side."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hydra_jax.arms import MEASURES
from hydra_jax.compare import Comparison
from hydra_jax.figures.style import COLOURS, zero_line

ARM_COLOURS = {"no_dropout": "#1f6fb4", "dropout": "#c1354a", "stochastic_depth": "#d9822b"}
OTHERS = ("#3f8f5a", "#8a94a0", "#2b2f36")
SHOWN = ("restored_share", "attn_share", "mlp_share", "norm_share", "slope", "r2", "erasure_change", "responding")
OVER_STEPS = ("restored_share", "slope")


def colours(arms: list[str]) -> dict[str, str]:
    """A colour an arm, its own where it is one of the project's."""
    spare = iter(OTHERS * len(arms))
    return {arm: ARM_COLOURS.get(arm) or next(spare) for arm in arms}


def comparison(found: Comparison) -> Figure:
    """A panel a measure: each arm's mean and interval, and its seeds as faint points."""
    columns = 4
    figure = Figure(figsize=(12.5, 6.4))
    axes = figure.subplots(len(SHOWN) // columns, columns)
    colour = colours(found.arms)
    for axis, name in zip(axes.flat, SHOWN, strict=True):
        rows = found.final[found.final["measure"] == name].set_index("arm").loc[found.arms]
        for place, (arm, row) in enumerate(rows.iterrows()):
            single = [float(each.partition(": ")[2]) for each in row["seeds"].split("; ")]
            axis.scatter([place - 0.18] * len(single), single, s=14, color=colour[str(arm)], alpha=0.45, linewidth=0)
            axis.vlines(place, row["low"], row["high"], color=colour[str(arm)], linewidth=2)
            axis.plot(place, row["value"], color=colour[str(arm)], marker="o", markersize=6)
        zero_line(axis)
        axis.set_xticks(range(len(rows)), [arm.replace("_", "\n") for arm in found.arms], fontsize=8)
        axis.set_xlim(-0.6, len(rows) - 0.4)
        axis.set_title(MEASURES[name], fontsize=8.5)
    seeds = found.recall["seed"].nunique()
    figure.suptitle(
        f"Self-repair of ablated attention by arm of training: {found.prompts} prompts that all models answer right,"
        f" {seeds} seeds (faint);\n95 % intervals over seeds, prompts and replacements"
    )
    return figure


def emergence(found: Comparison) -> Figure:
    """By step of training: what is recalled, and how much of an ablation is repaired."""
    figure = Figure(figsize=(12, 3.8))
    axes = figure.subplots(1, 1 + len(OVER_STEPS))
    colour = colours(found.arms)
    for arm in found.arms:
        of_arm = found.recall[found.recall["arm"] == arm].groupby("step")
        for name, dashes in (("recall_trained", "-"), ("recall_unseen_template", ":")):
            if name in found.recall:
                share = of_arm[name].mean()
                label = f"{arm.replace('_', ' ')}{'' if dashes == '-' else ', unseen templates'}"
                axes[0].plot(share.index, share, color=colour[arm], linestyle=dashes, label=label)
        for axis, name in zip(axes[1:], OVER_STEPS, strict=True):
            _over_steps(axis, found.table[(found.table["arm"] == arm) & (found.table["measure"] == name)], colour[arm])
    axes[0].set(xlabel="step of training", ylabel="share of prompts answered right", ylim=(-0.03, 1.03))
    axes[0].legend(fontsize=7)
    for axis, name in zip(axes[1:], OVER_STEPS, strict=True):
        zero_line(axis)
        axis.set(xlabel="step of training", ylabel=MEASURES[name])
        late = found.table[(found.table["measure"] == name) & (found.table["step"] > 0)]
        low, high = np.quantile(late["low"], 0.05), np.quantile(late["high"], 0.95)
        axis.set_ylim(min(low, 0) - 0.15, max(high, 0) + 0.15)
    figure.suptitle("When facts are learnt, and when their ablation is repaired (bands: 95 % intervals)")
    return figure


def _over_steps(axis: Axes, rows: pd.DataFrame, colour: str) -> None:
    axis.fill_between(rows["step"], rows["low"], rows["high"], color=colour, alpha=0.15, linewidth=0)
    axis.plot(rows["step"], rows["value"], color=colour, marker="o", markersize=3)


def by_layer(found: Comparison) -> Figure:
    """A panel an arm: direct and total effect of ablating each attention layer, and who repairs it."""
    figure = Figure(figsize=(4.1 * len(found.arms), 3.8))
    axes = figure.subplots(1, len(found.arms), sharey=True, squeeze=False)[0]
    lines = {
        "direct_effect": ("direct effect", COLOURS["direct_effect"], "-"),
        "total_effect": ("total effect", COLOURS["total_effect"], "-"),
        "attn_compensation": ("repair by attention", COLOURS["attn"], ":"),
        "mlp_compensation": ("repair by MLPs", COLOURS["mlp"], ":"),
        "norm_compensation": ("repair by the final norm", COLOURS["norm"], ":"),
    }
    for axis, arm in zip(axes, found.arms, strict=True):
        for name, (label, colour, dashes) in lines.items():
            rows = found.by_layer[(found.by_layer["arm"] == arm) & (found.by_layer["effect"] == name)]
            axis.fill_between(rows["layer"], rows["low"], rows["high"], color=colour, alpha=0.15, linewidth=0)
            axis.plot(
                rows["layer"], rows["value"], color=colour, linestyle=dashes, marker="o", markersize=3, label=label
            )
        zero_line(axis)
        axis.set(title=arm.replace("_", " "), xlabel="ablated attention layer")
    axes[0].set_ylabel("effect on the answer (logits)")
    axes[0].legend(fontsize=8)
    figure.suptitle("Ablated attention by layer and arm, means over seeds and prompts")
    return figure
