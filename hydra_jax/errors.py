"""The one exception that stands for a mistake in what the user gave, not in this program."""


class UserError(Exception):
    """A bad input, file or setting. The message is one line: what, where, and the remedy."""
