"""Checkpoints of training, by orbax: each is whole or not there, saved while training goes on, checked when read."""

from __future__ import annotations

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
from hydra_jax.weights.checkpoints import SUMS, WEIGHTS, chosen, directory, file_sums, noted_sums, read, steps

MOMENTS, POSITION = "optimizer", "position"
"""The parts of a checkpoint besides the weights. A position is JSON: the data iterator's state and dropout's key."""


class Checkpoints:
    """The checkpoints of a run; as a context manager it waits at its end for what is still being written."""

    def __init__(self, workdir: Path, config: CheckpointConfig):
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(config.keep_last), policies.EveryNSteps(config.keep_every)]
        self._workdir = workdir
        self._checkpointer = ocp.training.Checkpointer(
            directory(workdir),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,  # a run that was killed leaves half-written ones
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._checkpointer.close()
            self._seal()
        except Exception as failure:  # an earlier save, which went on behind, may fail only here
            raise _unsaved(self._workdir, failure) from (error or failure)

    @property
    def steps(self) -> list[int]:
        """The steps that have checkpoints, in order."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, state: State, iterator: dict[str, Any]) -> None:
        """Save a training state and a data iterator's, unless their step is saved already.

        Both are copied before this returns, and written while training goes on.

        Raises:
          UserError: if this checkpoint or an earlier one cannot be written.
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
        """Record the sums of checkpoints written since the last call, and drop those of checkpoints that are gone."""
        if jax.process_index():
            return
        noted = noted_sums(self._workdir)
        sums = {str(step): noted.get(str(step)) or file_sums(self._workdir, step) for step in steps(self._workdir)}
        if sums != noted:
            files.write_text(self._workdir / SUMS, json.dumps(sums, indent=2) + "\n")

    def restore(self, like: State, step: int = LAST_STEP) -> tuple[State, dict[str, Any]]:
        """Return the training state and the data iterator's state of a checkpoint.

        Args:
          like: a state of the same shapes and sharding.
          step: the checkpoint's step.

        Raises:
          UserError: if there is no such checkpoint, or it is damaged.
        """
        step = chosen(step, self.steps, self._workdir)
        wanted = {WEIGHTS: like.weights, MOMENTS: like.optimizer, POSITION: None}
        parts = read(self._workdir, step, wanted)
        position, sharding = parts[POSITION], like.step.sharding
        number, key_data = jax.device_put((np.int32(step), np.asarray(position["key"], np.uint32)), sharding)
        return State(parts[WEIGHTS], parts[MOMENTS], number, jax.random.wrap_key_data(key_data)), position["iterator"]


def _unsaved(workdir: Path, error: Exception) -> UserError:
    return UserError(
        f"{workdir}: a checkpoint cannot be saved ({reason(error)}); free the disk, the same command goes on"
    )
