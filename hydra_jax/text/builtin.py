"""Sets of prompts that come with the package, of its own words: facts, and two tasks with counterfactual texts."""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

from hydra_jax.errors import UserError, shown
from hydra_jax.text.prompt import Prompt

PREFIX = "builtin:"
"""Stands before the name of a set where a path could be."""

PAIRS = 10
"""Pairs of names that a template of `ioi` is written with, each in both orders."""

ENDINGS = range(22, 78)
"""Last two digits of the first year in `greater_than`."""
CENTURIES = range(11, 19)
TIMES = 4
"""Each ending occurs so often, every time in another template."""
YEARS_APART = 20
"""The answer is so many years later, the foil earlier: another first digit, for tokenizers that have digits alone."""


def builtin(name: str = "facts") -> list[Prompt]:
    """Return a set of prompts that comes with the package.

    Args:
      name: "facts", one template a relation; "ioi", indirect objects, whose `source` gives the other name again, so
        that the answer is the foil; "ioi_abc", the same with a third name there; or "greater_than", years after a
        year, whose `source` begins in the year 01 of the century. Answers, foils and sources are there but for facts,
        which have answers alone.

    Raises:
      UserError: if there is no set of this name.
    """
    if name not in SETS:
        near = difflib.get_close_matches(str(name), SETS, n=1)
        meant = f"did you mean {near[0]}? There are" if near else "there are"
        raise UserError(f"{PREFIX}{str(name)[:100]}: {shown(name)} is no built-in set; {meant} {', '.join(SETS)}")
    return list(SETS[name]())


def _table(name: str) -> dict[str, Any]:
    return tomllib.loads(importlib.resources.files("hydra_jax.text").joinpath(name).read_text("utf-8"))


def _facts() -> Iterator[Prompt]:
    for relation, table in _table("facts.toml").items():
        for subject, answer in table["facts"].items():
            yield Prompt(f"{relation}/{subject}", table["template"].format(subject), answer, relation)


def _ioi(third: bool) -> Iterator[Prompt]:
    """Yield prompts in which each name is given to, and gives, equally often.

    Args:
      third: whether the source names a third person where the prompt names the giver again; else the other one.
    """
    table = _table("ioi.toml")
    names, templates = table["names"], table["templates"]
    for place, (template, parts) in enumerate(templates.items()):
        for number in range(PAIRS):
            turn, first = divmod(place * PAIRS + number, len(names))
            step = 7 + 2 * turn
            receiver, giver, other = (names[(first + by) % len(names)] for by in (0, step, step + 12))
            for order, pair in (("ABBA", (receiver, giver)), ("BABA", (giver, receiver))):
                written = functools.partial(
                    parts["text"].format,
                    first=pair[0],
                    second=pair[1],
                    place=parts["places"][number % len(parts["places"])],
                    object=parts["objects"][number % len(parts["objects"])],
                )
                yield Prompt(
                    id=f"ioi/{template}/{order}/{number}",
                    text=written(subject=giver),
                    answer=receiver,
                    relation=order,
                    foil=giver,
                    source=written(subject=other if third else receiver),
                )


def _greater_than() -> Iterator[Prompt]:
    templates = list(_table("greater_than.toml").items())
    for number, ending in enumerate(ENDINGS):
        for time in range(TIMES):
            name, template = templates[(number + 3 * time) % len(templates)]
            century = CENTURIES[(number + number // len(CENTURIES) + 2 * time) % len(CENTURIES)]
            yield Prompt(
                id=f"greater_than/{name}/{century}{ending}",
                text=template.format(year=f"{century}{ending}", century=century),
                answer=f"{ending + YEARS_APART:02}",
                relation=name,
                foil=f"{ending - YEARS_APART:02}",
                source=template.format(year=f"{century}01", century=century),
            )


SETS: dict[str, Callable[[], Iterator[Prompt]]] = {
    "facts": _facts,
    "ioi": functools.partial(_ioi, third=False),
    "ioi_abc": functools.partial(_ioi, third=True),
    "greater_than": _greater_than,
}
"""Makers of the sets by their names."""
