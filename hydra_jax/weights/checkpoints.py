"""Checkpoints of training as orbax keeps them, read and checked; `training.checkpoint` writes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from hydra_jax.config import LAST_STEP
from hydra_jax.errors import UserError, reason
from hydra_jax.store.files import sha256

NAME = "checkpoints"
SUMS = "checkpoints.json"
"""The SHA-256 of every file of every checkpoint: what is damaged is found before orbax reads it, whose reads of many
arrays at once end in many tracebacks."""

WEIGHTS = "weights"
"""The part of a checkpoint that a model is made of."""


def steps(workdir: Path) -> list[int]:
    """Return the steps of a run's checkpoints, in order; half-written ones are not among them."""
    numbered = [path for path in directory(workdir).glob("*") if path.name.isdecimal()]
    return sorted(int(path.name) for path in numbered if ocp.is_orbax_checkpoint(path))


def weights(workdir: Path, like: Any, step: int = LAST_STEP) -> tuple[Any, str, int]:
    """Read a trained model's weights; return them, their SHA-256, and the step they are of.

    Args:
      workdir: of the run.
      like: weights of the same shapes, abstract ones will do; of NumPy's for weights in this host's memory.
      step: which checkpoint.

    Raises:
      UserError: if there is no such checkpoint, or it is damaged.
    """
    step = chosen(step, steps(workdir), workdir)
    arrays = read(workdir, step, {WEIGHTS: like})[WEIGHTS]
    return arrays, digest(arrays), step


def digest(tree: Any) -> str:
    """Return the SHA-256 of a tree's arrays, in order."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.ascontiguousarray(jax.device_get(leaf))
        total.update(f"{array.dtype} {array.shape}".encode())
        total.update(array.data if array.ndim else array.tobytes())
    return total.hexdigest()


def directory(workdir: Path) -> Path:
    """Return where a run's checkpoints are."""
    return workdir.absolute() / NAME


def chosen(step: int, there: list[int], workdir: Path) -> int:
    """Return the step that is meant: `step`, if it is among those `there`, or for LAST_STEP the last of them.

    Raises:
      UserError: if there is none such.
    """
    if not there:
        raise UserError(f"{workdir}: has no checkpoint; train first")
    if step == LAST_STEP:
        return there[-1]
    if step not in there:
        raise UserError(f"{workdir}: has no checkpoint of step {step}; there are {', '.join(map(str, there))}")
    return step


def read(workdir: Path, step: int, like: dict[str, Any]) -> dict[str, Any]:
    """Read parts of a checkpoint, as `like`, from files that are as they were written.

    Raises:
      UserError: if they are damaged.
    """
    path = directory(workdir) / str(step)
    # Without a note where a run was killed in between: orbax shows only what is whole.
    noted, now = noted_sums(workdir).get(str(step)), file_sums(workdir, step)
    wrong = next((name for name in sorted({*noted, *now}) if noted.get(name) != now.get(name)), "") if noted else ""
    if wrong:
        raise _damaged(path, f"{wrong} is not as it was written")
    try:
        return ocp.load_checkpointables(path, jax.tree.map(_placed, like))
    except Exception as error:  # whatever orbax and its storage raise
        raise _damaged(path, reason(error)) from error


def _placed(leaf: Any) -> Any:
    """Return an array's shape with a device of this process: those that it was saved from may not be here.

    An array of NumPy's stands for one in this host's memory.
    """
    if isinstance(leaf, np.ndarray):
        return leaf
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)


def noted_sums(workdir: Path) -> dict[str, dict[str, str]]:
    """Read the sums in SUMS, by step and by file of its checkpoint.

    Raises:
      UserError: if they are there but cannot be read.
    """
    path = workdir / SUMS
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); delete it to go on without its sums") from error


def file_sums(workdir: Path, step: int) -> dict[str, str]:
    """Sum up the files of a checkpoint as they are now."""
    path = directory(workdir) / str(step)
    return {str(file.relative_to(path)): sha256(file) for file in sorted(path.rglob("*")) if file.is_file()}


def _damaged(path: Path, how: str) -> UserError:
    return UserError(f"{path}: is damaged ({how}); delete it to go on from the checkpoint before it")
