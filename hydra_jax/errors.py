"""The exception that stands for a mistake in what the user gave, not in this program."""


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
