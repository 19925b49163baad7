"""Answers as they may continue a text: after a space, or right after its last character."""

from __future__ import annotations

import unicodedata

SCRIPTS_WITHOUT_SPACES = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19FF),  # Tai Le, New Tai Lue, Khmer's symbols
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x2E80, 0x312F),  # radicals, punctuation, kana, Bopomofo
    (0x3190, 0x4DBF),  # more of those, and ideographs
    (0x4E00, 0xA4CF),  # ideographs, Yi
    (0xA9E0, 0xA9FF),  # Myanmar
    (0xAA60, 0xAA7F),
    (0xF900, 0xFAFF),  # ideographs
    (0xFE30, 0xFE4F),  # punctuation
    (0xFF00, 0xFF9F),  # full-width forms, half-width kana
    (0xFFE0, 0xFFE6),
    (0x1B000, 0x1B16F),  # kana
    (0x20000, 0x3FFFF),  # ideographs
)
"""First and last code points; Korean has spaces, and is not among them."""

OPENING = ("Ps", "Pi")
"""Unicode's categories of opening brackets and quotes."""
CLOSING = ("Pe", "Pf")
JOINING = "-\u2010\u2011/_'\u2019"
"""Hyphens, slash, underscore and apostrophes, after which a word goes on."""
ENDING = ".,;:!?%'\u2026"
"""Punctuation that stands right behind a word."""


def spellings(text: str, answer: str) -> tuple[str, ...]:
    """Return what may be written after a text for an answer to follow it: with a space before it, or none.

    Args:
      text: the prompt's.
      answer: as it is given; one that begins with a space is written so.

    Returns:
      One spelling where a reader has no choice, else both, the usual one first.
    """
    if answer[:1].isspace() or _joined(text, answer):
        return (answer,)
    spaced = f" {answer}"
    return (answer, spaced) if text[-1:].isdecimal() and answer[:1].isdecimal() else (spaced, answer)


def _joined(text: str, answer: str) -> bool:
    """Return whether a writer of the language puts no space between them."""
    last, first = text[-1:], answer[:1]
    if not last or not first:
        return False
    return (
        last.isspace()
        or last in JOINING
        or unicodedata.category(last) in OPENING
        # Straight quotes look alike: this one opens if nothing but a space or a bracket is before it.
        or (last == '"' and (len(text) == 1 or text[-2].isspace() or unicodedata.category(text[-2]) in OPENING))
        or first in ENDING
        or unicodedata.category(first) in CLOSING
        or _without_spaces(last)
        or _without_spaces(first)
    )


def _without_spaces(character: str) -> bool:
    return any(low <= ord(character) <= high for low, high in SCRIPTS_WITHOUT_SPACES)
