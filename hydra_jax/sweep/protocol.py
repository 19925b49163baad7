"""The protocol of a sweep: all that its results depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hydra_jax.config import GIVEN, SweepConfig
from hydra_jax.text import prompts as prompt_sets
from hydra_jax.text.prompts import Prompt
from hydra_jax.version import __version__
from hydra_jax.weights.model import Model


@dataclasses.dataclass(frozen=True)
class Given:
    """Inputs of a sweep that Python gives as they are, beside the settings.

    Attributes:
      model: loaded.
      prompts: those to examine.
      sources: other prompts that replacements are drawn from; None for the prompts themselves.
      target: as of `readout.Readout`; None for what the settings say.
      foil: the same.
      positions: as of `items.itemise`; None for what the settings say.
      source: a few words on where the prompts are from.
    """

    model: Model
    prompts: Sequence[Prompt]
    sources: Sequence[Prompt] | None = None
    target: Any = None
    foil: Any = None
    positions: Any = None
    source: str = GIVEN


def protocol(
    config: SweepConfig, model: Model, prompts: Sequence[Prompt], given: Given | None = None
) -> dict[str, Any]:
    """Return all that a sweep's results depend on, as a JSON tree."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    ablation = dataclasses.asdict(config.ablation)
    more: dict[str, Any] = {}
    if given and given.sources is not None:
        more["sources"] = prompt_sets.content_hash(given.sources)
    asked = {"target": config.readout.target, "foil": config.readout.foil, "positions": config.prompts.positions}
    for name in asked:
        value = getattr(given, name, None)
        asked[name] = asked[name] if value is None else _said(value)
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
            "source": _source(config, given),
            "sha256": prompt_sets.content_hash(prompts),
            "kind": config.prompts.kind,
            "correct_only": config.prompts.filtered,
            "limit": config.prompts.limit,
            "positions": asked.pop("positions"),
        },
        "ablation": ablation | {"kind": config.ablation.kind.value, "replacements": config.ablation.draws} | more,
        "readout": asked | {"metrics": ",".join(config.readout.asked_metrics), "responders": config.readout.responders},
        "seed": config.seed,
        "versions": {"hydra_jax": __version__, **versions},
    }


def _source(config: SweepConfig, given: Given | None) -> str:
    if given:
        return given.source
    return "one prompt" if config.prompts.text else Path(config.prompts.path).name or "built-in facts"


def _said(value: Any) -> str:
    """Return what was asked for as text: a long list as a hash of it."""
    plain = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    text = plain if isinstance(plain, str) else json.dumps(plain, default=lambda one: one.tolist())
    return text if len(text) <= 60 else f"one for each, {hashlib.sha256(text.encode()).hexdigest()[:16]}"
