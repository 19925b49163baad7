"""Records made prompts: the layouts that the field uses, and columns with names."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hydra_jax.errors import UserError, shown
from hydra_jax.text.prompt import Prompt, integer

COLUMNS = ("prompt", "answer", "foil", "source", "position", "id", "relation")
"""Keys of a record, and columns of a table, of which only the prompt is needed."""

TOKENS = "tokens"
REMEDY = 'a record is {"prompt": "..."} with optional "answer", "foil", "source", "position", "id" and "relation"'
LIKE = 0.8
"""The least likeness (difflib's ratio) of a misspelling to what was meant."""


def _known(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": record["known_id"],
        "prompt": record["prompt"],
        "answer": record["attribute"],
        "relation": record["relation_id"],
    }


def _counterfact_nested(record: Mapping[str, Any]) -> dict[str, Any]:
    rewrite = record["requested_rewrite"]
    return {
        "prompt": rewrite["prompt"].replace("{}", rewrite["subject"]),
        "answer": rewrite["target_true"]["str"],
        "foil": rewrite.get("target_new", {}).get("str", ""),
        "relation": rewrite["relation_id"],
        "id": record["case_id"],
    }


def _counterfact_flat(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": record.get("case_id"),
        "prompt": record["prompt"],
        "answer": record["ground_truth"],
        "foil": record.get("target_new", ""),
    }


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": ""} | {key: record[key] for key in (*COLUMNS, TOKENS) if key in record}


LAYOUTS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "known_id": _known,
    "requested_rewrite": _counterfact_nested,
    "ground_truth": _counterfact_flat,
    "prompt": _plain,
    TOKENS: _plain,
}
"""Readers of records by the first of these keys that a record has; each gives what COLUMNS name, and tokens."""


def prompt_of(record: Any, where: str, number: int) -> Prompt:
    """Return the prompt that a record stands for.

    Args:
      record: in one of the LAYOUTS.
      where: its place, for error messages.
      number: its id, if it has none of its own.

    Raises:
      UserError: if it lacks what it needs, or has a key that looks like a known one misspelled.
    """
    layout = next((key for key in LAYOUTS if isinstance(record, Mapping) and key in record), None)
    if layout is None or LAYOUTS[layout] is _plain:
        _check_keys(record, where)
    if layout is None:
        raise UserError(f"{where}: has no prompt; {REMEDY}")
    try:
        values = LAYOUTS[layout](record)
    except KeyError as error:
        raise UserError(f"{where}: has {layout} but no {error}; {REMEDY}") from error
    except (TypeError, AttributeError) as error:
        raise UserError(f"{where}: is malformed ({error}); {REMEDY}") from error
    values = {key: value for key, value in values.items() if key == "prompt" or not missing(value)}
    for key in ("prompt", "answer", "foil", "source", "relation"):
        if not isinstance(value := values.get(key, ""), str):
            raise UserError(f"{where}: {key} is {type(value).__name__}, not a string; {REMEDY}")
    return Prompt(
        id=str(_word(values.get("id", number), "id", where)),
        text=values["prompt"],
        answer=values.get("answer", "").rstrip(),
        relation=values.get("relation", ""),
        foil=values.get("foil", "").rstrip(),
        source=values.get("source", ""),
        position=None if values.get("position", "") == "" else _word(values["position"], "position", where),
        tokens=_ids(values, where),
    )


def check_columns(names: Sequence[Any], where: str) -> None:
    """Check the columns of a table of prompts.

    Args:
      names: of its columns.
      where: the table, for error messages.

    Raises:
      UserError: if one is unknown or occurs twice, or there is none of prompts.
    """
    for name in names:
        if name not in COLUMNS:
            near = _near(name, COLUMNS)
            meant = f"did you mean {near}? Known" if near else "known"
            raise UserError(f"{where}: column {shown(name)} is unknown; {meant} are {', '.join(COLUMNS)}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where}: column {twice[0]} occurs twice; give each once")
    if "prompt" not in names:
        raise UserError(f"{where}: has no column prompt; name the column of the texts so")


def missing(value: object) -> bool:
    """Return whether a value stands for none: None, or a NaN of any library."""
    return (
        value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    )


def _word(value: Any, key: str, where: str) -> int | str:
    """Return a string as it is, and a whole number as an int, which tables with gaps have as a float."""
    if isinstance(value, str):
        return value
    number = integer(int(value) if isinstance(value, float) and value.is_integer() else value)
    if number is None:
        raise UserError(f"{where}: {key} is {type(value).__name__}, not a string or a whole number; {REMEDY}")
    return number


def _ids(values: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """Return token ids; what a record with a text calls tokens may be something else, which is no matter."""
    given = values.get(TOKENS, ())
    listed = isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping)
    ids = [integer(token) for token in given] if listed else [None]
    found = tuple(token for token in ids if token is not None and token >= 0)
    if len(found) == len(ids):
        return found
    if values["prompt"].strip():
        return ()
    raise UserError(f"{where}: tokens are {shown(given)}, not a list of token ids; give ids from 0")


def _check_keys(record: Any, where: str) -> None:
    """Refuse a key that is unknown and like a known one that the record has not."""
    if not isinstance(record, Mapping):
        return
    absent = [key for key in COLUMNS if key not in record]
    for key in record:
        if key not in (*COLUMNS, TOKENS) and (near := _near(key, absent)):
            raise UserError(f'{where}: key {shown(key)} is unknown; did you mean "{near}"?')


def _near(name: object, known: Sequence[str]) -> str | None:
    """Return the known name that a name may be meant for; "answer_id" is a name of its own, "Answer" is not."""
    if not isinstance(name, str):
        return None
    word = name.strip().casefold()
    if word in known:
        return word
    if set(re.split(r"[\W_]+", word)) & set(known):
        return None
    longer = [other for other in known if other != "id"]  # which is like too much
    swapped = [other for other in longer if sorted(other) == sorted(word)]
    return next(iter(swapped or difflib.get_close_matches(word, longer, n=1, cutoff=LIKE)), None)
