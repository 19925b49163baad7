"""The frame of every command: flags, help, errors, signals, and several processes."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from hydra_jax import usage
from hydra_jax.errors import UserError

# JAX, and what imports it, is imported where it is used: a command's --help is there at once.

INTERRUPTED, TERMINATED = 130, 143  # what shells report for Ctrl-C and SIGTERM
JOIN_SECONDS = 300
"""The time in which all processes of a run must have started."""

COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT on the host of process 0, of a run of many processes; auto: JAX is to find them"
)
PROCESSES = flags.DEFINE_integer("processes", None, "how many they are; SLURM, Open MPI and TPU slices say it")
PROCESS = flags.DEFINE_integer("process", None, "which one this is, from 0")

CLUSTERS = {"SLURM": "SLURM_STEP_NUM_TASKS", "Open MPI": "OMPI_COMM_WORLD_SIZE"}
"""Launchers, and the variable in which they say how many processes they started."""

TPU_HOSTS = "TPU_WORKER_HOSTNAMES"
"""The variable in which a TPU slice names its hosts, separated by commas."""

POD = "JOB_COMPLETION_INDEX"
"""The variable in which Kubernetes says which pod of an indexed job this is, but not how many there are."""

AUTO = "auto"
"""The --coordinator with which JAX finds the others."""

LOST_SECONDS = 30
"""The silence after which a process is lost, and ends the run."""

LEAVE_SECONDS = 10
"""The time that a process waits for the others where all are told to stop."""

HELP = {"--help": True, "-help": True, "-?": True, "--helpshort": False, "--helpfull": False, "--helpxml": False}
"""Arguments that ask for help, and whether it is with the settings of the config file."""

CONFIGS = Path(__file__).parent.parent / "configs"
NO_TRITON = "--xla_gpu_enable_triton_gemm=false"
"""One of XLA_FLAGS: trying Triton's kernels for float32 products of full precision takes minutes a program on a GPU."""


def main(
    command: Callable[[], None], config: str | None = None, on_interrupt: str = "stopped", several: bool = False
) -> None:
    """Run an absl command; a mistake of the user's is one line on standard error and a non-zero exit.

    Args:
      command: the work, flags parsed.
      config: the file in `configs/` that `--config` is by default.
      on_interrupt: what to say when the user stops it.
      several: whether it may run as several processes that work on one thing.
    """
    logging.set_verbosity(logging.WARNING)
    chosen = os.environ.get("XLA_FLAGS", "")
    if NO_TRITON.partition("=")[0] not in chosen:
        os.environ["XLA_FLAGS"] = f"{chosen} {NO_TRITON}".strip()
    # A cache that cannot be written costs time, not results.
    warnings.filterwarnings("ignore", message=".*persistent compilation cache.*")

    def parse(arguments: list[str]) -> list[str]:
        if config and not any(a == "--config" or a.startswith("--config=") for a in arguments):
            arguments = [arguments[0], f"--config={CONFIGS / config}", *arguments[1:]]
        # Last, so that the settings are shown as the other arguments make them.
        asked = [argument for argument in arguments[1:] if argument in HELP]
        arguments = [argument for argument in arguments if argument not in HELP] + asked
        try:
            rest = _parsed(arguments, asked, config)
            if config:
                dict(flags.FLAGS["config"].value or {})  # a file that did not load says so only when it is read
        except Exception as error:  # flags, ml_collections and the config file's own code raise all kinds
            _stop(f"error: {_one_line(error)}; see --help and the config file", 1)
        if len(rest) > 1:
            _stop(f"error: argument {rest[1]!r} is unknown; see --help", 1)
        return rest

    def run(arguments: list[str]) -> None:
        del arguments
        import jax

        from hydra_jax.engine import cluster
        from hydra_jax.weights.hub import cache_dir

        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
        signal.signal(signal.SIGTERM, _terminate)
        try:
            join(several)
            signal.signal(signal.SIGTERM, _terminate)  # JAX has put its own in its place
            command()
        except UserError as error:
            _stop(f"error: {error}", 1)
        except KeyboardInterrupt as stop:
            _stop(f"\n{on_interrupt}", TERMINATED if isinstance(stop, Terminated) else INTERRUPTED)
        except Exception as error:
            if not jax.distributed.is_initialized():
                raise
            gone = isinstance(error, jax.errors.JaxRuntimeError) and cluster.is_broken(error)
            lost = f"error: another process of this run is gone ({_one_line(error)[:200]}); start all of them again"
            _stop(lost if gone else traceback.format_exc(), 1)

    app.run(run, flags_parser=parse)


