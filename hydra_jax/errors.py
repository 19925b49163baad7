"""The one exception that stands for a mistake in what the user gave, not in this program."""


class UserError(Exception):
    """A bad input, file or setting. The message is one line: what, where, and the remedy."""

    def __init__(self, message: str) -> None:
        # Names and what libraries say may have several.
        super().__init__(" ".join(message.splitlines()))


def shown(value: object) -> str:
    """A value as messages quote it, in one line that is not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def reason(error: BaseException) -> str:
    """What a library's error says, in one line that is not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__
