"""The project's commands, run as processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(module, *arguments, prelude="", devices=1, **variables):
    """`python -m MODULE ARGUMENTS`, with CPU devices and variables of the environment.

    `prelude` is code that is run before it in the same process.
    """
    code = f"{prelude}; import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} | variables
    return subprocess.Popen(
        [sys.executable, *(["-c", code] if prelude else ["-m", module]), *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Wait for a process; what it said is in its attributes `out` and `err`."""
    process.out, process.err = process.communicate(timeout=300)
    return process


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def kept(directory):
    """Variables that have every compiled program kept in a directory, for commands that are run again and again."""
    return dict(JAX_COMPILATION_CACHE_DIR=str(directory), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
