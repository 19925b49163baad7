"""The variables and coordinates of a result store, and arrays and frames of their shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from hydra_jax.core.edits import SITES, Component, all_components

LOGITS = "logits"

NON_FINITE = "non_finite"
"""The variable that counts replacements whose values are not finite; NaN stands in their place."""


@dataclasses.dataclass(frozen=True)
class Variable:
    """A variable that is computed chunk by chunk.

    Attributes:
      meaning: what it is, in a few words.
      dims: its dimensions; the first is always `prompt`.
      units: "" where it has none.
      dtype: of its values.
      clean: whether it describes the clean run, not an ablation.
      optional: whether it is there only where direct edges were asked for.
    """

    meaning: str
    dims: tuple[str, ...]
    units: str = LOGITS
    dtype: str = "float32"
    clean: bool = False
    optional: bool = False

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes that xarray shows."""
        return ({"units": self.units} if self.units else {}) | {"long_name": self.meaning}

    @property
    def missing(self) -> float | int:
        """The value that stands where nothing was written yet."""
        return -1 if self.dtype == "int16" else np.nan


_REPLACED = ("prompt", "ablated", "replacement")
_ANSWERED = ("prompt", "ablated", "component")
VARIABLES = {
    "clean_logit": Variable("centred logit of the target", ("prompt",), clean=True),
    "clean_probability": Variable("probability of the target", ("prompt",), units="", clean=True),
    "final_scale": Variable("the final norm's divisor", ("prompt",), units="", clean=True),
    "delta_unembed": Variable("direct contribution to the target's centred logit", ("prompt", "component"), clean=True),
    "ablated_delta_unembed": Variable(
        "the same of what is ablated, a single head where heads are", ("prompt", "ablated"), clean=True
    ),
    "total_effect": Variable("drop of the target's centred logit under the ablation", _REPLACED),
    "direct_effect": Variable("drop if only the direct path were cut", _REPLACED),
    "attn_compensation": Variable("repair by downstream attention", _REPLACED),
    "mlp_compensation": Variable("repair by downstream MLPs", _REPLACED),
    "norm_compensation": Variable("repair by the final norm's rescaling", _REPLACED),
    "compensation": Variable("change of a component's contribution, mean over replacements", _ANSWERED),
    "direct_edge": Variable("the same where it alone sees the edit, all between frozen", _ANSWERED, optional=True),
    NON_FINITE: Variable(
        "replacements whose values are not finite, and left out", ("prompt", "ablated"), units="", dtype="int16"
    ),
}
"""Everything that chunks write, in the order of the store."""

EFFECTS = tuple(name for name, variable in VARIABLES.items() if variable.dims == _REPLACED)
"""The variables with a value for each replacement."""

CLEAN = tuple(name for name, variable in VARIABLES.items() if variable.clean)
"""The variables of the clean run."""

FILLED = (*VARIABLES, "finished")
"""The variables that are written chunk by chunk."""


def labels(dim: str, components: Sequence[Component], prefix: str = "") -> dict[str, Any]:
    """Return the coordinates `layer` and `site` along `dim`, their names prefixed."""
    # Fixed-width strings have no place in zarr's specification; objects become variable-length ones.
    sites = np.array([SITES[c.site] for c in components], dtype=object)
    return {f"{prefix}layer": (dim, np.array([c.layer for c in components])), f"{prefix}site": (dim, sites)}


def frame(
    prompts: Mapping[str, Sequence[Any]], ablated: Sequence[Component], layers: int, source: np.ndarray
) -> xr.Dataset:
    """Return a dataset with every coordinate, and what is known before anything is computed.

    Args:
      prompts: columns of P values: `prompt_id`, `text`, `relation`, `answer_text`, `target_id`,
        `target_text`, `length`.
      ablated: the components to be ablated.
      layers: L; the components that respond are all 2L.
      source: [P, R], the position in this dataset of each replacement's prompt; -1 where there is none.
    """
    text = {"prompt_id", "text", "relation", "answer_text", "target_text"}
    coordinates = {
        name: ("prompt", np.asarray(values, dtype=object if name in text else np.int64))
        for name, values in prompts.items()
    }
    coordinates |= {
        **labels("ablated", ablated, "ablated_"),
        "ablated_head": ("ablated", np.array([c.head for c in ablated])),
        **labels("component", all_components(layers)),
    }
    variables = {
        "source": (("prompt", "replacement"), source, {"long_name": "position of the replacement's prompt; -1: none"}),
        "finished": (
            "prompt",
            np.zeros(len(source), bool),
            {"long_name": "whether the prompt's effects are computed"},
        ),
    }
    return xr.Dataset(variables, coordinates)


def shapes(sizes: Mapping[Hashable, int], edges: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of every variable that chunks write, from `sizes` by dimension."""
    return {
        name: tuple(sizes[dim] for dim in variable.dims)
        for name, variable in VARIABLES.items()
        if edges or not variable.optional
    }


def empty(sizes: Mapping[Hashable, int], edges: bool) -> dict[str, np.ndarray]:
    """Return arrays for what a chunk writes, of `sizes` by dimension, nothing in them yet."""
    return {
        name: np.zeros(shape, np.int16) if name == NON_FINITE else np.full(shape, np.nan, np.float32)
        for name, shape in shapes(sizes, edges).items()
    }


def in_memory(frame: xr.Dataset, edges: bool) -> xr.Dataset:
    """Return a frame with arrays for what chunks write."""
    arrays = empty(frame.sizes, edges)
    return frame.assign(
        {name: (VARIABLES[name].dims, array, VARIABLES[name].attributes) for name, array in arrays.items()}
    )
