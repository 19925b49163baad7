"""The project's commands, run as processes: begun by `start`, waited for by `finish`."""

import atexit
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

LONGEST = 900
"""Seconds after which a process hangs, however busy the machine is."""


def start(module, *arguments, disturbed=(), said=None, devices=1, **variables):
    """`python -m MODULE ARGUMENTS`, with CPU devices and variables of the environment.

    `disturbed` are options of `tests.programs.disturbed`, which then runs it. `said` is a file for what it prints:
    its standard output has what threads of C++ write there as well, one in the middle of another's line.
    """
    disturbed = [*disturbed, f"--said={said}"] if said else disturbed
    command = ["tests.programs.disturbed", *disturbed, "--", module] if disturbed else [module]
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} | variables
    return subprocess.Popen(
        [sys.executable, "-m", *command, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Wait for a process; what it said is in its attributes `out` and `err`."""
    process.out, process.err = process.communicate(timeout=LONGEST)
    return process


def free_port():
    """A port of this machine that nothing else is given: the socket stays, and gRPC's servers bind beside it."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind(("127.0.0.1", 0))
    atexit.register(reserved.close)
    return reserved.getsockname()[1]
