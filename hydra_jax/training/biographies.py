"""Biographies of invented people: text to train on, and prompts whose answers it holds.

Everybody has a birthplace, an employer, a language and a field of study, and every biography says all
four, each in one of many templates. Some people are in no biography and some templates in none either:
what a model answers about the first is guessed, and what it answers in the second is not a sentence it
has seen.
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
"""Of recall prompts, and who and what they are about."""


@dataclasses.dataclass(frozen=True)
class Person:
    """Somebody invented.

    Attributes:
      name: first name and surname, nobody else's.
      facts: the value of each attribute.
    """

    name: str
    facts: dict[str, str]


@functools.cache
def _parts() -> dict[str, Any]:
    return tomllib.loads(
        importlib.resources.files("hydra_jax.training").joinpath("biographies.toml").read_text("utf-8")
    )


def _pick(random: np.random.Generator, among: list[str]) -> str:
    return among[int(random.integers(len(among)))]


def _names() -> int:
    parts = _parts()
    return len(parts["first_names"]) * len(parts["surname_beginnings"]) * len(parts["surname_endings"])


def people(seed: int, count: int) -> list[Person]:
    """The first `count` people of a seed: more of them are the same and some more.

    Raises:
      UserError: if there are not so many names.
    """
    parts = _parts()
    if count > _names():
        raise UserError(f"config.data.people: {count:,} with the unseen, there are names for {_names():,}; give fewer")
    shape = tuple(len(parts[name]) for name in ("first_names", "surname_beginnings", "surname_endings"))
    places = np.random.default_rng(seed).permutation(_names())[:count]
    found = []
    for number, place in enumerate(places):
        first, beginning, ending = (int(index) for index in np.unravel_index(place, shape))
        name = (
            f"{parts['first_names'][first]} {parts['surname_beginnings'][beginning]}{parts['surname_endings'][ending]}"
        )
        random = np.random.default_rng([seed, number])
        facts = {attribute: _pick(random, parts[attribute]["values"]) for attribute in ATTRIBUTES}
        found.append(Person(name, facts))
    return found


def biography(person: Person, random: np.random.Generator) -> str:
    """One of a person's biographies: the attributes in a random order, each in a random training template."""
    sentences = []
    for attribute in random.permutation(ATTRIBUTES):
        template = _pick(random, _parts()[attribute]["templates"])
        sentences.append(template.format(name=person.name, value=person.facts[attribute]))
    return " ".join(sentences)


def documents(seed: int, known: int, variants: int) -> Iterator[str]:
    """`variants` biographies of each of the first `known` people, everybody's first one before anybody's second."""
    everybody = people(seed, known)
    for variant in range(variants):
        for number in np.random.default_rng([seed, variant]).permutation(known):
            yield biography(everybody[number], np.random.default_rng([seed, variant, int(number)]))


def recall_prompts(seed: int, known: int, unseen: int) -> dict[str, list[Prompt]]:
    """Prompts with known answers by split (see SPLITS), a prompt a person and attribute, in a random template.

    Args:
      seed: of the people.
      known: how many of them are in the training text.
      unseen: how many more are not.
    """
    everybody = people(seed, known + unseen)
    chosen = {
        "trained": (range(known), "templates"),
        "unseen_template": (range(known), "unseen"),
        "unseen_person": (range(known, known + unseen), "templates"),
    }
    return {
        split: [_prompt(seed, split, everybody[number], number, attribute, which) for number in numbers
                for attribute in ATTRIBUTES]
        for split, (numbers, which) in chosen.items()
    }  # fmt: skip


def _prompt(seed: int, split: str, person: Person, number: int, attribute: str, which: str) -> Prompt:
    random = np.random.default_rng([seed, list(SPLITS).index(split), number, ATTRIBUTES.index(attribute)])
    before, _, _ = _pick(random, _parts()[attribute][which]).partition(" {value}")
    text = before.format(name=person.name)
    return Prompt(f"{split}/{number}/{attribute}", text, person.facts[attribute], attribute)
