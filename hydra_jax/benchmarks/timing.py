"""The time that a computation takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax


def timed(call: Callable[[], Any], arrays: Callable[[Any], Any] = lambda result: result) -> tuple[float, Any]:
    """Return the seconds until the `arrays` of a call's result are computed, and the result."""
    start = time.perf_counter()
    result = call()
    jax.block_until_ready(arrays(result))
    return time.perf_counter() - start, result
