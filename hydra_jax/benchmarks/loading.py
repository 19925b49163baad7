"""The host memory that loading takes, from two checkpoints of one shape, each loaded by a process of its own.

Only anonymous memory counts: the system takes the pages of a mapped weight file back whenever it wants them. Two
sizes give a slope, bytes held for each byte of checkpoint, and an offset, the bytes that any loading holds.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util
from tokenizers import Tokenizer, models

from hydra_jax.errors import UserError
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import init_params
from hydra_jax.weights import families
from hydra_jax.weights.directory import INDEX

LLAMA_7B = ModelConfig(32_000, 4096, 32, 32, 32, 128, 11_008, 4096, dtype="bfloat16")
LAYERS = 2, 6
"""The two checkpoints' numbers of layers: 1.3 and 3.0 GB of the 13.5 that all 32 layers would be."""

POLL_SECONDS = 0.002
LOAD = "import sys, hydra_jax; hydra_jax.load(sys.argv[1], dtype=sys.argv[2])"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The figures of loading one checkpoint.

    Attributes:
      layers: layers of the model.
      checkpoint_bytes: size of its weights.
      peak_bytes: the most anonymous memory that the process held, Python and JAX included.
      ratio: peak_bytes to checkpoint_bytes.
      seconds: time of the whole process, imports and checks included.
    """

    layers: int
    checkpoint_bytes: int
    peak_bytes: int
    ratio: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Line:
    """The line through two checkpoints' figures.

    Attributes:
      slope: bytes held for each byte of checkpoint.
      offset_bytes: bytes held besides, whatever the checkpoint.
      whole_bytes: size of the checkpoint with all of the shape's layers.
      whole_ratio: the ratio of memory to checkpoint that the line gives for it.
    """

    slope: float
    offset_bytes: float
    whole_bytes: int
    whole_ratio: float


def measure(shape: ModelConfig = LLAMA_7B, layers: Sequence[int] = LAYERS) -> Iterator[Loaded]:
    """Write, load and remove one checkpoint after another.

    Args:
      shape: a Llama's shape; its dtype is that of the checkpoint and of the loaded weights.
      layers: the number of layers of each checkpoint.

    Raises:
      UserError: if the disk is full, loading fails, or this is not Linux.
    """
    for count in layers:
        config = dataclasses.replace(shape, layers=count)
        with tempfile.TemporaryDirectory(prefix="hydra_jax-") as temporary:
            try:
                size = write_checkpoint(Path(temporary), config)
            except OSError as error:
                raise UserError(
                    f"{temporary}: {error.strerror or error}; free {checkpoint_bytes(config) / 1e9:.1f} GB, or set"
                    " TMPDIR to another directory"
                ) from error
            start = time.perf_counter()
            peak = peak_anonymous([sys.executable, "-c", LOAD, temporary, config.dtype])
            yield Loaded(count, size, peak, peak / size, time.perf_counter() - start)


def line(small: Loaded, large: Loaded, shape: ModelConfig = LLAMA_7B) -> Line:
    """Return the line through the figures of two checkpoints of `shape`."""
    slope = (large.peak_bytes - small.peak_bytes) / (large.checkpoint_bytes - small.checkpoint_bytes)
    offset = large.peak_bytes - slope * large.checkpoint_bytes
    whole = checkpoint_bytes(shape)
    return Line(slope, offset, whole, slope + offset / whole)


def checkpoint_bytes(config: ModelConfig) -> int:
    """Return the size of a checkpoint's weights, all of the config's dtype."""
    return sum(copies * math.prod(shape) for _, shape, copies in _published(config)) * jnp.dtype(config.dtype).itemsize


def write_checkpoint(directory: Path, config: ModelConfig, seed: int = 0) -> int:
    """Write a Llama of random weights as it would be published: `config.json`, `tokenizer.json`, a shard a layer.

    Args:
      directory: an empty one.
      config: a Llama's config.
      seed: the seed of the weights.

    Returns:
      The size of the weights in bytes.
    """
    stated = dict(
        model_type="llama",
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.mlp_width,
        max_position_embeddings=config.context,
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_base,
        tie_word_embeddings=config.tied,
        torch_dtype=config.dtype,
    )
    (directory / "config.json").write_text(json.dumps(stated))
    Tokenizer(models.WordLevel({"?": 0}, unk_token="?")).save(str(directory / "tokenizer.json"))
    shards: dict[str, list[tuple[str, tuple[int, ...]]]] = collections.defaultdict(list)
    for name, shape, copies in _published(config):
        for layer in range(copies):
            shard = f"model-{layer + 2 if '{}' in name else 1:05}-of-{config.layers + 1:05}.safetensors"
            shards[shard].append((name.format(layer), shape))
    random, size = np.random.default_rng(seed), 0
    for shard, tensors in shards.items():
        drawn = {name: _weights(random, shape, config) for name, shape in tensors}
        safetensors.numpy.save_file(drawn, directory / shard)
        size += sum(array.nbytes for array in drawn.values())
    names = {name: shard for shard, tensors in shards.items() for name, _ in tensors}
    (directory / INDEX).write_text(json.dumps({"weight_map": names}))
    return size


def peak_anonymous(command: Sequence[str]) -> int:
    """Run a command and return the most bytes of anonymous memory that it held, as polled.

    Raises:
      UserError: if the command fails, or the system has no /proc.
    """
    if not Path("/proc/self/status").is_file():
        raise UserError("memory is read from /proc, which this system does not have; measure it on Linux")
    peak = 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while process.poll() is None:
                peak = max(peak, _anonymous(process.pid))
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        messages = errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
    if process.returncode:
        raise UserError(f"the loading process ended with {process.returncode} ({messages[-1]})")
    return peak


def table(rows: Sequence[Loaded], fitted: Line) -> str:
    """Return the figures as a table, a line for each checkpoint, and what they imply for the whole model."""
    lines = [f"{'layers':>6} {'checkpoint GB':>14} {'peak GB':>8} {'ratio':>6} {'seconds':>8}"]
    lines += [
        f"{row.layers:6} {row.checkpoint_bytes / 1e9:14.2f} {row.peak_bytes / 1e9:8.2f} {row.ratio:6.2f}"
        f" {row.seconds:8.0f}"
        for row in rows
    ]
    lines += [
        "",
        f"slope: {fitted.slope:.3f} bytes a byte of checkpoint, besides {fitted.offset_bytes / 1e9:.2f} GB;"
        f" of the whole {fitted.whole_bytes / 1e9:.1f} GB that is {fitted.whole_ratio:.2f} times its size",
    ]
    return "\n".join(lines)


def _anonymous(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0
    kilobytes = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kilobytes[1]) * 1024 if kilobytes else 0


def _published(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Yield each parameter's name (`{}` for the layer), its shape in a layer, and how many layers have it."""
    template = jax.eval_shape(lambda: init_params(config, jax.random.key(0))).weights
    for path, struct in traverse_util.flatten_dict(template, sep="/").items():
        stacked = path.startswith("layers/")
        shape = struct.shape[1:] if stacked else struct.shape
        flipped = path.endswith("/kernel") or path == "unembedding"
        name = families.LLAMA[path.rpartition("/")[0] or path][0]
        yield f"{name}.weight", shape[::-1] if flipped else shape, config.layers if stacked else 1


def _weights(random: np.random.Generator, shape: tuple[int, ...], config: ModelConfig) -> np.ndarray:
    """Draw one parameter: gains of 1, and matrices that keep a stream's size, so that the checks of loading pass."""
    drawn = np.ones(shape, np.float32) if len(shape) == 1 else random.standard_normal(shape, np.float32)
    return (drawn * (shape[-1] ** -0.5 if len(shape) > 1 else 1)).astype(jnp.dtype(config.dtype))
