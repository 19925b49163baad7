"""A training run as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hydra_jax.report.figures.style import COLOURS, blank
from hydra_jax.training.config import TrainConfig

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

RECALL = {
    "recall_trained": ("templates of the training text", COLOURS["direct_effect"]),
    "recall_unseen_template": ("unseen templates", COLOURS["mlp"]),
    "recall_unseen_person": ("unseen people (guessed)", COLOURS["delta_unembed"]),
}


def training_curves(config: TrainConfig, metrics: pd.DataFrame) -> Figure:
    """Loss by step, and beside it what is recalled (of text, the loss on what was kept from training)."""
    asked = [name for name in RECALL if name in metrics]
    panels = 2 if asked else 1
    figure = blank((5 * panels, 3.8))
    axes = figure.subplots(1, panels, squeeze=False)[0]
    loss = metrics["loss"].dropna()
    axes[0].plot(loss.index, loss, color=COLOURS["clean"], linewidth=1.2, label="training")
    if "unseen_loss" in metrics:
        unseen = metrics["unseen_loss"].dropna()
        axes[0].plot(unseen.index, unseen, color=COLOURS["ablated"], marker="o", markersize=3, label="unseen text")
        axes[0].legend()
    axes[0].set(xlabel="step", ylabel="loss (nats a token)")
    for name in asked:
        label, colour = RECALL[name]
        share = metrics[name].dropna()
        axes[1].plot(share.index, share, color=colour, marker="o", markersize=3, label=label)
    if asked:
        axes[1].set(xlabel="step", ylabel="share of prompts answered right", ylim=(-0.03, 1.03))
        axes[1].legend(loc="upper left", fontsize=8)
    figure.suptitle(f"Training: {config.arm}, {config.preset}, seed {config.seed}")
    return figure
