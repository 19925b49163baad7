"""The number of texts on a device at once: what they need, what is free, and what to do if that was too many."""

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

from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.blocks import Layout
from hydra_jax.engine.layers import AT_ONCE
from hydra_jax.engine.walk import PREFILL_TOKENS, UNEMBED_ROWS, Sizes
from hydra_jax.errors import UserError
from hydra_jax.limits import MOST
from hydra_jax.models.config import ModelConfig

ROWS = {"cpu": 512}
"""Rows of a block that fill a device's matrix units: on a CPU as measured, and larger ones leave its caches."""

ACCELERATOR_ROWS = 16_384
"""The same on accelerators, where a small model's products are done before the next is launched."""

SHARE = 0.8
"""The share of free memory that plans count on: a program's needs are estimates, and memory is in pieces."""

SHORT = 16
"""Tokens of a short prompt: as such, texts without rows are counted, of which as many fill a device as rows do."""

CLEAN_SHARE = 0.5
"""The share of free memory that what is computed at once of clean runs may take."""

BLOCK_SHARE, LEAST_ROWS = 0.2, 512
"""The same of a block, and its fewest rows: the less it takes, the more rows go through a layer that is read."""

CGROUP = tuple(Path("/sys/fs/cgroup") / f"memory.{what}" for what in ("max", "current", "stat"))
"""Files with a container's limit of memory, its use, and the parts of that use."""

CACHED = ("active_file", "inactive_file")

