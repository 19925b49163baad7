"""The number of prompts on a device at once: what they need, what is free, and what to do if that was too many."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hydra_jax.core.prefill import prefill
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.batched import PREFILL_TOKENS
from hydra_jax.errors import UserError
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import layout

ROWS = {"cpu": 512}
"""Edits at once that fill a device's matrix units: on a CPU as measured, and larger ones leave its caches."""

ACCELERATOR_ROWS = 16_384
"""The same on accelerators, where a small model's products are done before the next is launched."""

SHARE = 0.8
"""The share of free memory that plans count on: a program's needs are estimates, and memory is in pieces."""

CGROUP = tuple(Path("/sys/fs/cgroup") / f"memory.{what}" for what in ("max", "current", "stat"))
"""Files with a container's limit of memory, its use, and the parts of that use."""

CACHED = ("active_file", "inactive_file")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes on each device.

    Attributes:
      parameters: the model's.
      fixed: of clean runs and ablations, whatever the number of prompts.
      prompt: of each prompt besides.
    """

    parameters: int
    fixed: int
    prompt: int

    def prompts(self, free: float) -> int:
        """Return the number of prompts that fit into `free` bytes beside the parameters."""
        return max(0, int((SHARE * free - self.fixed) // self.prompt))


def default_rows() -> int:
    """Return the number of edits at once on a device, if its memory takes them."""
    return ROWS.get(jax.default_backend(), ACCELERATOR_ROWS)


def needs(config: ModelConfig, length: int, draws: int, model: int = 1, edges: bool = False) -> Needs:
    """Return a sweep's needs on a device.

    Args:
      config: the model's.
      length: T, tokens of a prompt as padded.
      draws: R, replacements.
      model: devices that share the model.
      edges: whether direct edges are computed.
    """
    c, item = config, jnp.dtype(config.dtype).itemsize
    number = jax.ShapeDtypeStruct((), jnp.int32)
    clean = jax.eval_shape(prefill, layout(c), jax.ShapeDtypeStruct((length,), jnp.int32), number, number)
    cache = 2 * c.layers * c.kv_heads * c.head_dim * length * item
    shared = model if c.kv_heads % model == 0 or c.head_dim % model == 0 else 1
    kept = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(clean)) - cache + cache // shared
    # A token in a layer takes, in float32: the stream and its reads, heads, and the MLP.
    token = 4 * (6 * c.width + 4 * c.heads * c.head_dim + 3 * c.mlp_width // model)
    # A layer's weights are cut out of the stack for its products.
    layer = 4 * (2 * c.width * (c.heads + c.kv_heads) * c.head_dim + 3 * c.width * c.mlp_width) // model
    together = max(length, PREFILL_TOKENS)
    scores = 3 * 4 * c.heads * length
    edit = token + scores + item * c.width + (2 if edges else 1) * 3 * 4 * c.components
    return Needs(
        parameters=meshes.bytes_a_device(c, model),
        fixed=layer + together * (token + scores) + 2 * 4 * c.vocab_size * max(1, together // length),
        prompt=2 * kept + draws * edit,
    )


def free_bytes(device: jax.Device) -> float:
    """Return the free memory of a device; for a CPU, its part of this machine's or this container's."""
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    return host_bytes() / jax.local_device_count()


def left(asked: float, config: ModelConfig, mesh: Mesh) -> float:
    """Return the bytes a device has left beside a loaded model; `asked` GB may be used in all, 0 for no limit."""
    free = free_bytes(mesh.local_devices[0])
    if not asked:
        return free
    return min(free, asked * 1e9 - meshes.bytes_a_device(config, mesh.shape[meshes.MODEL]))


def host_bytes() -> float:
    """Return the memory that programs may still use on this machine, or in this container."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return math.inf
    try:
        limit, used, parts = (path.read_text().strip() for path in CGROUP)
        # The system takes back cached files, which count as used.
        cached = sum(int(line.split()[1]) for line in parts.splitlines() if line.split()[0] in CACHED)
        return free if limit == "max" else max(1, min(free, int(limit) - int(used) + cached))
    except (OSError, ValueError):
        return free


def check_model(config: ModelConfig, model: int, limit: float) -> None:
    """Refuse a model before it is read.

    Raises:
      UserError: if its parameters alone take more than `limit` bytes of a device.
    """
    wanted = meshes.bytes_a_device(config, model)
    if wanted > limit:
        raise UserError(
            f"memory: the model's parameters take {wanted / 1e9:.3g} GB a device, {limit / 1e9:.3g} are there; set"
            f" --config.mesh.model to {model * math.ceil(wanted / limit)} or more, or dtype=bfloat16"
        )


class BatchSizer:
    """Chooses how many prompts go at once on a worker's devices, by length; fewer where that turned out too many.

    Args:
      config: the model's.
      mesh: the worker's.
      draws: R, replacements.
      edges: whether direct edges are computed.
      rows: edits at once on a device, if they fit; 0 for the device's default.
      free: bytes on each device, besides the model.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, draws: int, edges: bool, rows: int, free: float):
        self._needs = functools.cache(lambda length: needs(config, length, draws, mesh.shape[meshes.MODEL], edges))
        self._draws = draws
        self._wanted, self._free = max(1, (rows or default_rows()) // draws), free
        self.least = mesh.shape[meshes.DATA]
        self._several = len({device.process_index for device in mesh.devices.flat}) > 1
        self._most = self._wanted * self.least

    @property
    def wanted(self) -> int:
        """The number of prompts that fill the devices."""
        return self._wanted * self.least

    def prompts(self, length: int) -> int:
        """Return the number of prompts of up to `length` tokens, padded, that go at once.

        Raises:
          UserError: if not even one prompt a device fits.
        """
        need: Needs = self._needs(length)
        fitting = need.prompts(self._free)
        if fitting < 1:
            raise UserError(
                f"memory: a prompt of {length} tokens and its replacements want"
                f" {(need.fixed + need.prompt) / 1e9:.2g} GB a device beside the model, {SHARE * self._free / 1e9:.2g}"
                " are free; set --config.mesh.model to share the model among more devices, or dtype=bfloat16"
            )
        return min(fitting * self.least, self._most)

    def run(self, call: Callable[[int], T], size: int, say: Callable[[str], None]) -> T:
        """Return `call(size)`, halving the size as often as a device's memory is exhausted.

        Args:
          call: takes the number of prompts at once.
          size: the first number, a multiple of `least`.
          say: takes a line on every halving.

        Raises:
          UserError: if one prompt a device does not fit either.
        """
        while True:
            try:
                return call(min(size, self._most))
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                size = min(size, self._most)
                if self._several:
                    raise UserError(
                        f"memory: {size} prompts at once do not fit on the devices, and those of other processes go on"
                        f" with as many; start again with --config.rows={max(1, self._wanted // 2) * self._draws}"
                    ) from error
                if size == self.least:
                    raise UserError(
                        "memory: not even one prompt a device fits; set --config.mesh.model to share the model among"
                        " more devices, or dtype=bfloat16"
                    ) from error
                self._most = max(self.least, size // 2 // self.least * self.least)
            say(f"out of memory with {size} prompts at once: going on with {self._most}")
