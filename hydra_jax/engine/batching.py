"""Division of things into batches of one size."""

from __future__ import annotations

import math
from collections.abc import Sequence


def evenly(count: int, most: int) -> list[slice]:
    """Divide `count` things into as few slices as possible of at most `most` each, of one size but the last."""
    if not count:
        return []
    size = math.ceil(count / math.ceil(count / most))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def fill_up(things: Sequence, size: int) -> list:
    """Return `size` things: those given, and the last of them as often as it takes."""
    return [*things, *[things[-1]] * (size - len(things))]


def round_up(count: int, step: int) -> int:
    """Return the smallest multiple of `step` that is `count` or more."""
    return -(-count // step) * step
