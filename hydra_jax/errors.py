"""The exception that stands for a mistake in what the user gave, not in this program."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

SETTING = re.compile(
    r"(?<![\w./-])(--)?config\.(?!json\b|py\b)((ablation|prompts|readout|mesh)\.)?|--(?=workdir\b)"
    r"|(?<![\w./])(ablation|prompts|readout)\.(?=[a-z_]+\b)(?!csv\b|jsonl?\b)"
)
"""The parts of the names of settings and flags that arguments in Python do not have."""


class UserError(Exception):
    """A bad input, file or setting. The message is one line: what, where, and the remedy."""

    def __init__(self, message: str) -> None:
        # Names, and messages of libraries, may have several lines.
        super().__init__(" ".join(message.splitlines()))


def shown(value: object) -> str:
    """Return a value as messages quote it, in one line that is not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def reason(error: BaseException) -> str:
    """Return the message of a library's error, in one line that is not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def speaks_of_arguments(question: Callable[P, R]) -> Callable[P, R]:
    """Return a function whose errors speak of its arguments, where those of commands speak of settings and flags.

    The last word of a setting's name is the argument's.
    """

    @functools.wraps(question)
    def asked(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return question(*arguments, **named)
        except UserError as error:
            message = SETTING.sub("", str(error))
            if message == str(error):
                raise
            raise UserError(message) from error

    return asked
