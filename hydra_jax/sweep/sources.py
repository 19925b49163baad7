"""The values that take a write's place in a batch of ablations: other prompts', on the devices that want them."""

from __future__ import annotations

import contextlib

import jax
import numpy as np

from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.memory import free_bytes
from hydra_jax.sweep.plan import Plan

RESIDENT_SHARE = 0.1
"""Share of a device's free memory that all values may take, to be kept there."""


class Sources:
    """Replacements' values by prompt and component.

    Where all of the bank fits on the devices beside the rest, it is put there once, in the model's dtype and
    split over the model axis, and a batch is gathered there; else each batch is read from the bank and sent,
    while the one before is computed.

    Args:
      plan: the sweep.
      resident: whether they stay on the devices; None to decide it here. On a CPU they need not: the bank is in the
        same memory.
    """

    def __init__(self, plan: Plan, resident: bool | None = None):
        self._plan, self._mesh = plan, meshes.mesh_of(plan.model.params)
        self._values: jax.Array | None = None
        self._nothing: jax.Array | None = None
        if not plan.ablation.kind.needs_sources:
            return
        self._where = plan.bank.where(plan.pool)
        shape = len(plan.pool), len(plan.components), plan.values_size
        device = self._mesh.local_devices[0]
        item = np.dtype(plan.model.config.dtype).itemsize
        if resident is None:
            fits = np.prod(shape) * item / self._mesh.shape[meshes.MODEL] < RESIDENT_SHARE * free_bytes(device)
            resident = device.platform != "cpu" and bool(fits)
        if resident:
            split = meshes.split(shape, (2,), self._mesh.shape[meshes.MODEL])
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # there was less room after all
                self._values = jax.block_until_ready(meshes.put(self._mesh, plan.bank.take(*self._where), split))
            self._gather = meshes.spread(self._mesh, lambda values, unit, rows: values[rows, unit], (0, 1))

    def __call__(self, prompts: np.ndarray, unit: int) -> jax.Array:
        """Return [N, R, E], the values of one ablated component for N of the plan's prompts.

        Args:
          prompts: [N], their indices in the plan.
          unit: the component's index among the ablated ones.

        They are zeros where the ablation reads none.
        """
        plan = self._plan
        shape = len(prompts), plan.ablation.draws, plan.values_size
        if not plan.ablation.kind.needs_sources:
            if self._nothing is None or self._nothing.shape != shape:
                self._nothing = meshes.put(self._mesh, np.zeros(shape, np.float32), meshes.Spec(meshes.DATA))
            return self._nothing
        drawn = plan.sources[prompts]
        if self._values is not None:
            return self._gather(self._values, np.int32(unit), meshes.put(self._mesh, drawn, meshes.Spec(meshes.DATA)))
        parts, rows = (column[drawn.reshape(-1)] for column in self._where)
        return meshes.put(self._mesh, plan.bank.take(parts, rows, unit).reshape(shape), meshes.Spec(meshes.DATA))
