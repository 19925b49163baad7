"""Directories and files that a run writes: each is whole or not there, and one run at a time works in a directory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from hydra_jax.errors import UserError

LOCK = ".lock"
"""The file by whose lock a run keeps a directory to itself."""

SEEN_SECONDS = 90
"""The time a host waits for another's files on a shared file system, which it may look at only once a minute."""


@contextlib.contextmanager
def directory(workdir: Path) -> Iterator[None]:
    """Make a directory for results where there is none, and remove it again if nothing is in it at the end.

    Raises:
      UserError: if the file system refuses anything, here or in the block.
    """
    missing: list[Path] = []
    try:
        missing = [path for path in (workdir, *workdir.parents) if not path.exists()]
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"{workdir}: is a file; give another --workdir")
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):  # a refusal comes before hours of work, not after
            pass
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or workdir}: {error.strerror or error}; free the disk or give another --workdir"
        ) from error
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # it has results in it
                path.rmdir()


@contextlib.contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
    """Keep other runs out of an existing directory until the block ends or this process does, however it dies.

    Raises:
      UserError: if another run works in it, or its file system cannot lock files.
    """
    path = workdir / LOCK
    if path.is_symlink():  # filelock would not follow it either, but does not say so
        raise UserError(f"{path}: is a symbolic link, and locks are not taken through links; delete it")
    existed = path.exists()
    # A soft lock, filelock's fallback, is a file that outlives a process that is killed.
    lock = filelock.FileLock(path, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise UserError(f"{workdir}: another run is working in it; wait for it, or give another --workdir") from error
    except OSError as error:
        if not existed:
            path.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be locked ({error.strerror or error}); give another --workdir") from error
    try:
        yield
    finally:
        # Removed while it is still locked: filelock leaves the file, and refuses one that was opened and then removed.
        with contextlib.suppress(OSError):  # the directory may be gone
            path.unlink()
        lock.release()


def await_path(path: Path, seconds: float = SEEN_SECONDS) -> None:
    """Wait until this host sees a file that another has written to a shared file system.

    Raises:
      UserError: if it does not in so many seconds.
    """
    until = time.monotonic() + seconds
    # A listing asks the file system anew, while a look-up may be answered from what the host remembers as missing.
    while path.name not in os.listdir(path.parent):
        if time.monotonic() > until:
            raise UserError(f"{path}: another process has written it, and this one does not see it; share --workdir")
        time.sleep(0.2)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM to the end of the block: zarr's threads would go on writing after an interruption."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = {number: handler for number, handler in handlers.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread() or not ours:
        yield
        return
    caught: list[int] = []
    for number in ours:
        signal.signal(number, lambda received, _: caught.append(received))
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
    for received in caught:
        ours[signal.Signals(received)](received, None)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a path to write to, which becomes `path` only if the block ends well."""
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
    """Write a file or directory by `write`; it becomes `path` only once all of it is there."""
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
