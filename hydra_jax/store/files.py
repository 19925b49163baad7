"""Directories and files that a run writes: made or left as they were, whole or not there, by one run at a time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hydra_jax.errors import UserError

LOCK = ".lock"
"""In a directory that a run is working in."""

SEEN_SECONDS = 90
"""In which hosts see what others write to a shared file system, which they may look at once a minute."""


@contextlib.contextmanager
def directory(workdir: Path) -> Iterator[None]:
    """A directory to write results into, made if need be, and unmade if nothing came to be in it.

    Raises:
      UserError: for whatever the file system refuses, then or later.
    """
    missing: list[Path] = []
    try:
        missing = [path for path in (workdir, *workdir.parents) if not path.exists()]
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"{workdir}: is a file; give another --workdir")
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):  # before hours of work, not after
            pass
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or workdir}: {error.strerror or error}; free the disk or give another --workdir"
        ) from error
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # there are results in it
                path.rmdir()


@contextlib.contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
    """Keep others from working in a directory that is there, for as long as this process lives and works in it.

    Raises:
      UserError: if one does.
    """
    path = workdir / LOCK
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that just ended may have removed the file between its opening and its locking here.
            ours = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            ours = False
        if not ours:
            raise UserError(f"{workdir}: another run is working in it; wait for it, or give another --workdir")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def await_path(path: Path, seconds: float = SEEN_SECONDS) -> None:
    """Wait until what another host has written to a shared file system is seen on this one.

    Raises:
      UserError: if it is not in time.
    """
    until = time.monotonic() + seconds
    while path.name not in os.listdir(path.parent):  # which asks anew, where a name that was not there is remembered
        if time.monotonic() > until:
            raise UserError(f"{path}: another process has written it, and it is not seen here; share --workdir")
        time.sleep(0.2)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until this is done: zarr works in threads, which would go on writing behind them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = {number: handler for number, handler in handlers.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread() or not ours:
        yield
        return
    caught: list[int] = []
    for each in ours:
        signal.signal(each, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        for each, handler in ours.items():
            signal.signal(each, handler)
    for number in caught:
        ours[signal.Signals(number)](number, None)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` only once all is written."""
    part = path.with_name(f"{path.name}.part")
    remove(part)
    try:
        yield part
        remove(path)
        part.rename(path)
    finally:
        remove(part)


def remove(path: Path) -> None:
    """Remove a file or directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` write a file or directory, which becomes `path` only once all of it is there."""
    with whole(path) as part:
        write(part)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with whole(path) as part:
        part.write_text(text, "utf-8")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
