"""Programs run by the engine with values that a test gives, and by the definition of one row."""

from typing import NamedTuple

import jax
import numpy as np

from hydra_jax.core.edits import ATTN, WHOLE, Component, Kind, WriteStatistics
from hydra_jax.core.effects import Effects, effects
from hydra_jax.core.metrics import Metrics
from hydra_jax.core.prefill import Clean, LayerClean, Reading, read
from hydra_jax.core.programs import Word, first_clamp, together
from hydra_jax.core.row import Values, Words, walk
from hydra_jax.engine.layers import Resident
from hydra_jax.engine.rows import Draws, Rows
from hydra_jax.engine.walk import Texts, forward
from hydra_jax.models import transformer
from hydra_jax.models.layers import positions
from hydra_jax.models.pieces import LayerParams


class Ran(NamedTuple):
    """What the engine says of P texts, [P, Q], and of their rows, [P, G, Q, R], in the order of the programs given."""

    reading: Reading
    effects: Effects
    metrics: Metrics
    head_changes: np.ndarray


def clamped(program):
    """The components that a program sets to values."""
    writes, heads = (np.argwhere(words == Word.CLAMP).tolist() for words in (program.writes, program.heads))
    return [Component(*place) for place in writes] + [Component(layer, ATTN, head) for layer, head in heads]


def padded(texts):
    """Texts as tokens [P, T], and the places of their last tokens, [P, 1]."""
    longest = max(map(len, texts))
    tokens = np.array([[*text, *[0] * (longest - len(text))] for text in texts], np.int32)
    return tokens, np.array([[len(text) - 1] for text in texts])


def clean_runs(params, tokens, places):
    """Every text's writes, [P, Q, L, 2, D], and what its heads mix, [P, Q, L, H, head_dim]."""
    texts = Texts(params, tokens, places)
    layers = [texts.through(layer) for layer in forward(params.config, Resident(params))]
    return tuple(np.stack([getattr(layer, name) for layer in layers], axis=2) for name in ("writes", "mixed"))


def run(params, tokens, places, programs, read, values, draws, kind=Kind.RESAMPLE, at_once=8):
    """Run programs, in any order, by the engine.

    Args:
      params: the model.
      tokens: [P, T].
      places: [P, Q].
      programs: G of them.
      read: contrasts, [P, Q, K].
      values: returns what a component's clamps take, [P, draws, E].
      draws: R.
      kind: how the engine makes the values; of MEAN they are the same in all rows.
      at_once: rows in a block, about.
    """
    order = sorted(range(len(programs)), key=lambda which: first_clamp(programs[which]))
    texts = Texts(params, tokens, places)
    rows = Rows(texts, together([programs[which] for which in order]), draws, read, at_once, by_head=True)

    def statistics(component):
        mean = texts.put(values(component)[:, 0])
        return WriteStatistics(mean, texts.put(np.full(mean.shape, np.nan, np.float32)))

    keys = texts.put(jax.random.split(jax.random.key(0), len(tokens)))
    drawn = Draws(*(texts.mesh, rows.layout, kind, keys), lambda component: texts.put(values(component)), statistics)
    for number, layer in enumerate(forward(params.config, Resident(params))):
        rows.through(number, layer, texts.through(layer), drawn)
    reading = texts.read(read)
    found = jax.device_get((rows.effects(reading), rows.metrics(reading), rows.head_changes(reading)))
    return Ran(jax.device_get(reading), *jax.tree.map(lambda leaf: leaf[:, np.argsort(order)], found))


@jax.jit
def clean_run(params, tokens, place, contrast):
    """The clean run of one text, read by a contrast."""
    _, trace = transformer.forward(params, tokens, only=place)
    reading = read(params, trace.resid_post[-1], place, contrast)
    return Clean(**{name: getattr(reading, name) for name in Reading.__dataclass_fields__}, layers=LayerClean.of(trace))


@jax.jit
def _defined(params, clean, words, values, frozen, probed):
    layers = LayerParams(params.weights["layers"], positions(params.config), params.config)
    return effects(params, clean, walk(layers, clean, words, values), frozen, probed)


def defined(params, clean, program, values):
    """The effects of one row by `core.row.walk`; `values` returns what a component's clamp takes, [E]."""
    c = params.config
    writes = np.full((c.layers, 2, c.width), np.nan, np.float32)
    mixed = np.full((c.layers, c.heads, c.head_dim), np.nan, np.float32)
    for component in clamped(program):
        if component.head == WHOLE:
            writes[component.layer, component.site] = values(component)
        else:
            mixed[component.layer, component.head] = values(component)
    living = program.living(c.parallel)
    words = Words(program.writes, program.heads, living)
    probed = (program.writes == Word.PROBE) & living
    return _defined(params, clean, words, Values(writes, mixed), program.norm == Word.FREEZE, probed)
