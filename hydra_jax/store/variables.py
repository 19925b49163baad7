"""The variables and coordinates of a result store, and arrays and frames of their shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from hydra_jax.config import CASCADE, EDGES, FREE, HEADS
from hydra_jax.core.edits import SET, SITES, WHOLE, Ablation, Component, all_components

LOGITS = "logits"
NATS = "nats"

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
      option: the option under which it is there; "" for always.
    """

    meaning: str
    dims: tuple[str, ...]
    units: str = LOGITS
    dtype: str = "float32"
    clean: bool = False
    option: str = ""

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes that xarray shows."""
        return ({"units": self.units} if self.units else {}) | {"long_name": self.meaning}

    @property
    def missing(self) -> float | int:
        """The value that stands where nothing was written yet."""
        return NOTHING if self.dtype == "int16" else np.nan


NOTHING = -2
"""The integer that stands where nothing was written yet."""

CUT_LABELS = "cut_name", "survived"
"""The variables that make cascades readable for people, in memory alone: see `analysis.cascades.labelled`."""

NO_CUT = -1
"""The component of a cut that was not made, as nothing repaired any more."""

_REPLACED = ("prompt", "ablated", "replacement")
_ANSWERED = ("prompt", "ablated", "component")
_CUT = ("prompt", "cut", "replacement")
METRICS = {
    "log_probability": ("log_probability_drop", "drop of the target's log-probability", NATS),
    "kl": ("kl", "KL(clean run || ablated run) of the next token", NATS),
    "rank": ("target_rank", "number of tokens that are more likely than the target in the ablated run", ""),
    "top_changed": ("top_changed", "whether another token is the most likely one: 1, else 0", ""),
}
"""The readings of the whole distribution: of each the variable, its meaning and its units."""

VARIABLES = {
    "clean_logit": Variable("centred logit of the target, with a foil less the foil's", ("prompt",), clean=True),
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
    "free_total_effect": Variable("the total effect with nothing frozen", _REPLACED, option=FREE),
    **{name: Variable(meaning, _REPLACED, units, option=key) for key, (name, meaning, units) in METRICS.items()},
    "compensation": Variable("change of a component's contribution, mean over replacements", _ANSWERED),
    "direct_edge": Variable("the same where it alone sees the edit, all between frozen", _ANSWERED, option=EDGES),
    "head_compensation": Variable(
        "change of a head's contribution, mean over replacements",
        ("prompt", "ablated", "attn_layer", "head"),
        option=HEADS,
    ),
    "cut_component": Variable(
        "the component that is ablated at a step beside those before it; -1: nothing repaired any more",
        ("prompt", "cut"),
        units="",
        dtype="int16",
        option=CASCADE,
    ),
    "cut_logit": Variable("centred logit of the target after a cut", _CUT, option=CASCADE),
    "cut_probability": Variable("probability of the target after a cut", _CUT, units="", option=CASCADE),
    "cut_rank": Variable("number of tokens that are more likely than it", _CUT, units="", option=CASCADE),
    "cut_compensation": Variable(
        "change of a component's contribution after a cut, mean over replacements",
        ("prompt", "cut", "component"),
        option=CASCADE,
    ),
    NON_FINITE: Variable(
        "replacements whose values are not finite, and left out", ("prompt", "ablated"), units="", dtype="int16"
    ),
}
"""Everything that chunks write, in the order of the store."""

EFFECTS = tuple(name for name, variable in VARIABLES.items() if variable.dims == _REPLACED and not variable.option)
"""The effects that every store has, with a value for each replacement."""

CLEAN = tuple(name for name, variable in VARIABLES.items() if variable.clean)
"""The variables of the clean run."""

FILLED = (*VARIABLES, "finished")
"""The variables that are written chunk by chunk."""

TEXT = {
    "prompt_id",
    "text",
    "relation",
    "answer_text",
    "target_text",
    "foil_text",
    "token_text",
    "text_id",
    "source_text",
}
"""The columns of prompts that are text."""


def labels(dim: str, components: Sequence[Component], prefix: str = "") -> dict[str, Any]:
    """Return the coordinates `layer` and `site` along `dim`, their names prefixed."""
    # Fixed-width strings have no place in zarr's specification; objects become variable-length ones.
    sites = np.array([SITES[c.site] for c in components], dtype=object)
    return {f"{prefix}layer": (dim, np.array([c.layer for c in components])), f"{prefix}site": (dim, sites)}


def ablated_labels(ablations: Sequence[Ablation]) -> dict[str, Any]:
    """Return the coordinates along `ablated`: names and, of a single component, its layer, site and head.

    Several components have the site SET, and the layer of the first of them.
    """
    singles = [ablation.single for ablation in ablations]
    sites = [SET if one is None else SITES[one.site] for one in singles]
    return {
        "ablated_name": ("ablated", np.array([str(ablation) for ablation in ablations], dtype=object)),
        "ablated_layer": ("ablated", np.array([ablation.components[0].layer for ablation in ablations], int)),
        "ablated_site": ("ablated", np.array(sites, dtype=object)),
        "ablated_head": ("ablated", np.array([WHOLE if one is None else one.head for one in singles], int)),
    }


def frame(
    prompts: Mapping[str, Sequence[Any]], ablations: Sequence[Ablation], layers: int, source: np.ndarray
) -> xr.Dataset:
    """Return a dataset with every coordinate, and what is known before anything is computed.

    Args:
      prompts: columns of P values: `prompt_id`, `text`, `relation`, `answer_text`, `target_id`, `target_text`,
        `length`, and where there are any `foil_id`, `foil_text`, `position`, `token_text`, `text_id`, `source_text`.
      ablations: those to be made.
      layers: L; the components that respond are all 2L.
      source: [P, R], the position in this dataset of each replacement's prompt; -1 where there is none.
    """
    coordinates = {
        name: ("prompt", np.asarray(values, dtype=object if name in TEXT else np.int64))
        for name, values in prompts.items()
    }
    coordinates |= {**ablated_labels(ablations), **labels("component", all_components(layers))}
    variables = {
        "source": (("prompt", "replacement"), source, {"long_name": "position of the replacement's prompt; -1: none"}),
        "finished": (
            "prompt",
            np.zeros(len(source), bool),
            {"long_name": "whether the prompt's effects are computed"},
        ),
    }
    return xr.Dataset(variables, coordinates)


def shapes(sizes: Mapping[Hashable, int], options: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every variable that chunks write.

    Args:
      sizes: by dimension.
      options: EDGES, FREE, HEADS, CASCADE and keys of METRICS, as they are asked for.
    """
    return {
        name: tuple(sizes[dim] for dim in variable.dims)
        for name, variable in VARIABLES.items()
        if not variable.option or variable.option in options
    }


def empty(sizes: Mapping[Hashable, int], options: Collection[str]) -> dict[str, np.ndarray]:
    """Return arrays for what a chunk writes, nothing in them yet; for arguments see `shapes`."""
    return {
        name: np.full(shape, VARIABLES[name].missing, VARIABLES[name].dtype)
        for name, shape in shapes(sizes, options).items()
    }


def in_memory(frame: xr.Dataset, sizes: Mapping[Hashable, int], options: Collection[str]) -> xr.Dataset:
    """Return a frame with arrays for what chunks write; for arguments see `shapes`."""
    arrays = empty(sizes, options)
    return frame.assign(
        {name: (VARIABLES[name].dims, array, VARIABLES[name].attributes) for name, array in arrays.items()}
    )
