"""Prompts: the built-in facts, and readers for the files the field uses."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.resources
import json
import os
import re
import tomllib
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hydra_jax.errors import UserError

KINDS = ("records", "text")
CUTS = 512
"""The number of prompts that are cut from a text if no limit is given."""
MOST_BYTES = 1 << 27
"""Most bytes of a prompt file, unpacked: three times ROME's counterfact.json."""
WORDS = (8, 32)
"""The fewest and the most words of a prompt that is cut from text."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text that ends right before its answer.

    Attributes:
      id: unique in its set; randomness follows it.
      text: what the model reads.
      answer: what is right, without the space before it; "" where there is none.
      relation: the kind of fact; "" where it is not known.
    """

    id: str
    text: str
    answer: str = ""
    relation: str = ""

    @property
    def name(self) -> str:
        """The id as errors quote it, a long one cut."""
        return repr(self.id if len(self.id) <= 60 else f"{self.id[:57]}...")


def builtin() -> list[Prompt]:
    """Return the project's own facts, one template a relation (`facts.toml`)."""
    tables = tomllib.loads(importlib.resources.files("hydra_jax.text").joinpath("facts.toml").read_text("utf-8"))
    return [
        Prompt(f"{relation}/{subject}", table["template"].format(subject), answer, relation)
        for relation, table in tables.items()
        for subject, answer in table["facts"].items()
    ]


def as_prompts(texts: Iterable[str | Prompt]) -> list[Prompt]:
    """Return prompts of plain texts; each text is its own id.

    Raises:
      UserError: if one is empty or occurs twice.
    """
    if isinstance(texts, str):
        raise UserError("prompts: is one text; give a list of texts")
    return _checked([p if isinstance(p, Prompt) else Prompt(p, p) for p in texts], "prompts")


def read(path: str, kind: str = "records", limit: int = 0, seed: int = 0) -> list[Prompt]:
    """Read the prompts of a file, or the built-in ones for "".

    From a file of kind "text", `limit` prompts (or CUTS) are cut at random, see `cut`. Of records, all
    are read, and the layout is recognised: ROME's `known_1000.json`; CounterFact nested (ROME) or flat (one object a
    fact); JSON lines with `prompt` and optional `answer`, `id` and `relation`. Each may be gzipped.

    Raises:
      UserError: if the file is missing, empty, not UTF-8, not JSON, or a record lacks what it needs.
    """
    if not path:
        return builtin()
    text = read_text(Path(os.path.expanduser(path)))
    if kind == "text":
        return _checked(cut(text, path, limit or CUTS, seed), path)
    records = _array(text, path) if text.lstrip().startswith("[") else _lines(text, path)
    if not records:
        raise UserError(f"{path}: has no prompts; give at least one")
    return _checked([_prompt(record, where, number) for number, (where, record) in enumerate(records)], path)


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


def content_hash(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 (hex) of a set of prompts, whatever their order."""
    rows = sorted(json.dumps(dataclasses.astuple(prompt)) for prompt in prompts)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def json_lines(prompts: Iterable[Prompt]) -> str:
    """Return prompts as the text of a file that `read` reads."""
    records = (
        {"id": prompt.id, "prompt": prompt.text, "answer": prompt.answer, "relation": prompt.relation}
        for prompt in prompts
    )
    return "".join(json.dumps(record) + "\n" for record in records)


def read_text(path: Path) -> str:
    """Read a UTF-8 file's text, unpacked if its name ends in .gz.

    Raises:
      UserError: if it cannot be read, is a damaged gzip file, has more than MOST_BYTES, or is not UTF-8.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: is not a whole gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a file that can be read") from error
    except ValueError as error:  # of a path with a NUL byte
        raise UserError(f"{str(path)!r}: is not a path ({error}); give a file that can be read") from error
    if len(data) > MOST_BYTES:
        raise UserError(f"{path}: has more than {MOST_BYTES >> 20} MiB of text; give a part of it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8 ({error.reason}); save it as UTF-8") from error


def _array(text: str, path: str) -> list[tuple[str, Any]]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise UserError(f"{path}:{line}: is not JSON ({getattr(error, 'msg', error)}); mend the line") from error
    return [(f"{path}: record {number}", record) for number, record in enumerate(records, 1)]


def _lines(text: str, path: str) -> list[tuple[str, Any]]:
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            records.append((where, json.loads(line)))
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise UserError(f'{where}: is not JSON ({reason}); a line is {{"prompt": "..."}}') from error
    return records


def _known(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["known_id"], record["prompt"], record["attribute"], record["relation_id"]


def _counterfact_nested(record: dict[str, Any]) -> tuple[Any, ...]:
    rewrite = record["requested_rewrite"]
    text = rewrite["prompt"].replace("{}", rewrite["subject"])
    return record["case_id"], text, rewrite["target_true"]["str"], rewrite["relation_id"]


def _counterfact_flat(record: dict[str, Any]) -> tuple[Any, ...]:
    return record.get("case_id"), record["prompt"], record["ground_truth"], ""


def _plain(record: dict[str, Any]) -> tuple[Any, ...]:
    return record.get("id"), record["prompt"], record.get("answer", ""), record.get("relation", "")


LAYOUTS: dict[str, Callable[[dict[str, Any]], tuple[Any, ...]]] = {
    "known_id": _known,
    "requested_rewrite": _counterfact_nested,
    "ground_truth": _counterfact_flat,
    "prompt": _plain,
}
"""Readers of records by the first of these keys that a record has; each gives id, text, answer and relation."""


def _prompt(record: Any, where: str, number: int) -> Prompt:
    remedy = 'a record is {"prompt": "..."} with optional "answer", "id" and "relation"'
    layout = next((key for key in LAYOUTS if isinstance(record, dict) and key in record), None)
    if layout is None:
        raise UserError(f"{where}: has no prompt; {remedy}")
    try:
        identity, text, answer, relation = LAYOUTS[layout](record)
    except KeyError as error:
        raise UserError(f"{where}: has {layout} but no {error}; {remedy}") from error
    except (TypeError, AttributeError) as error:
        raise UserError(f"{where}: is malformed ({error}); {remedy}") from error
    for name, value in (("prompt", text), ("answer", answer), ("relation", relation)):
        if not isinstance(value, str):
            raise UserError(f"{where}: {name} is {type(value).__name__}, not a string; {remedy}")
    if not isinstance(identity, str | int | None):
        raise UserError(f"{where}: id is {type(identity).__name__}, not a string or a number; {remedy}")
    return Prompt(str(number if identity is None else identity), text.rstrip(), answer.strip(), relation)


def _checked(prompts: list[Prompt], where: str) -> list[Prompt]:
    seen: set[str] = set()
    for prompt in prompts:
        if not prompt.text.strip():
            raise UserError(f"{where}: prompt {prompt.name} is empty; remove it or write its text")
        try:
            f"{prompt.id}{prompt.text}{prompt.answer}{prompt.relation}".encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: prompt {prompt.id!r} is not Unicode ({error.reason}); mend its text") from error
        if prompt.id in seen:
            raise UserError(f"{where}: id {prompt.name} occurs twice; give each prompt an id of its own")
        seen.add(prompt.id)
    return prompts
