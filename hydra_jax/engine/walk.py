"""One walk over the layers: a chunk of texts, and every row of theirs, through each layer before the next.

Of a chunk the devices hold the texts' streams, one layer's keys and values, and for each row its shift, its direct
effect and what is recorded of it. Inside, all is written for the texts of one device; `mesh.spread` runs that on every
device of the data axis.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from hydra_jax.core.prefill import LayerClean, Reading, read
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.layers import Layers
from hydra_jax.models import pieces, transformer
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.layers import positions
from hydra_jax.models.pieces import LayerParams
from hydra_jax.models.transformer import Contrast, Params

PREFILL_TOKENS = 4096
"""Tokens of clean runs at once: a layer's intermediate values for all of them are in memory together."""

UNEMBED_ROWS = 256
"""Streams that are unembedded at once: the logits of all of them are in memory together."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The most that is computed at once of clean runs: a matter of memory alone.

    Attributes:
      tokens: that go through a layer.
      logits: streams that are unembedded.
    """

    tokens: int = PREFILL_TOKENS
    logits: int = UNEMBED_ROWS


def forward(config: ModelConfig, layers: Layers) -> Iterator[LayerParams]:
    """Yield a model's layers, with their positions, in forward order."""
    every = jax.tree.map(np.asarray, positions(config))
    for number, weights in enumerate(layers):
        yield LayerParams(weights, jax.tree.map(lambda leaf, number=number: leaf[number], every), config)


class Texts:
    """P texts on their way through the layers, each read after Q of its tokens.

    Attributes:
      params: the model, of which its layers are not needed.
      mesh: its devices.
      readings: Q.
      positions: [P, Q], the tokens' places.
      stream: [P, T, D], before the next layer.
    """

    def __init__(
        self, params: Params, tokens: Int[np.ndarray, "P T"], places: Int[np.ndarray, "P Q"], sizes: Sizes | None = None
    ) -> None:
        """Embed `tokens`, padded on the right, that will be read after those at `places`."""
        self._sizes = sizes or Sizes(PREFILL_TOKENS, UNEMBED_ROWS)
        self.params, self.mesh, self.readings = params, meshes.mesh_of(params), places.shape[1]
        self.positions = self.put(places)
        self.stream = embed_program(params)(params, self.put(tokens))

    def put(self, array: Shaped[meshes.Leaf, "*shape"]) -> Shaped[Array, "*shape"]:
        """Put an array [P, ...] of this host on the devices of its texts."""
        return meshes.put(self.mesh, array, meshes.Spec(meshes.DATA))

    def through(self, layer: LayerParams) -> LayerClean:
        """Take the texts through a layer, and return their clean runs in it, [P, Q, ...]."""
        self.stream, clean = clean_program(self.params, self._sizes.tokens)(layer, self.stream, self.positions)
        return clean

    def contrast(self, contrasts: Contrast) -> tuple[Float[Array, "P Q D"], Float[Array, "P Q"]]:
        """Return r and const of contrasts [P, Q, K]; none of their tokens is MOST_LIKELY."""
        return contrast_program(self.params)(self.params, jax.tree.map(self.put, contrasts))

    def contributions(
        self, layer: LayerParams, clean: LayerClean, readout: Float[Array, "P Q D"], by_head: bool = False
    ) -> tuple[Float[Array, "P Q 2"], Float[Array, "P Q H"] | None]:
        """Return <w, r> of each write of a layer and, `by_head`, of each head's share: what they add, times sigma."""
        return program(self.mesh, _contributions, (0,), by_head=by_head)(layer, clean, readout)

    def read(self, contrasts: Contrast) -> Reading:
        """Return what the texts say, [P, Q, ...], after the last layer."""
        placed = jax.tree.map(self.put, contrasts)
        return read_program(self.params, self._sizes.logits)(self.params, self.stream, self.positions, placed)


@functools.cache
def program(
    mesh: Mesh, run: Callable[..., Any], replicated: tuple[int, ...], donated: tuple[int, ...] = (), **switches: Any
) -> jax.stages.Wrapped:
    """Return the jitted `run` with its `switches` set, as `mesh.spread` does: for equal arguments the same."""
    return meshes.spread(mesh, functools.partial(run, **switches), replicated, donated=donated)