REMEDY = "set --config.mesh.model to share the model among more devices, dtype=bfloat16, or fewer --config.rows"
"""The remedy where something does not fit beside the model."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes on each device.

    Attributes:
      parameters: the model's.
      fixed: of clean runs and rows, whatever the number of texts.
      text: of each text besides.
      row: of each row.
    """

    parameters: int
    fixed: int
    text: int
    row: int

    def texts(self, free: float, rows: int) -> int:
        """Return the number of texts, of so many rows each, that fit into `free` bytes beside the parameters."""
        return max(0, int((SHARE * free - self.fixed) // (self.text + rows * self.row)))

    def rows(self, free: float, texts: int) -> int:
        """Return the number of rows of each of some texts that fit into `free` bytes beside the parameters."""
        return max(0, int(((SHARE * free - self.fixed) / texts - self.text) // self.row))


def default_rows() -> int:
    """Return the number of rows of a block that fill a device, if its memory takes them."""
    return ROWS.get(jax.default_backend(), ACCELERATOR_ROWS)


@dataclasses.dataclass(frozen=True)
class Asked:
    """The rows of every text of a sweep.

    Attributes:
      programs: G.
      draws: R.
      readings: Q.
      rows: in a block; 0 for the device's default.
      streamed: whether layers are read as they are needed.
      least: programs that are not walked apart.
      by_head: whether is recorded what each head of attention changes.
    """

    programs: int
    draws: int
    readings: int = 1
    rows: int = 0
    streamed: bool = False
    least: int = 1
    by_head: bool = False

    @property
    def at_once(self) -> int:
        """Rows in a block."""
        return self.rows or default_rows()

    @property
    def texts(self) -> int:
        """The number of texts whose rows fill a block."""
        return max(1, self.at_once // (self.draws * self.readings))


def sizes(config: ModelConfig, length: int, model: int, free: float) -> Sizes:
    """Return what is computed at once of clean runs: what is best, or what a share of `free` bytes takes."""
    token, logits = _token(config, length, model), 3 * 4 * config.vocab_size
    return Sizes(
        tokens=int(min(PREFILL_TOKENS, max(length, CLEAN_SHARE * free / token))),
        logits=int(min(UNEMBED_ROWS, max(1, CLEAN_SHARE * free / logits))),
    )


def needs(config: ModelConfig, length: int, asked: Asked, model: int = 1, free: float = math.inf) -> Needs:
    """Return the needs of a walk on a device.

    Args:
      config: the model's.
      length: T, tokens of a text as padded.
      asked: of every text.
      model: devices that share the model.
      free: bytes beside the model.
    """
    c, item = config, jnp.dtype(config.dtype).itemsize
    shared = model if c.kv_heads % model == 0 or c.head_dim % model == 0 else 1
    cache = 2 * c.kv_heads * c.head_dim * length * item // shared
    size, token = sizes(c, length, model, free), _token(c, length, model)
    block = Layout.of(asked.texts, asked.readings, asked.draws, max(1, asked.programs), asked.at_once)
    rows = block.rows * block.texts_at_once if asked.programs else 0
    reading = 4 * (5 * c.width + 2 * c.heads * c.head_dim)
    # A layer is cut out of the stack, or converted where products are made in another type.
    layer = 4 * layer_bytes(c, model) // item if item < 4 or not asked.streamed else 0
    return Needs(
        parameters=meshes.bytes_a_device(c, model, AT_ONCE if asked.streamed else c.layers),
        fixed=layer + max(max(length, size.tokens) * token, rows * token, 3 * 4 * c.vocab_size * size.logits),
        text=3 * 4 * length * c.width
        + 2 * cache
        + asked.readings * reading
        + 4 * asked.draws * asked.readings * c.width,
        # Its shift; what is recorded of it, as it is, joined, scaled by blocks, and in their order.
        row=4 * c.width + 4 * 4 * c.components + (4 * 3 * c.layers * c.heads if asked.by_head else 0),
    )


def _token(config: ModelConfig, length: int, model: int) -> int:
    """Return the bytes that a token or a row takes while a layer computes, in float32."""
    c = config
    stream_and_heads = 6 * c.width + 4 * c.heads * c.head_dim + 3 * c.mlp_width // model
    return 4 * stream_and_heads + 3 * 4 * c.heads * length


def layer_bytes(config: ModelConfig, model: int) -> int:
    """Return the bytes of one layer on each of the `model` devices that share it."""
    return meshes.bytes_a_device(config, model, 1) - meshes.bytes_a_device(config, model, 0)


def free_bytes(device: jax.Device) -> float:
    """Return the free memory of a device; for a CPU, its part of this machine's or this container's."""
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    return host_bytes() / jax.local_device_count()


def left(asked: float, config: ModelConfig, mesh: Mesh, streamed: bool = False) -> float:
    """Return the bytes a device has left beside a loaded model; `asked` GB may be used in all, 0 for no limit.

    Of streamed layers those count that are there at once, of which none is there yet.
    """
    free, model = free_bytes(mesh.local_devices[0]), mesh.shape[meshes.MODEL]
    held = meshes.bytes_a_device(config, model, AT_ONCE if streamed else config.layers)
    coming = AT_ONCE * layer_bytes(config, model) if streamed else 0
    return free - coming if not asked else min(free - coming, asked * 1e9 - held)


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


def streams(config: ModelConfig, model: int, limit: float) -> str:
    """Return a line on how layers are streamed if the parameters do not fit, else "".

    Args:
      config: the model's.
      model: devices that share the model.
      limit: bytes of each that may be used in all.

    Raises:
      UserError: if not even what is not in a layer and two layers fit.
    """
    whole, layer = meshes.bytes_a_device(config, model), layer_bytes(config, model)
    if whole <= SHARE * limit:
        return ""
    item = jnp.dtype(config.dtype).itemsize
    # Products of bfloat16 are made in float32 on a CPU, of a copy.
    least = meshes.bytes_a_device(config, model, AT_ONCE) + (0 if item == 4 else 4 * layer // item)
    if least > limit:
        raise UserError(
            f"memory: the model's parameters take {whole / 1e9:.3g} GB a device, and {AT_ONCE} layers at a time"
            f" {least / 1e9:.3g}; {limit / 1e9:.3g} are there: raise --config.memory, or set --config.mesh.model to"
            f" {model * math.ceil(least / limit)} or more" + (", or dtype=bfloat16" if item == 4 else "")
        )
    return f"weights {whole / 1e9:.3g} GB do not fit into {limit / 1e9:.3g} GB: streaming layers, {AT_ONCE} at a time"


class BatchSizer:
    """Chooses how many texts go at once on a worker's devices, by length; fewer where that turned out too many.

    Attributes:
      asked: the rows of every text.
      free: bytes on each device, besides the model.
      least: the number of texts that all others are a multiple of, one a device.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, asked: Asked, free: float):
        """Take what is known before any text.

        Args:
          config: the model's.
          mesh: the worker's.
          asked: of every text.
          free: bytes on each device, besides the model.
        """
        self._config, self._model = config, mesh.shape[meshes.MODEL]
        if not asked.rows:  # blocks that fill the device, or a share of its memory
            most = int(min(MOST, BLOCK_SHARE * free // _token(config, SHORT, self._model)))
            asked = dataclasses.replace(asked, rows=min(default_rows(), max(LEAST_ROWS, most)))
        self._needs = functools.cache(lambda length, asked: needs(config, length, asked, self._model, free))
        self.asked, self.free = asked, free
        self.least = mesh.shape[meshes.DATA]
        self._several = len({device.process_index for device in mesh.devices.flat}) > 1
        self._most = MOST

    @property
    def wanted(self) -> int:
        """The number of texts that fill the devices."""
        return self.asked.texts * self.least

    def prompts(self, length: int, clean: bool = False) -> int:
        """Return the number of texts of up to `length` tokens, padded, that go at once.

        Args:
          length: T.
          clean: whether they have no rows.

        Raises:
          UserError: if not even one text a device fits.
        """
        asked = dataclasses.replace(self.asked, programs=0, least=0) if clean else self.asked
        need: Needs = self._needs(length, asked)
        of_program = asked.draws * asked.readings
        fitting = need.texts(self.free, asked.least * of_program)
        if fitting < 1:
            wanted = need.fixed + need.text + asked.least * of_program * need.row
            raise UserError(
                f"memory: a prompt of {length} tokens and its replacements want {wanted / 1e9:.2g} GB a device beside"
                f" the model, {SHARE * self.free / 1e9:.2g} are free; {REMEDY}"
            )
        at_once = min(fitting, self._wanted(clean))
        if asked.streamed:  # layers are read once for all texts that go at once
            at_once = max(at_once, need.texts(self.free, asked.programs * of_program))
        return min(at_once * self.least, self._most)

    def programs(self, length: int, texts: int) -> int:
        """Return the number of programs that are walked together for so many texts: all, or as many as fit.

        Others are walked apart and not other texts, so that what is computed at once does not hang on memory.
        """
        need: Needs = self._needs(length, self.asked)
        fitting = need.rows(self.free, -(-texts // self.least)) // (self.asked.draws * self.asked.readings)
        least = self.asked.least
        return min(self.asked.programs, max(least, fitting // least * least))

    def chunk(self, length: int) -> int:
        """Return the number of texts whose results are written together: those that go at once."""
        return self.prompts(length) if self.asked.streamed else self.wanted

    def sizes(self, length: int) -> Sizes:
        """Return what is computed at once of the clean runs of texts of up to `length` tokens, padded."""
        return sizes(self._config, length, self._model, self.free)

    def parts(self, texts: int, clean: bool = False) -> int:
        """Return the number of parts of one size that texts go through a layer in, one after another."""
        return -(-texts // (self._wanted(clean) * self.least))

    def fill_up(self, texts: int, clean: bool = False) -> int:
        """Return the number of texts that `texts` are filled up to, so that parts and devices have as many each."""
        together = self.parts(texts, clean) * self.least
        return -(-texts // together) * together

    def _wanted(self, clean: bool) -> int:
        """Return the number of texts that fill a device."""
        return max(1, self.asked.at_once // SHORT) if clean else self.asked.texts

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
                    rows = max(1, self.asked.texts // 2) * self.asked.draws
                    raise UserError(
                        f"memory: {size} prompts at once do not fit on the devices, and those of other processes go on"
                        f" with as many; start again with --config.rows={rows}"
                    ) from error
                if size == self.least:
                    raise UserError(f"memory: not even one prompt a device fits; {REMEDY}") from error
                self._most = max(self.least, size // 2 // self.least * self.least)
            say(f"out of memory with {size} prompts at once: going on with {self._most}")
