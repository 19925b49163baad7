"""Arguments of the Python interface, in every form that they may be given in, as the settings and inputs of a sweep."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from hydra_jax.config import GIVEN
from hydra_jax.core.edits import SITES, WHOLE, Component
from hydra_jax.core.programs import known
from hydra_jax.errors import UserError, shown
from hydra_jax.text import prompts as prompt_sets
from hydra_jax.text.prompts import Prompt
from hydra_jax.weights.model import Model

Names = str | Component | Sequence[Any] | None
"""Components by name; a list in a list is ablated together."""

Token = str | int | Sequence[str | int] | None
"""A token to read: a word, its text, its id, or a list with one for each prompt."""


def as_setting(argument: str, names: Any) -> str:
    """Return names as the text of a setting: separated by commas, those of a list in the list joined by "+".

    Raises:
      UserError: if they are of another form.
    """
    if names is None:
        return ""
    if isinstance(names, str | Component):
        return _name(argument, names)
    if not isinstance(names, Sequence | set | frozenset):
        raise UserError(f"{argument}: is {shown(names)}; give names, or a list of them")
    return ", ".join(_joined(argument, one) for one in names)


def ablation_settings(
    kind: str, replacements: int, freeze: Names, paired: Any, match: str, **more: Any
) -> dict[str, Any]:
    """Return the settings of ablations that all questions have, and `more` of them."""
    drawn = {"kind": kind, "replacements": replacements, "paired": is_paired(paired), "match": match}
    return {**drawn, "freeze": as_setting("freeze", freeze), **more}


def components_setting(names: Names) -> str:
    """Return what is to be ablated as the text of a setting, "" for None; for errors see `as_setting`."""
    text = as_setting("components", names)
    if names is not None and not text.strip():
        raise UserError("components: are none; give names, or None for all that sites and layers say")
    return text


def _joined(argument: str, names: Any) -> str:
    if isinstance(names, str | Component):
        return _name(argument, names)
    if isinstance(names, Sequence) and names and all(isinstance(one, str | Component) for one in names):
        named = [_name(argument, one) for one in names]
        if several := [name for name in named if "," in name]:
            raise UserError(f"{argument}: {shown(several[0])} is several names; give each by itself in the list")
        return " + ".join(named)
    raise UserError(f"{argument}: {shown(names)} is no name, nor a list of names; give e.g. 'attn 23'")


def _name(argument: str, name: str | Component) -> str:
    if isinstance(name, Component) and name.site not in range(len(SITES)):
        raise UserError(f"{argument}: a component has site {name.site}; give 0 for attention or 1 for an MLP")
    if isinstance(name, str) and not name.strip():
        raise UserError(f"{argument}: a name is empty; give e.g. 'attn 23'")
    return str(name)


def component(model: Model, site: Names, layer: int | None, head: int | None) -> Names:
    """Return the component that `ablate` is asked for by its parts, one of the model's; else the names as they are.

    Raises:
      UserError: if the parts do not fit together.
    """
    if not isinstance(site, str | Component | Sequence):
        raise UserError(f"site: {shown(site)} is no name of components; give e.g. 'attn 23', or a list of names")
    if layer is None and head is None:
        return known(model.config, site) if isinstance(site, str) and site in SITES else site
    if not isinstance(site, str):
        raise UserError(f"site {shown(site)}: says the layer itself; give it alone, or 'attn' or 'mlp'")
    if layer is None:
        found = Component.parse(site)
        if found.head != WHOLE:
            raise UserError(f"component {site!r}: names a head, and so does head={head}; give one of the two")
    elif site in SITES:
        found = Component(layer, SITES.index(site))
    else:
        raise UserError(
            f"site {shown(site)}: is not attn or mlp; give one of the two, or e.g. 'attn 23' without a layer"
        )
    return known(model.config, found if head is None else dataclasses.replace(found, head=head))


def several(prompts: Any) -> tuple[list[Prompt], str]:
    """Return the prompts that are given, and a few words on where they are from."""
    if prompts is None:
        return prompt_sets.builtin(), "built-in facts"
    found = prompt_sets.as_prompts(prompts)
    if not found:
        raise UserError("prompts: there are none; give one or more")
    return found, GIVEN


def one(prompt: Any) -> list[Prompt]:
    """Return the one prompt that is given.

    Raises:
      UserError: if it is not one.
    """
    found = prompt_sets.as_prompts(prompt)
    if len(found) != 1:
        raise UserError(f"prompt: is {len(found)} prompts; give one, or sweep them")
    return found


def distinct(sources: Any) -> list[Prompt]:
    """Return the prompts that are given to draw from; texts that occur twice, once."""
    if (
        isinstance(sources, Sequence)
        and all(isinstance(source, str) for source in sources)
        and not isinstance(sources, str)
    ):
        sources = list(dict.fromkeys(sources))
    try:
        found = prompt_sets.as_prompts(sources)
    except UserError as error:
        raise UserError(re.sub("^prompts", "sources", str(error))) from error
    if not found:
        raise UserError("sources: there are none; give one or more, or None for the prompts themselves")
    return found


def is_paired(paired: Any) -> bool:
    """Return whether prompts are paired with counterfactuals: their own, or those that are given."""
    return bool(paired) if isinstance(paired, bool | np.bool_) else True


def with_sources(prompts: Sequence[Prompt], paired: bool | Sequence[str]) -> list[Prompt]:
    """Return prompts with the counterfactual texts that they are paired with, where those are given.

    Raises:
      UserError: if there is not one for each.
    """
    if isinstance(paired, bool | np.bool_):
        return list(prompts)
    if isinstance(paired, np.ndarray):
        paired = paired.tolist()
    if isinstance(paired, str) or not isinstance(paired, Sequence) or len(paired) != len(prompts):
        given = (
            f"{len(paired)} texts" if isinstance(paired, Sequence) and not isinstance(paired, str) else shown(paired)
        )
        raise UserError(f"paired: is {given} for {len(prompts)} prompts; give a text for each, or True for their own")
    if wrong := [text for text in paired if not isinstance(text, str)]:
        raise UserError(f"paired: {shown(wrong[0])} is no text; give a text for each prompt")
    return [dataclasses.replace(prompt, source=text) for prompt, text in zip(prompts, paired, strict=True)]
