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

from hydra_jax.errors import UserError, reason
from hydra_jax.models.config import LAST_STEP
from hydra_jax.training.config import CheckpointConfig
from hydra_jax.training.step import State

NAME = "checkpoints"
WEIGHTS, MOMENTS, POSITION = "weights", "optimizer", "position"
"""Parts of a checkpoint. A position is JSON: the data iterator's state, dropout's key and the digests of the parts."""


class Checkpoints:
    """The checkpoints of a run; a context, which waits for what is still being written."""

    def __init__(self, workdir: Path, config: CheckpointConfig):
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(config.keep_last), policies.EveryNSteps(config.keep_every)]
        self._directory = workdir.absolute() / NAME
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
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
        except Exception as failure:  # of storage, while what came before was being written
            raise _unsaved(self._directory, failure) from (error or failure)

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
        position: dict[str, Any] = {
            "iterator": iterator,
            "key": np.asarray(jax.random.key_data(state.key)).tolist(),
        }
        hashes = {WEIGHTS: digest(state.weights), MOMENTS: digest(state.optimizer), POSITION: _digest_of(position)}
        parts = {WEIGHTS: state.weights, MOMENTS: state.optimizer, POSITION: position | {"sha256": hashes}}
        try:
            self._checkpointer.save_checkpointables_async(int(state.step), parts)
        except Exception as error:
            raise _unsaved(self._directory, error) from error

    def restore(self, like: State, step: int = LAST_STEP) -> tuple[State, dict[str, Any]]:
        """A state and the data iterator's.

        Args:
          like: a state of the same shapes and sharding.
          step: which.

        Raises:
          UserError: if there is no such checkpoint, or it is damaged.
        """
        step = _found(step, self.steps, self._directory)
        wanted = {WEIGHTS: like.weights, MOMENTS: like.optimizer}
        parts, position = _read(self._directory, step, wanted)
        if _digest_of({name: position.get(name) for name in ("iterator", "key")}) != position["sha256"].get(POSITION):
            raise _damaged(self._directory / str(step), f"its {POSITION} is not the one that was saved")
        there = like.step.sharding
        number, words = jax.device_put((np.int32(step), np.asarray(position["key"], np.uint32)), there)
        return State(parts[WEIGHTS], parts[MOMENTS], number, jax.random.wrap_key_data(words)), position["iterator"]


def steps(workdir: Path) -> list[int]:
    """The steps of a run's checkpoints, in order; half-written ones are not among them."""
    found = [path for path in (workdir / NAME).glob("*") if path.name.isdecimal()]
    return sorted(int(path.name) for path in found if ocp.is_orbax_checkpoint(path.absolute()))


def weights(workdir: Path, like: Any, step: int = LAST_STEP) -> tuple[Any, str, int]:
    """A trained model's weights, their SHA-256, and the step they are of.

    Args:
      workdir: of the run.
      like: weights of the same shapes, abstract ones will do.
      step: which checkpoint.

    Raises:
      UserError: if there is no such checkpoint, or it is damaged.
    """
    directory = workdir.absolute() / NAME
    step = _found(step, steps(workdir), directory)
    parts, position = _read(directory, step, {WEIGHTS: like})
    return parts[WEIGHTS], position["sha256"][WEIGHTS], step


def digest(tree: Any) -> str:
    """SHA-256 of a tree's arrays, in order."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.ascontiguousarray(jax.device_get(leaf))
        total.update(f"{array.dtype} {array.shape}".encode())
        total.update(array.data if array.ndim else array.tobytes())
    return total.hexdigest()


def _found(step: int, there: list[int], directory: Path) -> int:
    if not there:
        raise UserError(f"{directory}: has no checkpoint; train first")
    if step == LAST_STEP:
        return there[-1]
    if step not in there:
        raise UserError(f"{directory}: has no checkpoint of step {step}; there are {', '.join(map(str, there))}")
    return step


def _read(directory: Path, step: int, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts of a checkpoint, as `like`, and its position, checked to be what was written."""
    path = directory / str(step)
    try:
        # One after the other: where one of several fails, orbax leaves the others' loads unawaited.
        position = ocp.load_checkpointables(path, {POSITION: None})[POSITION]
        abstract = jax.tree.map(_placed, like)
        parts = {name: ocp.load_checkpointables(path, {name: abstract[name]})[name] for name in like}
        wrong = next((name for name in like if digest(parts[name]) != position["sha256"][name]), None)
    except Exception as error:  # whatever orbax, its storage or a damaged position raises
        raise _damaged(path, reason(error)) from error
    if wrong:
        raise _damaged(path, f"its {wrong} are not those that were saved")
    return parts, position


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """Where an array goes: the devices that it was saved from may not be here."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)


def _digest_of(position: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(position, sort_keys=True).encode()).hexdigest()


def _unsaved(directory: Path, error: Exception) -> UserError:
    return UserError(f"{directory}: cannot be saved ({reason(error)}); free the disk, the same command goes on")


def _damaged(path: Path, how: str) -> UserError:
    return UserError(f"{path}: is damaged ({how}); delete it to go on from the checkpoint before it")
