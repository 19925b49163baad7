"""Faults of a model's files, each told in one line as a fault of that file."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from hydra_jax.errors import UserError, reason

CONVERT = 'convert it in PyTorch with model.save_pretrained("DIRECTORY", safe_serialization=True)'
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@contextlib.contextmanager
def faults_of(path: Path | str) -> Iterator[None]:
    """Turn whatever a parser raises on a damaged file into a fault of that file.

    Args:
      path: of the file; or a model in memory, in words.

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


class Unchanged:
    """Files that are read again and again, and have to stay as they were first."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Note how the files at `paths` are now."""
        self._then = {path: _identity(path) for path in paths}

    @contextlib.contextmanager
    def while_read(self) -> Iterator[None]:
        """Read in a block; see `check`. Whatever else is found wrong in a file that has changed is of no interest."""
        self.check()
        try:
            yield
        except Exception:
            self.check()
            raise
        self.check()

    def check(self) -> None:
        """Compare the files with what they were.

        Raises:
          UserError: if one is gone or has changed.
        """
        for path, then in self._then.items():
            try:
                how = "has changed" if _identity(path) != then else ""
            except OSError:
                how = "is gone"
            if how:
                raise UserError(
                    f"{path}: {how} while its weights are being read; put it back as it was and start again, which goes"
                    " on from what is finished"
                )


def fill(array: np.ndarray, file: io.RawIOBase) -> None:
    """Fill an array with the bytes that come next in a file.

    Files of weights are not mapped: one that is cut while it is read would end the process.

    Raises:
      ValueError: if there are fewer.
    """
    rest = array.data.cast("B") if array.size else memoryview(b"")
    while rest:
        count = file.readinto(rest)
        if not count:
            raise ValueError(f"it ends {len(rest):,} bytes early")
        rest = rest[count:]


def _identity(path: Path) -> tuple[int, ...]:
    now = path.stat()
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns


def refuse_pickled(path: Path) -> None:
    """Refuse a file whose name says that it is pickled: reading it could run its code.

    Raises:
      UserError: if it does.
    """
    if path.suffix in PICKLED:
        raise UserError(f"{path}: is pickled, which is never read: {CONVERT}")