def _parsed(arguments: list[str], asked: list[str], config: str | None) -> list[str]:
    """Parse flags; where help is `asked` for, show it, with the settings of a config, and exit with success."""
    try:
        return flags.FLAGS(arguments)
    except SystemExit:  # absl's, with 1
        if not asked:
            raise
        if config and HELP[asked[0]]:
            flag: Any = flags.FLAGS["config"]
            print(f"\n{usage.settings(Path(flag.config_filename.partition(':')[0]), flag.value)}")
        sys.exit(0)


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it: a stop like that of Ctrl-C."""


def _terminate(number: int, frame: object) -> None:
    del number, frame
    raise Terminated


def join(several: bool) -> None:
    """Make this process one of a run's, if flags or a launcher's variables say that there are several.

    Args:
      several: whether there may be.

    Raises:
      UserError: if they do not all find each other, or the flags do not fit together: never a run by itself.
    """
    coordinator, processes, process = COORDINATOR.value, PROCESSES.value, PROCESS.value
    asked = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in asked.items() if value is None]
    automatic = coordinator == AUTO
    if 0 < len(missing) < len(asked) and not (automatic and len(missing) == 2):
        raise UserError(f"{', '.join(missing)}: is missing; a run of several processes needs {', '.join(asked)}")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise UserError(f"--process: is {process}, of --processes={processes}; give 0 to {processes - 1}")
    expected = _launched() if processes is None else processes
    if expected < 2 and not automatic:
        return
    if not several:
        raise UserError(f"this command runs as one process, {expected} were started; start one")
    import jax

    # It would take SIGTERM for itself, and say nothing of it to anyone.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            None if automatic else coordinator,
            processes,
            process,
            # Where flags say everything nothing is detected: under SLURM, JAX would give each process one GPU.
            cluster_detection_method=None if automatic or processes is None else "deactivate",
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=LOST_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        these = "processes" if automatic else f"{expected} processes"
        raise UserError(f"--coordinator: the {these} did not find each other ({_one_line(error)})") from error
    if not automatic and jax.process_count() != expected:
        raise UserError(f"--processes: {expected} were to run, {jax.process_count()} do; start all of them anew")


def part() -> None:
    """Let the other processes of a run end, though this one has work left: tables, figures, the page."""
    import jax

    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def _launched() -> int:
    """Return how many processes a launcher says that it started; 1 where there is none."""
    for launcher, variable in CLUSTERS.items():
        if text := os.environ.get(variable):
            if not text.isdecimal():
                raise UserError(
                    f"{variable}: is {text!r}, {launcher} was to say how many processes there are; unset it"
                )
            return int(text)
    if hosts := os.environ.get(TPU_HOSTS):
        return len(hosts.split(","))
    if POD in os.environ:
        raise UserError(
            f"{POD}: is set, so this is one of an indexed job's pods; give --coordinator, --processes and --process, or"
            " unset it if each is to run by itself"
        )
    return 1


def _one_line(error: Exception) -> str:
    # ml_collections wraps errors in errors, and str() of a KeyError quotes its message.
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = f"there is no setting {error.args[0]}" if isinstance(error, KeyError) and error.args else str(error)
    if "Traceback (most recent call last)" in text:  # of a config file's own code: what it said is at the end
        last = text.strip().splitlines()[-1]
        text = last.partition(": ")[2] or last
    return " ".join(text.replace(" Did you mean", "; did you mean").replace("\nDid you mean", "; did you mean").split())


def _stop(message: str, status: int) -> None:
    print(message, file=sys.stderr)
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized():
        from hydra_jax.engine import cluster

        # An orderly end of JAX's service waits for processes that may not end. It lets them know of this one's.
        if status == TERMINATED:
            cluster.leave(LEAVE_SECONDS)
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
