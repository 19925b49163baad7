"""Prompts of different lengths as one array of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def padded_length(tokens: int, context: int) -> int:
    """Return the length that `tokens` are padded to: one of few, as each is compiled for anew."""
    step = 32 if tokens > 32 else 8
    return min(math.ceil(tokens / step) * step, context)


def padded(prompts: Sequence[Sequence[int]], context: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens [P, T], padded on the right, and lengths [P]."""
    lengths = np.array([len(tokens) for tokens in prompts], np.int32)
    rows = np.zeros((len(prompts), padded_length(int(lengths.max()), context)), np.int32)
    for row, tokens in zip(rows, prompts, strict=True):
        row[: len(tokens)] = tokens
    return rows, lengths
