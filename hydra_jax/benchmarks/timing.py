"""The time that a computation takes, and of walks over the layers, the time of each step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from hydra_jax.engine.rows import Rows
from hydra_jax.engine.walk import Texts
from hydra_jax.sweep.sources import Sources


def timed(call: Callable[[], Any], arrays: Callable[[Any], Any] = lambda result: result) -> tuple[float, Any]:
    """Return the seconds until the `arrays` of a call's result are computed, and the result."""
    start = time.perf_counter()
    result = call()
    jax.block_until_ready(arrays(result))
    return time.perf_counter() - start, result


@dataclasses.dataclass
class Spent:
    """Seconds that the steps of walks take, each of them waited for.

    Attributes:
      clean: of clean runs: layers handed over, texts through them, and what the texts say.
      sources: of replacements, brought to the devices.
      kernel: of rows through layers, and of their effects.
    """

    clean: float = 0.0
    sources: float = 0.0
    kernel: float = 0.0


STEPS: dict[str, list[tuple[type, str]]] = {
    "clean": [(Texts, name) for name in ("__init__", "through", "contrast", "contributions", "read")],
    "sources": [(Sources, "__call__")],
    "kernel": [(Rows, "through"), (Rows, "effects")],
}
"""The methods that a walk's steps are, by the attribute of `Spent` that they count as."""


@contextlib.contextmanager
def apart() -> Iterator[Spent]:
    """Time the steps of all walks that are made meanwhile; a step that another one makes counts by itself."""
    spent, within = Spent(), [0.0]  # seconds of the steps made by each one under way

    def clocked(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def step(self: Any, *arguments: Any, **named: Any) -> Any:
            within.append(0.0)
            start = time.perf_counter()
            try:
                result = method(self, *arguments, **named)
                jax.block_until_ready((result, vars(self)))
                return result
            finally:
                seconds = time.perf_counter() - start
                setattr(spent, name, getattr(spent, name) + seconds - within.pop())
                within[-1] += seconds

        return step

    methods = [(name, kind, method, getattr(kind, method)) for name, of in STEPS.items() for kind, method in of]
    try:
        for name, kind, method, original in methods:
            setattr(kind, method, clocked(name, original))
        yield spent
    finally:
        for _, kind, method, original in methods:
            setattr(kind, method, original)
