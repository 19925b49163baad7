"""Prompts as callers have them: texts, records, token ids, and the tables and arrays of other libraries."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from hydra_jax.errors import UserError, shown
from hydra_jax.text.prompt import Prompt, integer, of_tokens
from hydra_jax.text.records import check_columns, missing, prompt_of

BYTES = bytes | bytearray | memoryview
"""Types whose elements are whole numbers, but no token ids."""

TAKEN = (
    'give a text, a Prompt, a record as in {"prompt": "..."}, token ids, a pathlib.Path, a list of such prompts, or a'
    " DataFrame"
)


def prompts(given: Any) -> list[Prompt]:
    """Return the prompts that a value stands for, unchecked, in its order.

    Raises:
      UserError: if it is of no kind that is taken, or one of its elements is not.
    """
    one = _one(given, "prompts", 0)
    if one is not None:
        return [one]
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(given, pandas.DataFrame):
        return _frame(given)
    if pandas is not None and isinstance(given, pandas.Series):
        if "prompt" in given.index:  # a row of a DataFrame
            raise UserError("prompts: is a Series with an entry 'prompt'; give it as a record, with .to_dict()")
        if given.dtype.kind not in "OUT" and not isinstance(given.dtype, pandas.CategoricalDtype | pandas.StringDtype):
            raise UserError(f"prompts: is a Series of {given.dtype}; give one of texts")
        elements = given.tolist()
    elif _is_array(given):
        elements = list(_array(given))
    elif hasattr(given, "columns"):  # whose iteration yields columns
        raise UserError(f"prompts: is {_kind(given)}; give it as a pandas DataFrame, or as a list of its rows")
    elif isinstance(given, Iterable) and not isinstance(given, BYTES | io.IOBase):
        elements = list(given)
    else:
        raise UserError(f"prompts: is {_said(given)}; {TAKEN}")
    if elements and all(integer(element) is not None for element in elements):
        if isinstance(given, Set):
            raise UserError("prompts: is a set of numbers, which has no order; give token ids as a list")
        return [of_tokens([int(element) for element in elements])]
    return [_element(element, f"prompts[{number}]", number) for number, element in enumerate(elements)]


def _element(element: Any, where: str, number: int) -> Prompt:
    found = _one(element, where, number)
    if found is not None:
        return found
    tokens = _tokens(element)
    if tokens is None:
        what = "missing" if missing(element) else _said(element)
        raise UserError(f"{where}: is {what}; give each as a text, a Prompt, a record or token ids")
    if not tokens:
        raise UserError(f"{where}: has no tokens; remove it or give it some")
    return of_tokens(tokens)


def _one(given: Any, where: str, number: int) -> Prompt | None:
    """Return a prompt that is a text, a Prompt or a record; None for anything else."""
    if isinstance(given, Prompt):
        return given
    if isinstance(given, str):
        return Prompt(str(given), str(given))
    if isinstance(given, Mapping):
        return prompt_of(given, where, number)
    return None


def _frame(frame: Any) -> list[Prompt]:
    """Return the prompts of a DataFrame's rows; its index is no part of them."""
    names = list(frame.columns)
    check_columns(names, "prompts")
    columns = [frame[name].tolist() for name in names]
    found = []
    for number, row in enumerate(zip(*columns, strict=True)):
        values = {name: value for name, value in zip(names, row, strict=True) if not missing(value)}
        found.append(prompt_of({"prompt": ""} | values, f"prompts.iloc[{number}]", number))
    return found


def _is_array(given: Any) -> bool:
    """Return whether a value is an array of numpy, JAX or torch."""
    return all(hasattr(given, name) for name in ("dtype", "shape", "ndim", "__array__"))


def _array(given: Any) -> np.ndarray:
    """Return an array of texts [P], of token ids [T] or [P, T], or of elements [P] to look at one by one."""
    array = np.asarray(given)
    if array.ndim == 0 or array.dtype.kind not in "iuUOT" or (array.ndim > 1 and array.dtype.kind not in "iu"):
        raise UserError(f"prompts: is an array of {array.dtype} of shape {array.shape}; {TAKEN}")
    return array


def _tokens(element: Any) -> list[int] | None:
    """Return an element's token ids; None if it is no sequence of whole numbers."""
    if _is_array(element) and element.ndim == 1:
        array = np.asarray(element)
        return array.tolist() if array.dtype.kind in "iu" else None
    if not isinstance(element, Sequence) or isinstance(element, str | BYTES):
        return None
    ids = [integer(token) for token in element]
    found = [token for token in ids if token is not None]
    return found if len(found) == len(ids) else None


def _kind(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.split('.')[0]}.{kind.__qualname__}"


def _said(value: Any) -> str:
    return f"{_kind(value)} {shown(value)}"
