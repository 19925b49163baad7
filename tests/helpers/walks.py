"""Walks of tiny models by the engine: what clamps take is drawn by the text's name and the component alone."""

from typing import NamedTuple

import jax
import numpy as np

from hydra_jax.core.edits import WHOLE, Kind, WriteStatistics
from hydra_jax.core.effects import Effects
from hydra_jax.core.prefill import Reading
from hydra_jax.core.programs import first_clamp, together
from hydra_jax.engine.layers import Resident
from hydra_jax.engine.rows import Draws, Rows
from hydra_jax.engine.walk import Texts, forward
from hydra_jax.models.transformer import Contrast

DRAWS = 3


class Walked(NamedTuple):
    """What a walk leaves: its rows; what the texts say, [P, Q]; the rows' effects, [P, G, Q, R]."""

    rows: Rows
    reading: Reading
    effects: Effects


def width(config, component):
    """The numbers that a component's value has."""
    return config.width if component.head == WHOLE else config.head_dim


def source(config, name, component):
    """What clamps of a component take in a text of a name, [R, E]."""
    random = np.random.default_rng([name, component.index, component.head + 1])
    return random.normal(size=(DRAWS, width(config, component))).astype(np.float32)


def statistics(config, component):
    """Means and deviations that no values have."""
    return WriteStatistics(*np.random.default_rng(component.index).uniform(1, 2, (2, width(config, component))))


def contrasts(names, readings):
    """What is read of each text, [P, Q, 2]: a token less another, or half of it."""
    first = np.array([[3 * name + place for place in range(readings)] for name in names])
    weights = np.array([[[1, -1 / (1 + place)] for place in range(readings)] for _ in names])
    return Contrast((np.stack([first, first + 7], axis=-1) % 61).astype(np.int32), weights.astype(np.float32))


def walk(
    params, tokens, places, programs, at_once=8, names=None, kind=Kind.RESAMPLE, by_head=False, read=None, clamps=None
):
    """Walk texts [P, T], read after those tokens at `places` [P, Q], with rows of every program.

    Args:
      params: the model, on whatever mesh.
      tokens: the texts.
      places: where they are read.
      programs: in order of their first clamps.
      at_once: rows in a block, about.
      names: numbers that texts go by; None for their indices.
      kind: of the values of clamps.
      by_head: whether is recorded what each head changes.
      clamps: as of `Rows`.
      read: contrasts; None for those of `contrasts`.
    """
    c, names = params.config, range(len(tokens)) if names is None else names
    assert [first_clamp(one) for one in programs] == sorted(first_clamp(one) for one in programs)
    read = read or contrasts(names, places.shape[1])
    texts = Texts(params, tokens, places)
    rows = Rows(texts, together(programs), DRAWS, read, at_once, by_head, clamps)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), np.array(names, np.uint32))
    values = Draws(
        *(texts.mesh, rows.layout, kind, texts.put(keys)),
        lambda component: texts.put(np.stack([source(c, name, component) for name in names])),
        lambda component: WriteStatistics(
            *(texts.put(np.tile(part.astype(np.float32), (len(tokens), 1))) for part in statistics(c, component))
        ),
    )
    for number, layer in enumerate(forward(c, Resident(params))):
        rows.through(number, layer, texts.through(layer), values)
    reading = texts.read(read)
    return Walked(rows, jax.device_get(reading), jax.device_get(rows.effects(reading)))
