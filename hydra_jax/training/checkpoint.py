"""Checkpoints of training, by orbax: whole or not there, saved while training goes on, and checked when read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from hydra_jax.config import LAST_STEP
from hydra_jax.errors import UserError, reason
from hydra_jax.store import files
from hydra_jax.training.config import CheckpointConfig
from hydra_jax.training.step import State
from hydra_jax.weights.hub import sha256

NAME = "checkpoints"
SUMS = "checkpoints.json"
"""The SHA-256 of every file of every checkpoint: what is damaged is found before orbax reads it, whose reads of many
arrays at once end in many tracebacks."""

WEIGHTS, MOMENTS, POSITION = "weights", "optimizer", "position"
"""Parts of a checkpoint. A position is JSON: the data iterator's state and dropout's key."""


class Checkpoints:
    """The checkpoints of a run; a context, which waits for what is still being written."""

    def __init__(self, workdir: Path, config: CheckpointConfig):
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(config.keep_last), policies.EveryNSteps(config.keep_every)]
        self._workdir = workdir
        self._checkpointer = ocp.training.Checkpointer(
            _directory(workdir),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,  # half-written ones
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._checkpointer.close()
            self._seal()
        except Exception as failure:  # of storage, while what came before was being written
            raise _unsaved(self._workdir, failure) from (error or failure)

    @property
    def steps(self) -> list[int]:
        """Those that are there, in order."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, state: State, iterator: dict[str, Any]) -> None:
        """Save a state and the data iterator's, once; returns once both are copied, and writes behind.

        Raises:
          UserError: if this one or one before it cannot be written.
        """
        if int(state.step) in self.steps:
            return
        position = {"iterator": iterator, "key": np.asarray(jax.random.key_data(state.key)).tolist()}
        parts = {WEIGHTS: state.weights, MOMENTS: state.optimizer, POSITION: position}
        try:
            self._checkpointer.wait()
            self._seal()
            self._checkpointer.save_checkpointables_async(int(state.step), parts)
        except Exception as error:
            raise _unsaved(self._workdir, error) from error

    def _seal(self) -> None:
        """Note the sums of what has been written since, and forget those of what is gone."""
        if jax.process_index():
            return
        noted = _noted(self._workdir)
        now = {str(step): noted.get(str(step)) or _sums(self._workdir, step) for step in steps(self._workdir)}
        if now != noted:
            files.write_text(self._workdir / SUMS, json.dumps(now, indent=2) + "\n")

    def restore(self, like: State, step: int = LAST_STEP) -> tuple[State, dict[str, Any]]:
        """A state and the data iterator's.

        Args:
          like: a state of the same shapes and sharding.
          step: which.

        Raises:
          UserError: if there is no such checkpoint, or it is damaged.
        """
        step = _found(step, self.steps, self._workdir)
        wanted = {WEIGHTS: like.weights, MOMENTS: like.optimizer, POSITION: None}
        parts = _read(self._workdir, step, wanted)
        position, there = parts[POSITION], like.step.sharding
        number, words = jax.device_put((np.int32(step), np.asarray(position["key"], np.uint32)), there)
        return State(parts[WEIGHTS], parts[MOMENTS], number, jax.random.wrap_key_data(words)), position["iterator"]


def steps(workdir: Path) -> list[int]:
    """The steps of a run's checkpoints, in order; half-written ones are not among them."""
    found = [path for path in _directory(workdir).glob("*") if path.name.isdecimal()]
    return sorted(int(path.name) for path in found if ocp.is_orbax_checkpoint(path))


def weights(workdir: Path, like: Any, step: int = LAST_STEP) -> tuple[Any, str, int]:
    """A trained model's weights, their SHA-256, and the step they are of.

    Args:
      workdir: of the run.
      like: weights of the same shapes, abstract ones will do.
      step: which checkpoint.

    Raises:
      UserError: if there is no such checkpoint, or it is damaged.
    """
    step = _found(step, steps(workdir), workdir)
    found = _read(workdir, step, {WEIGHTS: like})[WEIGHTS]
    return found, digest(found), step


def digest(tree: Any) -> str:
    """SHA-256 of a tree's arrays, in order."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.ascontiguousarray(jax.device_get(leaf))
        total.update(f"{array.dtype} {array.shape}".encode())
        total.update(array.data if array.ndim else array.tobytes())
    return total.hexdigest()


def _directory(workdir: Path) -> Path:
    return workdir.absolute() / NAME


def _found(step: int, there: list[int], workdir: Path) -> int:
    if not there:
        raise UserError(f"{workdir}: has no checkpoint; train first")
    if step == LAST_STEP:
        return there[-1]
    if step not in there:
        raise UserError(f"{workdir}: has no checkpoint of step {step}; there are {', '.join(map(str, there))}")
    return step


def _read(workdir: Path, step: int, like: dict[str, Any]) -> dict[str, Any]:
    """Parts of a checkpoint, as `like`, from files that are as they were written."""
    path = _directory(workdir) / str(step)
    # Without a note where a run was killed in between: orbax shows only what is whole.
    noted, now = _noted(workdir).get(str(step)), _sums(workdir, step)
    wrong = next((name for name in sorted({*noted, *now}) if noted.get(name) != now.get(name)), "") if noted else ""
    if wrong:
        raise _damaged(path, f"{wrong} is not as it was written")
    try:
        return ocp.load_checkpointables(path, jax.tree.map(_placed, like))
    except Exception as error:  # whatever orbax and its storage raise
        raise _damaged(path, reason(error)) from error


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """Where an array goes: the devices that it was saved from may not be here."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)


def _noted(workdir: Path) -> dict[str, dict[str, str]]:
    """By step, and by file of its checkpoint, the sums in SUMS."""
    path = workdir / SUMS
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); delete it to go on without its sums") from error


def _sums(workdir: Path, step: int) -> dict[str, str]:
    path = _directory(workdir) / str(step)
    return {str(file.relative_to(path)): sha256(file) for file in sorted(path.rglob("*")) if file.is_file()}


def _unsaved(workdir: Path, error: Exception) -> UserError:
    return UserError(
        f"{workdir}: a checkpoint cannot be saved ({reason(error)}); free the disk, the same command goes on"
    )


def _damaged(path: Path, how: str) -> UserError:
    return UserError(f"{path}: is damaged ({how}); delete it to go on from the checkpoint before it")
