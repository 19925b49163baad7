"""Faults of a model's files, each told in one line as a fault of that file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from hydra_jax.errors import UserError, reason

CONVERT = 'convert it in PyTorch with model.save_pretrained("DIRECTORY", safe_serialization=True)'
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@contextlib.contextmanager
def faults_of(path: Path) -> Iterator[None]:
    """Turn whatever a parser raises on a damaged file into a fault of that file.

    Args:
      path: of the file.

    Raises:
      UserError: instead of any other exception.
    """
    try:
        yield
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path}: does not fit into memory; use a smaller model or a larger machine") from None
    except Exception as error:
        raise UserError(f"{path}: truncated or damaged ({reason(error)}); fetch it again") from error


def refuse_pickled(path: Path) -> None:
    """Refuse a file whose name says that it is pickled: reading it could run its code.

    Raises:
      UserError: if it does.
    """
    if path.suffix in PICKLED:
        raise UserError(f"{path}: is pickled, which is never read: {CONVERT}")
