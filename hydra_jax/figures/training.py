"""A training run as a picture."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from hydra_jax.figures.style import COLOURS
from hydra_jax.training.config import TrainConfig

RECALL = {
    "recall_trained": ("templates of the training text", COLOURS["direct_effect"]),
    "recall_unseen_template": ("unseen templates", COLOURS["mlp"]),
    "recall_unseen_person": ("unseen people (guessed)", COLOURS["delta_unembed"]),
}


def training_curves(config: TrainConfig, metrics: pd.DataFrame) -> Figure:
    """Loss by step, and beside it what is recalled (of text, the loss on what was kept from training)."""
    figure = Figure(figsize=(10, 3.8))
    left, right = figure.subplots(1, 2)
    loss = metrics["loss"].dropna()
    left.plot(loss.index, loss, color=COLOURS["clean"], linewidth=1.2, label="training")
    if "unseen_loss" in metrics:
        unseen = metrics["unseen_loss"].dropna()
        left.plot(unseen.index, unseen, color=COLOURS["ablated"], marker="o", markersize=3, label="unseen text")
        left.legend()
    left.set(xlabel="step", ylabel="loss (nats a token)")
    asked = [name for name in RECALL if name in metrics]
    for name in asked:
        label, colour = RECALL[name]
        share = metrics[name].dropna()
        right.plot(share.index, share, color=colour, marker="o", markersize=3, label=label)
    right.set(xlabel="step", ylabel="share of prompts answered right", ylim=(-0.03, 1.03))
    if asked:
        right.legend()
    else:
        right.set_visible(False)
    figure.suptitle(f"Training: {config.arm}, {config.preset}, seed {config.seed}")
    return figure
