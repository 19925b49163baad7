"""The protocol of a sweep: all that its results depend on."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra_jax.config import SweepConfig
from hydra_jax.text import prompts as prompt_sets
from hydra_jax.text.prompts import Prompt
from hydra_jax.version import __version__
from hydra_jax.weights.model import Model


def protocol(config: SweepConfig, model: Model, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return all that a sweep's results depend on, as a JSON tree."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    ablation = dataclasses.asdict(config.ablation)
    return {
        "model": {
            "name": config.model,
            "step": config.model_step,
            "sha256": model.weights_hash,
            "dropout": model.dropout,
        },
        "dtype": config.dtype,
        "precision": config.precision,
        "prompts": {
            "source": "one prompt" if config.prompts.text else Path(config.prompts.path).name or "built-in facts",
            "sha256": prompt_sets.content_hash(prompts),
            "kind": config.prompts.kind,
            "correct_only": config.prompts.filtered,
            "limit": config.prompts.limit,
            "target": config.prompts.target,
        },
        "ablation": ablation | {"kind": config.ablation.kind.value, "replacements": config.ablation.draws},
        "seed": config.seed,
        "versions": {"hydra_jax": __version__, **versions},
    }
