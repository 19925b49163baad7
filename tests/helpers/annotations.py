"""The checker behind the import hook of conftest.py: annotated shapes and types are checked at every call."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

MODULES = ("hydra_jax.models", "hydra_jax.core", "hydra_jax.engine")
"""What is checked: the functions and methods of these folders."""

# As static checkers do, take an int for a float.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable) -> Callable:
    """Check a function's arguments and result, unless it makes a record.

    Constructors go unchecked: JAX puts shapes, shardings and placeholders in the place of a record's arrays,
    and a config checks its own fields.
    """
    return function if function.__name__ == "__init__" else _checked(function)
