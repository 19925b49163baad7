"""Matched models side by side."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from hydra_jax.comparison.arms import MEASURES
from hydra_jax.comparison.run import Comparison
from hydra_jax.report.figures.style import COLOURS, SITE_NAMES, blank, zero_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARM_COLOURS = {"no_dropout": "#1f6fb4", "dropout": "#c1354a", "stochastic_depth": "#d9822b"}
OTHERS = ("#3f8f5a", "#8a94a0", "#2b2f36")
SHOWN = ("restored_share", "attn_share", "mlp_share", "norm_share", "slope", "erasure_change", "responding")
OVER_STEPS = ("restored_share", "slope")
RECALL = {
    "recall_trained": "trained prompts answered right",
    "recall_unseen_template": "unseen templates answered right",
}
LINES = {
    "direct_effect": ("direct effect", COLOURS["direct_effect"], "-"),
    "total_effect": ("total effect", COLOURS["total_effect"], "-"),
    "attn_compensation": ("repair by attention", COLOURS["attn"], ":"),
    "mlp_compensation": ("repair by MLPs", COLOURS["mlp"], ":"),
    "norm_compensation": ("repair by the final norm", COLOURS["norm"], ":"),
}


def colours(arms: list[str]) -> dict[str, str]:
    """Return a colour for each arm, its own if it is one of the project's."""
    spare = iter(OTHERS * len(arms))
    return {arm: ARM_COLOURS.get(arm) or next(spare) for arm in arms}


def comparison(compared: Comparison) -> Figure:
    """A row per ablated site, a panel per measure: each arm's mean and interval, and its seeds as faint points."""
    sites = list(compared.final["ablated"].unique())
    figure = blank((15, 1.2 + 2.7 * len(sites)))
    axes = figure.subplots(len(sites), len(SHOWN), squeeze=False)
    colour = colours(compared.arms)
    for (line, site), (column, name) in itertools.product(enumerate(sites), enumerate(SHOWN)):
        axis, table = axes[line, column], compared.final
        rows = table[(table["ablated"] == site) & (table["measure"] == name)].set_index("arm").loc[compared.arms]
        for position, (arm, row) in enumerate(rows.iterrows()):
            single = [float(seed.partition(": ")[2]) for seed in row["seeds"].split("; ")]
            if np.isfinite(row["value"]):
                axis.scatter(
                    [position - 0.2] * len(single), single, s=14, color=colour[str(arm)], alpha=0.45, linewidth=0
                )
            axis.vlines(position, row["low"], row["high"], color=colour[str(arm)], linewidth=2)
            axis.plot(position, row["value"], color=colour[str(arm)], marker="o", markersize=5)
        zero_line(axis)
        axis.set_xticks(range(len(rows)), [arm.replace("_", "\n") for arm in compared.arms], fontsize=7)
        axis.set_xlim(-0.6, len(rows) - 0.4)
        axis.tick_params(axis="y", labelsize=7)
        if not line:
            axis.set_title(
                "late MLPs' change per direct effect" if name == "erasure_change" else MEASURES[name], fontsize=8
            )
        if not column:
            axis.set_ylabel(f"{SITE_NAMES[site]} ablated")
    seeds = compared.recall["seed"].nunique()
    figure.suptitle(
        f"Self-repair by arm of training: {compared.prompts} prompts that all models answer right, seeds faint"
        f" ({seeds}), 95 % intervals over seeds, prompts and replacements"
    )
    return figure


def emergence(compared: Comparison) -> Figure:
    """Recall, and how much of an ablation is repaired, by step of training."""
    sites = list(compared.final["ablated"].unique())
    figure = blank((4 * (1 + len(sites)), 6.4))
    axes = figure.subplots(len(OVER_STEPS), 1 + len(sites), squeeze=False)
    colour = colours(compared.arms)
    for line, (name, meaning) in enumerate(RECALL.items()):
        for arm in compared.arms:
            if name in compared.recall:
                share = compared.recall[compared.recall["arm"] == arm].groupby("step")[name].mean()
                axes[line, 0].plot(
                    share.index, share, color=colour[arm], marker="o", markersize=3, label=arm.replace("_", " ")
                )
        axes[line, 0].set(xlabel="step of training", ylabel=meaning, ylim=(-0.03, 1.03))
    axes[0, 0].legend(fontsize=8)
    for (line, name), (column, site) in itertools.product(enumerate(OVER_STEPS), enumerate(sites, 1)):
        axis, table = axes[line, column], compared.table
        rows = table[(table["ablated"] == site) & (table["measure"] == name)]
        for arm in compared.arms:
            steps = rows[rows["arm"] == arm].sort_values("step")
            axis.fill_between(steps["step"], steps["low"], steps["high"], color=colour[arm], alpha=0.15, linewidth=0)
            axis.plot(steps["step"], steps["value"], color=colour[arm], marker="o", markersize=3)
        # Early on there is next to nothing to restore, and its share is anything.
        late = rows.loc[rows["step"] > compared.last / 2, ["low", "high"]].to_numpy()
        ends = np.append(late[np.isfinite(late)], 0)
        room = 0.2 * (np.ptp(ends) or 1.0)
        axis.set(xlabel="step of training", ylabel=f"{MEASURES[name]}, {SITE_NAMES[site]} ablated")
        axis.set(xlim=axes[0, 0].get_xlim(), ylim=(ends.min() - room, ends.max() + room))
        zero_line(axis)
    figure.suptitle("When facts are learnt, and when their ablation is repaired (bands: 95 % intervals)")
    return figure


def by_layer(compared: Comparison) -> Figure:
    """A row per ablated site, a panel per arm: direct and total effect of ablating each layer, and who repairs it."""
    sites = list(compared.by_layer["ablated"].unique())
    figure = blank((4.1 * len(compared.arms), 0.8 + 3.1 * len(sites)))
    axes = figure.subplots(len(sites), len(compared.arms), sharey="row", squeeze=False)
    for (line, site), (column, arm) in itertools.product(enumerate(sites), enumerate(compared.arms)):
        axis, table = axes[line, column], compared.by_layer
        for name, (label, colour, dashes) in LINES.items():
            rows = table[(table["arm"] == arm) & (table["ablated"] == site) & (table["effect"] == name)]
            axis.fill_between(rows["layer"], rows["low"], rows["high"], color=colour, alpha=0.15, linewidth=0)
            axis.plot(
                rows["layer"], rows["value"], color=colour, linestyle=dashes, marker="o", markersize=3, label=label
            )
        zero_line(axis)
        axis.set(title=arm.replace("_", " ") if not line else "", xlabel=f"ablated {SITE_NAMES[site]} layer")
    for axis in axes[:, 0]:
        axis.set_ylabel("effect on the answer (logits)")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle("Ablations by layer and arm, means over seeds and prompts (bands: 95 % intervals)")
    return figure
