"""A training run that takes seconds."""

import dataclasses

from hydra_jax.config import ShapeConfig
from hydra_jax.training import config as configs

SHAPE = ShapeConfig(layers=2, width=16, heads=2, kv_heads=2, mlp_width=24, context=48)
DATA = configs.DataConfig(people=6, unseen_people=2, variants=2, vocab_size=300)
CHECKPOINT = configs.CheckpointConfig(every=2, keep_last=2, keep_every=4)


def config(**changes):
    """Changes to nested settings are dicts."""
    base = configs.TrainConfig(
        steps=6, batch=4, accumulate=1, model=SHAPE, data=DATA, checkpoint=CHECKPOINT, evaluate_every=3, log_every=1
    )
    nested = {
        name: dataclasses.replace(getattr(base, name), **value)
        for name, value in changes.items()
        if isinstance(value, dict)
    }
    arm = {"arm": "some"} if any(changes.get("dropout", {}).values()) else {}
    return dataclasses.replace(base, **arm | changes | nested)
