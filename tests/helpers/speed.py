"""Parametrisations of which a few values are enough while one works."""

import pytest


def few(values, *fast):
    """All values for `pytest.mark.parametrize`, those but `fast` marked slow; a tuple is of several arguments."""
    values = list(values)
    missing = [value for value in fast if value not in values]
    assert not missing, f"{missing} are not among {values}"
    return [
        pytest.param(*value if isinstance(value, tuple) else (value,), marks=() if value in fast else pytest.mark.slow)
        for value in values
    ]
