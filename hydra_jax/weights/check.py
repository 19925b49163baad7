"""The check of every model that is loaded, on two short inputs."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Executor
from typing import Any

import flax.struct
import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hydra_jax.core.prefill import MOST_LIKELY, prefill
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.batching import fill_up, round_up
from hydra_jax.engine.layers import Layers
from hydra_jax.engine.walk import Texts, clean_runs
from hydra_jax.errors import UserError
from hydra_jax.models import transformer
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import Contrast, Params

LONG, SHORT = 8, 5
TOLERANCES = {("float32", "highest"): 1e-4}
ROUNDED_TOLERANCE = 3e-2
"""The tolerance where products round their inputs."""


OPTIONS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
"""Options of the compiler: a CPU, which computes in float32, would convert all layers' bfloat16 weights at once."""


class Read(flax.struct.PyTreeNode):
    """The part of P prompts' clean runs that is compared, at their last tokens; more would take longer to compile.

    Attributes:
      entering: [P, D], what the first layer reads.
      writes: [P, L, 2, D], each component's write.
      final: [P, D], the stream after the last layer.
      readout: [P, D], r of the most likely next token.
      constant: [P], what no write adds to its centred logit.
      final_scale: [P], sigma.
      centred_logit: [P].
    """

    entering: jax.Array
    writes: jax.Array
    final: jax.Array
    readout: jax.Array
    constant: jax.Array
    final_scale: jax.Array
    centred_logit: jax.Array


def _read(params: Params, tokens: jax.Array, lengths: jax.Array) -> Read:
    """Run P prompts, padded to tokens [P, T], and return what is compared."""
    entering = jax.vmap(lambda tokens, length: transformer.embed(params, tokens)[length - 1])(tokens, lengths)
    clean = jax.vmap(prefill, (None, 0, 0))(params, tokens, lengths)
    return Read(
        entering=entering,
        writes=clean.layers.writes,
        final=clean.final,
        readout=clean.readout,
        constant=clean.constant,
        final_scale=clean.final_scale,
        centred_logit=clean.centred_logit,
    )


