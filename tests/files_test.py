"""Directories that one run at a time works in, and files that are whole or not there."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hydra_jax.errors import UserError
from hydra_jax.store import files

ROOT = Path(__file__).parent.parent
REFUSED = "another run is working in it; wait for it, or give another --workdir"


def refused(directory):
    """The message with which a directory cannot be worked in; None where it can."""
    try:
        with files.exclusive(directory):
            return None
    except UserError as error:
        return str(error)


@pytest.fixture
def holder(tmp_path):
    """A process that works in a directory."""
    command = [sys.executable, "-m", "tests.programs.hold_directory", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "holding\n"
        yield process
        process.kill()


def test_another_process_is_refused_until_the_first_ends(holder, tmp_path):
    assert refused(tmp_path) == f"{tmp_path}: {REFUSED}"
    holder.communicate("end\n", timeout=60)
    assert holder.returncode == 0
    assert list(tmp_path.iterdir()) == []
    assert refused(tmp_path) is None


def test_a_killed_process_holds_nothing(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait(60)
    assert (tmp_path / files.LOCK).exists()
    assert refused(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_the_same_process_is_refused_too(tmp_path):
    messages = []
    with files.exclusive(tmp_path):
        thread = threading.Thread(target=lambda: messages.append(refused(tmp_path)))
        thread.start()
        thread.join()
        messages.append(refused(tmp_path))
    assert messages == [f"{tmp_path}: {REFUSED}"] * 2
    assert list(tmp_path.iterdir()) == []


def test_a_refused_run_leaves_the_lock_to_its_holder(tmp_path):
    with files.exclusive(tmp_path):
        for _ in range(2):
            assert refused(tmp_path)
        assert (tmp_path / files.LOCK).exists()


def test_a_lock_that_goes_after_it_was_opened_is_not_taken(monkeypatch, tmp_path):
    """The holder may end between a second run's opening of the file and its locking of it."""

    def flock(descriptor, operation):
        (tmp_path / files.LOCK).unlink(missing_ok=True)
        return locked(descriptor, operation)

    locked = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    assert refused(tmp_path) == f"{tmp_path}: {REFUSED}"


def test_an_error_in_the_work_is_passed_on_and_the_lock_goes(tmp_path):
    with pytest.raises(ZeroDivisionError), files.exclusive(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", ["gone", "a file"])
def test_a_directory_may_go_away_while_it_is_worked_in(tmp_path, after):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with files.exclusive(workdir):
        shutil.rmtree(workdir)
        if after == "a file":
            workdir.touch()
    if after == "a file":
        workdir.unlink()
    workdir.mkdir()
    assert refused(workdir) is None


@pytest.mark.parametrize("target", ["there", "missing", "a directory"])
def test_a_link_is_neither_followed_nor_written_through(tmp_path, target):
    workdir, outside = tmp_path / "run", tmp_path / "outside"
    workdir.mkdir()
    match target:
        case "there":
            outside.write_text("precious")
        case "a directory":
            outside.mkdir()
    (workdir / files.LOCK).symlink_to(outside)
    message = refused(workdir)
    assert message == f"{workdir / files.LOCK}: is a symbolic link, and locks are not taken through links; delete it"
    assert not outside.is_file() or outside.read_text() == "precious"
    assert outside.exists() == (target != "missing")
    assert (workdir / files.LOCK).is_symlink()


def test_a_link_that_comes_at_the_last_moment_is_not_followed(monkeypatch, tmp_path):
    workdir, outside = tmp_path / "run", tmp_path / "outside"
    workdir.mkdir()
    outside.write_text("precious")
    (workdir / files.LOCK).symlink_to(outside)
    monkeypatch.setattr(Path, "is_symlink", lambda path: False)
    assert "cannot be locked" in refused(workdir)
    assert outside.read_text() == "precious"
    assert os.path.lexists(workdir / files.LOCK)


def test_a_lock_that_is_no_file_is_refused(tmp_path):
    (tmp_path / files.LOCK).mkdir()
    assert "cannot be locked" in refused(tmp_path)
    assert (tmp_path / files.LOCK).is_dir()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_refused(monkeypatch, tmp_path, number):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    expected = f"{tmp_path / files.LOCK}: cannot be locked ({os.strerror(number)}); give another --workdir"
    assert refused(tmp_path) == expected
    assert list(tmp_path.iterdir()) == []
