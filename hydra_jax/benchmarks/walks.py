"""A walk of made-up prompts in which some components are ablated, each by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hydra_jax.core.edits import Component, Kind, WriteStatistics
from hydra_jax.core.effects import Effects
from hydra_jax.core.prefill import MOST_LIKELY, LayerClean
from hydra_jax.core.programs import program, together
from hydra_jax.engine.layers import Resident
from hydra_jax.engine.rows import Draws, Rows
from hydra_jax.engine.walk import Texts, forward
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import Contrast, Params

Sources = Callable[[Component, LayerClean], Any]
"""Returns a component's replacements [P, R, D], given the texts' clean runs in its layer."""


def random_tokens(config: ModelConfig, prompts: int, length: int, seed: int = 0) -> np.ndarray:
    """Draw tokens [P, T]."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (prompts, length), np.int32)


def walk(
    params: Params,
    tokens: np.ndarray,
    targets: np.ndarray,
    components: Sequence[Component],
    draws: int,
    at_once: int,
    sources: Sources,
    turn: Callable[[], object] = lambda: None,
) -> Effects:
    """Ablate components in prompts, read after their last tokens; returns the effects [P, A, 1, R].

    Args:
      params: the model, on whatever mesh.
      tokens: [P, T].
      targets: [P], the token whose logit is read.
      components: A whole writes, in forward order.
      draws: R.
      at_once: rows in a block, about.
      sources: of replacements, which are there before rows go through the layer.
      turn: called after every layer.
    """
    c, (prompts, length) = params.config, tokens.shape
    texts = Texts(params, tokens, np.full((prompts, 1), length - 1, np.int32))
    asked = Contrast.target(targets.astype(np.int32)[:, None])
    rows = Rows(texts, together([program(c, clamp=[each]) for each in components]), draws, asked, at_once)
    keys = texts.put(jax.random.split(jax.random.key(0), prompts))
    nothing = WriteStatistics(*np.zeros((2, len(tokens), 1), np.float32))
    ready: dict[Component, Any] = {}
    values = Draws(texts.mesh, rows.layout, Kind.RESAMPLE, keys, ready.__getitem__, lambda component: nothing)
    for number, layer in enumerate(forward(c, Resident(params))):
        clean = texts.through(layer)
        ready.clear()
        ready.update({each: sources(each, clean) for each in components if each.layer == number})
        jax.block_until_ready(ready)
        rows.through(number, layer, clean, values)
        turn()
    return rows.effects(texts.read(asked))


def others(component: Component, clean: LayerClean, draws: int) -> jax.Array:
    """Return other prompts' writes as a prompt's replacements, as in a sweep."""
    writes = clean.writes[:, 0, component.site]
    return jnp.stack([jnp.roll(writes, draw + 1, axis=0) for draw in range(draws)], axis=1)


def last_alike(config: ModelConfig, components: Sequence[Component]) -> list[Component]:
    """Return as many components of the last layer, of the same sites: a walk that compiles all and computes little."""
    return sorted(Component(config.layers - 1, component.site) for component in components)


def most_likely(params: Params, tokens: np.ndarray) -> np.ndarray:
    """Return the most likely token [P] after each of the prompts [P, T]."""
    prompts, length = tokens.shape
    texts = Texts(params, tokens, np.full((prompts, 1), length - 1, np.int32))
    for layer in forward(params.config, Resident(params)):
        texts.through(layer)
    reading = texts.read(Contrast.target(np.full((prompts, 1), MOST_LIKELY, np.int32)))
    return np.asarray(reading.top)[:, 0]