def clean_runs(layers: Layers, every: Sequence[Texts]) -> Iterator[tuple[int, int, LayerClean]]:
    """Take texts that have no rows through all layers.

    Yields:
      The layer's number, the index in `every`, and the clean runs [P, Q, ...] of those texts in that layer.
    """
    for number, layer in enumerate(forward(every[0].params.config, layers)):
        for index, texts in enumerate(every):
            yield number, index, texts.through(layer)
            if layers.streamed:  # room has to be made for the next layer
                jax.block_until_ready(texts.stream)


def embed_program(params: Params) -> jax.stages.Wrapped:
    """Return the jitted (params, tokens [P, T]) -> streams [P, T, D]."""
    return program(meshes.mesh_of(params), _embed, (0,))


def clean_program(params: Params, at_once: int = PREFILL_TOKENS) -> jax.stages.Wrapped:
    """Return the jitted (layer, streams [P, T, D], places [P, Q]) -> streams after it, LayerClean [P, Q, ...]."""
    return _clean_program(meshes.mesh_of(params), params.config, at_once)


def contrast_program(params: Params) -> jax.stages.Wrapped:
    """Return the jitted (params, Contrast [P, Q, K]) -> r [P, Q, D], const [P, Q]."""
    return program(meshes.mesh_of(params), _contrast, (0,))


def read_program(params: Params, at_once: int = UNEMBED_ROWS) -> jax.stages.Wrapped:
    """Return the jitted (params, streams [P, T, D], places [P, Q], Contrast [P, Q, K]) -> Reading [P, Q, ...]."""
    return program(meshes.mesh_of(params), _read, (0,), at_once=at_once)


@functools.cache
def _clean_program(mesh: Mesh, config: ModelConfig, at_once: int) -> jax.stages.Wrapped:
    run = functools.partial(_clean, at_once=at_once)
    return meshes.spread(mesh, run, (0,), (meshes.over_data(mesh), meshes.clean_layer(mesh, config)))


def _embed(params: Params, tokens: Int[Array, "P T"]) -> Float[Array, "P T D"]:
    return jax.vmap(transformer.embed, (None, 0))(params, tokens)


def _clean(
    layer: LayerParams, stream: Float[Array, "P T D"], places: Int[Array, "P Q"], at_once: int
) -> tuple[Float[Array, "P T D"], LayerClean]:
    def text(text: tuple[Float[Array, "T D"], Int[Array, " Q"]]) -> tuple[Float[Array, "T D"], LayerClean]:
        after, trace = pieces.run(layer, *text)
        return after, LayerClean.of(trace)

    return jax.lax.map(text, (stream, places), batch_size=max(1, at_once // stream.shape[1]))


def _contrast(params: Params, contrasts: Contrast) -> tuple[Float[Array, "P Q D"], Float[Array, "P Q"]]:
    over_texts = jax.vmap(jax.vmap(transformer.readout, (None, 0)), (None, 0))
    return over_texts(params, contrasts)


def _contributions(
    layer: LayerParams, clean: LayerClean, readout: Float[Array, "P Q D"], by_head: bool
) -> tuple[Float[Array, "P Q 2"], Float[Array, "P Q H"] | None]:
    writes = jnp.einsum("pqsd,pqd->pqs", clean.writes, readout, precision="highest")
    if not by_head:
        return writes, None
    readouts = jax.vmap(jax.vmap(pieces.head_readouts, (None, 0, 0)), (None, 0, 0))(layer, readout, clean.mixed)
    return writes, (clean.mixed * readouts).sum(axis=-1)


def _read(
    params: Params, stream: Float[Array, "P T D"], places: Int[Array, "P Q"], contrasts: Contrast, at_once: int
) -> Reading:
    final = jax.vmap(lambda text, at: text[at])(stream, places)
    every = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (final, places, contrasts))
    readings = jax.lax.map(lambda one: read(params, *one), every, batch_size=at_once)
    return jax.tree.map(lambda leaf: leaf.reshape(*places.shape, *leaf.shape[1:]), readings)