def _final(params: Params, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Run P prompts, padded to tokens [P, T], and return their final streams [P, D]."""
    return jax.vmap(prefill, (None, 0, 0))(params, tokens, lengths).final


class Check:
    """The check of a model that is still to be read; its programs are compiled meanwhile."""

    def __init__(self, config: ModelConfig, mesh: Mesh | None, beside: Executor) -> None:
        """Begin to compile.

        Args:
          config: the model's.
          mesh: the devices that its parameters will lie on; None for one device.
          beside: what compiles.
        """
        self._config = config
        self._both, self._alone = _inputs(config)
        like = _layout(config, mesh)
        # On every device, as those of other processes cannot be read.
        everywhere: Any = {} if mesh is None else {"out_shardings": NamedSharding(mesh, PartitionSpec())}
        # Lowered here, as threads do not have the settings of JAX that hold in a `with` around this.
        lowered = [
            jax.jit(run, compiler_options=OPTIONS, **everywhere).lower(like, *inputs)
            for run, inputs in ((_read, self._both), (_final, self._alone))
        ]
        self._programs = [beside.submit(program.compile) for program in lowered]

    def __call__(self, params: Params, where: str) -> None:
        """Check a model.

        Args:
          params: the model.
          where: what a fault is reported of.

        Raises:
          UserError: as `compare`.
        """
        read, final = (program.result() for program in self._programs)
        both: Any = jax.device_get(read(params, *self._both))
        alone: np.ndarray = jax.device_get(final(params, *self._alone))
        compare(self._config, both, alone, where)


def check_streamed(params: Params, layers: Layers, where: str) -> None:
    """Check a model whose layers are read as they are needed, by one reading of each.

    Args:
      params: what is not in a layer.
      layers: the layers.
      where: what a fault is reported of.

    Raises:
      UserError: as `compare`.
    """
    c, devices = params.config, meshes.mesh_of(params).shape[meshes.DATA]
    both, alone = (_texts(params, *inputs, devices) for inputs in _inputs(c))
    entering = jax.device_get(both.stream)[range(2), jax.device_get(both.positions)[:2, 0]]
    runs = clean_runs(layers, (both, alone))
    writes = [jax.device_get(clean.writes)[:2, 0] for _, index, clean in runs if index == 0]
    reading, short = (jax.device_get(texts.read(_top(texts))) for texts in (both, alone))
    said: dict[str, Any] = {
        field.name: getattr(reading, field.name)[:2, 0]
        for field in dataclasses.fields(Read)
        if field.name not in ("entering", "writes")
    }
    said |= {"entering": entering, "writes": np.stack(writes, axis=1)}
    compare(c, Read(**said), short.final[:1, 0], where)


def _inputs(config: ModelConfig) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return tokens and lengths of a long and a short input, the short one padded; and of that one as it is."""
    long, short = min(LONG, config.context), min(SHORT, config.context)
    tokens = ((np.arange(2 * long) * 7919 + 11).reshape(2, long) % config.vocab_size).astype(np.int32)
    return (tokens, np.array([long, short], np.int32)), (tokens[1:, :short], np.array([short], np.int32))


def _texts(params: Params, tokens: np.ndarray, lengths: np.ndarray, devices: int) -> Texts:
    """Return the texts, and the last one as often again as divides them among devices."""
    count = round_up(len(tokens), devices)
    return Texts(params, np.stack(fill_up(list(tokens), count)), np.stack(fill_up(list(lengths), count))[:, None] - 1)


def _top(texts: Texts) -> Contrast:
    shape = (*texts.positions.shape, 1)
    return Contrast(np.full(shape, MOST_LIKELY, np.int32), np.ones(shape, np.float32))


def compare(config: ModelConfig, both: Any, alone: np.ndarray, where: str) -> None:
    """Compare a long and a short input's runs, the short one padded and, its final stream [1, D], as it is.

    Differences are relative to the stream's norm, or to the logit that it has room for.

    Args:
      config: the model's.
      both: the runs, a `Read` on this host.
      alone: the final stream of the short one.
      where: what a fault is reported of.

    Raises:
      UserError: that says which check failed: that the writes sum to the stream, that what the lens says
        they contribute sums to the logit, or that padding changes nothing.
    """
    c = config
    room = np.linalg.norm(both.final, axis=1)
    room_of_logit = room * np.linalg.norm(both.readout, axis=1) / both.final_scale

    def lens(vectors: np.ndarray) -> np.ndarray:
        return (vectors * both.readout).sum(axis=1) / both.final_scale

    parts = both.writes.reshape(2, c.components, c.width)
    contributions = sum(lens(parts[:, i]) for i in range(c.components)) + lens(both.entering) + both.constant
    off = np.linalg.norm(both.entering + parts.sum(axis=1) - both.final, axis=1)
    differences = {
        "the writes do not sum to the stream": off / room,
        "the contributions do not sum to the logit": np.abs(contributions - both.centred_logit) / room_of_logit,
        "padding changes the stream": np.linalg.norm(alone[0] - both.final[1]) / room[1],
    }
    allowed = TOLERANCES.get((c.dtype, c.precision), ROUNDED_TOLERANCE)
    for fault, difference in differences.items():
        worst = np.max(difference)
        if not worst <= allowed:  # NaN is wrong too
            raise UserError(
                f"{where}: {fault}, by {worst:.2g} of its size (more than {allowed:g}); the weights are damaged,"
                " or this model is not what its settings say"
            )


def _layout(config: ModelConfig, mesh: Mesh | None) -> Params:
    """Return the model's parameters without values, and where they will lie."""
    params = transformer.layout(config)
    if mesh is None:
        return params
    flat = transformer.flat(params.weights)
    lying = {
        name: jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=meshes.parameter(mesh, name, like.shape))
        for name, like in flat.items()
    }
    return params.replace(weights=traverse_util.unflatten_dict(lying, sep="/"))
