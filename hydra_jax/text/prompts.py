"""Prompts: whatever a caller has, made a set of them; the files that the field uses, read; text, cut."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from hydra_jax.errors import UserError
from hydra_jax.text import files, given
from hydra_jax.text.builtin import PREFIX, builtin
from hydra_jax.text.files import read_text
from hydra_jax.text.prompt import Prompt, checked, content_hash, json_lines
from hydra_jax.text.records import prompt_of

__all__ = ["Prompt", "as_prompts", "builtin", "content_hash", "cut", "json_lines", "read", "read_text"]

KINDS = ("records", "text")
CUTS = 512
"""The number of prompts that are cut from a text if no limit is given."""
WORDS = (8, 32)
"""The fewest and the most words of a prompt that is cut from text."""


def as_prompts(prompts: Any) -> list[Prompt]:
    """Return the prompts that are given, in any form that has one meaning, in their order.

    Args:
      prompts: one prompt: a text (which is its id as well), a Prompt, a record as in files, or token ids; or an
        iterable of those, a pandas Series of texts, a DataFrame or a `datasets` table whose columns are those of a
        record; or a `pathlib.Path`, which is read. Records without an id have their number for it, as in files.

    Raises:
      UserError: if it is anything else; or if a prompt is empty, malformed, or has the id of another.
    """
    if isinstance(prompts, os.PathLike):
        return read(os.fspath(prompts))
    return checked(given.prompts(prompts), "prompts")


def read(path: str | os.PathLike[str], kind: str = "records", limit: int = 0, seed: int = 0) -> list[Prompt]:
    """Read the prompts of a file, or a built-in set: "builtin:ioi", say, or "" for the facts.

    From a file of kind "text", `limit` prompts (or CUTS) are cut at random, see `cut`. Of records, all
    are read, and the layout is recognised: ROME's `known_1000.json`; CounterFact nested (ROME) or flat (one object a
    fact), whose new targets are the foils; JSON lines with `prompt` and optional `answer`, `foil`, `source`,
    `position`, `id` and `relation`; CSV, with a header, and Parquet of these columns. Each but Parquet may be gzipped.
    A position that is a number in CSV is an index.

    Raises:
      UserError: if the file is missing, empty, not UTF-8, not of its format, or a record lacks what it needs.
    """
    path = os.fspath(path)
    if not path or path.startswith(PREFIX):
        return builtin(path.removeprefix(PREFIX)) if path else builtin()
    file = Path(os.path.expanduser(path))
    if kind == "text":
        return checked(cut(read_text(file), path, limit or CUTS, seed), path)
    records = files.records(file)
    if not records:
        raise UserError(f"{path}: has no prompts; give at least one")
    return checked([prompt_of(record, where, number) for number, (where, record) in enumerate(records)], path)


def cut(text: str, where: str, count: int, seed: int) -> list[Prompt]:
    """Cut prompts from ordinary text: each is some words before a random position, the next word its answer.

    Args:
      text: to cut from.
      where: its name, for error messages.
      count: how many, at different positions.
      seed: of the positions and of how many words (uniform within WORDS) come before each.

    Raises:
      UserError: if the text is too short for as many.
    """
    words = [match.span() for match in re.finditer(r"\S+", text)]
    positions = range(WORDS[1], len(words))
    if len(positions) < count:
        raise UserError(
            f"{where}: has {len(words):,} words, too few to cut {count:,} prompts from; give a longer text or lower"
            " prompts.limit"
        )
    random = np.random.default_rng(seed)
    prompts = []
    for position in sorted(random.choice(positions, count, replace=False)):
        before = int(random.integers(WORDS[0], WORDS[1], endpoint=True))
        start, end = words[position - before][0], words[position - 1][1]
        prompts.append(Prompt(f"character {end}", text[start:end], text[slice(*words[position])], "text"))
    return prompts
