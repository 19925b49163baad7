"""Settings read into dataclasses, and the differences between two trees of them."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import typing
from collections.abc import Mapping
from typing import Any

from hydra_jax.errors import UserError, shown


def parse(kind: type, given: Any, where: str) -> Any:
    """Return a dataclass made of a mapping of the same shape, nested ones as well.

    Args:
      kind: the dataclass.
      given: its values, some left out.
      where: their name in error messages.

    Raises:
      UserError: if a key is unknown, or a value is of the wrong type or (says the dataclass) out of range.
    """
    if not isinstance(given, Mapping) and not hasattr(given, "items"):
        raise UserError(f"{where}: is {shown(given)}; it has settings of its own, as in --{where}.KEY=VALUE")
    types = typing.get_type_hints(kind)
    values = {}
    for key, value in given.items():
        if key not in types:
            raise UserError(f"{where}.{key[:100]}: is not a setting; {_suggest(key, list(types))}")
        wanted = types[key]
        if dataclasses.is_dataclass(wanted):
            values[key] = parse(typing.cast(type, wanted), value, f"{where}.{key}")
        elif issubclass(wanted, enum.StrEnum) and isinstance(value, str):
            values[key] = wanted(one_of(f"{where}.{key}".removeprefix("config."), value, tuple(wanted)))
        elif wanted is float and isinstance(value, int) and not isinstance(value, bool):
            values[key] = float(value)
        elif type(value) is wanted:
            values[key] = value
        else:
            raise UserError(f"{where}.{key}: {shown(value)} is not of type {wanted.__name__}; give one that is")
    return kind(**values)


def one_of(name: str, value: str, allowed: typing.Sequence[str]) -> str:
    """Return `value`, given for the setting `name`, if it is among those `allowed`.

    Raises:
      UserError: if it is not, with what may have been meant.
    """
    if value not in allowed:
        raise UserError(f"config.{name}: {shown(value)} is unknown; {_suggest(value, allowed)}")
    return value


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Say in words where two trees of settings differ; "" where they do not."""
    was, now = _flat(stored), _flat(asked)
    return "; ".join(
        f"{key} was {was.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    )


def _suggest(word: str, allowed: typing.Sequence[str]) -> str:
    near = difflib.get_close_matches(word, allowed, n=1)
    return f"did you mean {str(near[0])!r}?" if near else f"give one of {', '.join(allowed)}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
