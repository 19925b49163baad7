"""The values that take a write's place in a chunk of ablations: other prompts', on the devices that want them."""

from __future__ import annotations

import contextlib

import jax
import numpy as np

from hydra_jax.core.edits import Component
from hydra_jax.engine import mesh as meshes
from hydra_jax.sweep.plan import Plan

RESIDENT_SHARE = 0.1
"""Share of a device's free memory that all values may take, to be kept there."""


class Sources:
    """Replacements' values by prompt and component.

    Where all of the bank fits on every device beside the rest, it is put there once, in the model's dtype, and a
    component's values are gathered there; else each component's are read from the bank and sent when the walk comes
    to it, while what comes before is computed.

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
        self._where = plan.bank.where(plan.pool_keys)
        size = sum(place.stop - place.start for place in plan.places.values())
        device = self._mesh.local_devices[0]
        taken = len(plan.pool) * size * np.dtype(plan.model.config.dtype).itemsize
        if resident is None:
            resident = device.platform != "cpu" and taken < RESIDENT_SHARE * plan.sizer.free
        if resident:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # there was less room after all
                everywhere = meshes.put(self._mesh, plan.bank.take(*self._where), meshes.Spec())
                self._values = jax.block_until_ready(everywhere)
            self._gather = {
                size: meshes.spread(self._mesh, _gather(size), (0, 1))
                for size in {place.stop - place.start for place in plan.places.values()}
            }

    def __call__(self, prompts: np.ndarray, component: Component) -> jax.Array:
        """Return [N, R, E], the values of one ablated component for N of the plan's prompts.

        Args:
          prompts: [N], their indices in the plan.
          component: which.

        They are zeros where the ablation reads none.
        """
        plan, place = self._plan, self._plan.places[component]
        shape = len(prompts), plan.ablation.draws, place.stop - place.start
        if not plan.ablation.kind.needs_sources:
            if self._nothing is None or self._nothing.shape != shape:
                self._nothing = meshes.put(self._mesh, np.zeros(shape, np.float32), meshes.Spec(meshes.DATA))
            return self._nothing
        drawn = plan.sources[prompts]
        if self._values is not None:
            rows = meshes.put(self._mesh, drawn, meshes.Spec(meshes.DATA))
            return self._gather[shape[-1]](self._values, np.int32(place.start), rows)
        parts, rows = (column[drawn.reshape(-1)] for column in self._where)
        return meshes.put(self._mesh, plan.bank.take(parts, rows, place).reshape(shape), meshes.Spec(meshes.DATA))


def _gather(size: int):
    def gather(values: jax.Array, start: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(values, start, size, axis=1)[rows]

    return gather
