"""The names along a sweep's dimensions, and the components that they stand for."""

from __future__ import annotations

import numpy as np
import xarray as xr

from hydra_jax.core.edits import SET, WHOLE, Ablation, Component, parse


def ablated_names(effects: xr.Dataset) -> list[str]:
    """Return the names along `ablated`, as in "attn 3", "attn 3.1" or "attn 3 + mlp 5"; older stores lack them."""
    if "ablated_name" in effects.coords:
        return [str(name) for name in effects["ablated_name"].values]
    return _named(effects, "ablated_layer", "ablated_site", "ablated_head")


def example_name(example: xr.Dataset) -> str:
    """Return the name of what was ablated in a single example, whose labels are scalars."""
    if "ablated_name" in example.variables:
        return str(example["ablated_name"].item())
    return str(Component.named(*(example[f"ablated_{label}"].item() for label in ("layer", "site", "head"))))


def component_names(effects: xr.Dataset) -> list[str]:
    """Return the names along `component`."""
    return _named(effects, "layer", "site")


def ablations(effects: xr.Dataset) -> list[Ablation]:
    """Return what was ablated, along `ablated`."""
    return [ablation(name) for name in ablated_names(effects)]


def ablation(name: str) -> Ablation:
    """Return the ablation of a name that `ablated_names` gives.

    Raises:
      UserError: if it names no components.
    """
    return Ablation.of(*(component for part in name.split("+") for component in parse(part)))


def is_set(effects: xr.Dataset) -> np.ndarray:
    """Return whether several components were ablated together, [A]."""
    return effects["ablated_site"].values == SET


def is_whole(effects: xr.Dataset) -> np.ndarray:
    """Return whether it was one whole write, not a head of it, nor several components: [A]."""
    return ~is_set(effects) & (effects["ablated_head"].values == WHOLE)


def _named(effects: xr.Dataset, *coordinates: str) -> list[str]:
    labels = zip(*(effects[coordinate].values for coordinate in coordinates), strict=True)
    return [str(Component.named(*label)) for label in labels]
