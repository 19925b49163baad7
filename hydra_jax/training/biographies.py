"""Biographies of invented people: text to train on, and prompts whose answers it holds.

Everybody has a birthplace, an employer, a language and a field of study, and every biography says all
four, each in one of many templates. Some people and some templates occur in no biography: about such people
a model can only guess, and an answer in such a template completes a sentence that it has not seen.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import tomllib
from collections.abc import Iterator
from typing import Any

import numpy as np

from hydra_jax.errors import UserError
from hydra_jax.text.prompts import Prompt

ATTRIBUTES = ("birthplace", "employer", "language", "field")

SPLITS = {
    "trained": "people and templates of the training text",
    "unseen_template": "people of the training text, in templates that are not in it",
    "unseen_person": "people who are not in it: what guessing gets right",
}
"""The sets of recall prompts by name, and the people and templates that each asks about."""


@dataclasses.dataclass(frozen=True)
class Person:
    """An invented person.

    Attributes:
      name: first name and surname, which no two people share.
      facts: the value of each attribute.
    """

    name: str
    facts: dict[str, str]


@functools.cache
def _parts() -> dict[str, Any]:
    return tomllib.loads(
        importlib.resources.files("hydra_jax.training").joinpath("biographies.toml").read_text("utf-8")
    )


def _pick(random: np.random.Generator, choices: list[str]) -> str:
    return choices[int(random.integers(len(choices)))]


def _count_names() -> int:
    parts = _parts()
    return len(parts["first_names"]) * len(parts["surname_beginnings"]) * len(parts["surname_endings"])


def people(seed: int, count: int) -> list[Person]:
    """Return the first `count` people of a seed; a larger count adds people and changes none.

    Raises:
      UserError: if there are not enough names.
    """
    parts, most = _parts(), _count_names()
    if count > most:
        raise UserError(f"config.data.people: {count:,} with the unseen, there are names for {most:,}; give fewer")
    shape = tuple(len(parts[name]) for name in ("first_names", "surname_beginnings", "surname_endings"))
    name_numbers = np.random.default_rng(seed).permutation(most)[:count]
    everybody = []
    for number, name_number in enumerate(name_numbers):
        first, beginning, ending = (int(index) for index in np.unravel_index(name_number, shape))
        name = (
            f"{parts['first_names'][first]} {parts['surname_beginnings'][beginning]}{parts['surname_endings'][ending]}"
        )
        random = np.random.default_rng([seed, number])
        facts = {attribute: _pick(random, parts[attribute]["values"]) for attribute in ATTRIBUTES}
        everybody.append(Person(name, facts))
    return everybody


def biography(person: Person, random: np.random.Generator) -> str:
    """Write a biography of a person: the attributes in a random order, each in a random training template."""
    sentences = []
    for attribute in random.permutation(ATTRIBUTES):
        template = _pick(random, _parts()[attribute]["templates"])
        sentences.append(template.format(name=person.name, value=person.facts[attribute]))
    return " ".join(sentences)


def documents(seed: int, known: int, variants: int) -> Iterator[str]:
    """Yield `variants` biographies of each of the first `known` people, all first ones before any second one."""
    everybody = people(seed, known)
    for variant in range(variants):
        for number in np.random.default_rng([seed, variant]).permutation(known):
            yield biography(everybody[number], np.random.default_rng([seed, variant, int(number)]))


def recall_prompts(seed: int, known: int, unseen: int) -> dict[str, list[Prompt]]:
    """Return prompts with known answers by split (see SPLITS): one for each person and attribute, template at random.

    Args:
      seed: the people's seed.
      known: how many people the training text is about.
      unseen: how many more people to ask about.
    """
    everybody = people(seed, known + unseen)
    chosen = {
        "trained": (range(known), "templates"),
        "unseen_template": (range(known), "unseen"),
        "unseen_person": (range(known, known + unseen), "templates"),
    }
    return {
        split: [_prompt(seed, split, everybody[number], number, attribute, templates) for number in numbers
                for attribute in ATTRIBUTES]
        for split, (numbers, templates) in chosen.items()
    }  # fmt: skip


def _prompt(seed: int, split: str, person: Person, number: int, attribute: str, templates: str) -> Prompt:
    random = np.random.default_rng([seed, list(SPLITS).index(split), number, ATTRIBUTES.index(attribute)])
    before, _, _ = _pick(random, _parts()[attribute][templates]).partition(" {value}")
    text = before.format(name=person.name)
    return Prompt(f"{split}/{number}/{attribute}", text, person.facts[attribute], attribute)
