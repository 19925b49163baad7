"""Programs: for each component in forward order a word that says what it does in a row, and so what is asked.

| question | program |
| --- | --- |
| ablate c | CLAMP c, FOLLOW the rest |
| ablate a set | CLAMP each |
| direct edges of c | CLAMP c, PROBE the rest |
| what if d could not repair? | CLAMP c, FREEZE d |
| c's effect through d alone | CLAMP c, FREEZE all between c and d |
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import flax.struct
import numpy as np
from jaxtyping import Bool, Int

from hydra_jax.core.edits import ATTN, SITES, WHOLE, Ablation, Component, all_components, parse
from hydra_jax.errors import UserError, shown
from hydra_jax.models.config import ModelConfig

NORM = "norm"
"""The final norm's divisor, as a component that can be frozen."""


class Word(enum.IntEnum):
    """A component's part in a row: w is its clean write, f(clean + s) what it computes from the shifted stream."""

    FOLLOW = 0  # it writes f(clean + s); recorded: the change
    CLAMP = 1  # it writes a value, whatever it reads; recorded: minus its direct effect
    FREEZE = 2  # it writes w, whatever it reads
    PROBE = 3  # it writes w; recorded: the change that f(clean + s) would have been


HEAD_WORDS = Word.FOLLOW, Word.CLAMP, Word.FREEZE
NORM_WORDS = Word.FOLLOW, Word.FREEZE


class Program(flax.struct.PyTreeNode):
    """A row's program; or G programs, along a first axis.

    Attributes:
      writes: [L, 2] words of attention and MLP.
      heads: [L, H] words of attention's heads: what one mixes is set (CLAMP), clean (FREEZE) or its own (FOLLOW), and
        the write is computed anew of all of them. Where one is not FOLLOW, the layer's attention is.
      norm: [] word of the final norm's divisor, FOLLOW or FREEZE.
    """

    writes: Any
    heads: Any
    norm: Any

    @property
    def by_heads(self) -> Bool[np.ndarray, "*G L"]:
        """Whether any of a layer's heads does other than FOLLOW."""
        return (self.heads != Word.FOLLOW).any(axis=-1)

    @property
    def clamps(self) -> Bool[np.ndarray, "*G L 2"]:
        """Whether a write, or one of its heads, is clamped."""
        by_head = (self.heads == Word.CLAMP).any(axis=-1)
        return (self.writes == Word.CLAMP) | by_head[..., None] * np.array([True, False])

    def living(self, parallel: bool) -> Bool[np.ndarray, "*G L 2"]:
        """Whether anything upstream of a component is clamped: before that, a row is the clean run.

        Args:
          parallel: whether a layer's MLP reads the same stream as its attention.
        """
        clamps = self.clamps
        before = clamps.any(axis=-1).cumsum(axis=-1) - clamps.any(axis=-1) > 0
        same_layer = np.zeros_like(before) if parallel else clamps[..., ATTN]
        return np.stack([before, before | same_layer], axis=-1)


def program(
    config: ModelConfig,
    clamp: Iterable[str | Component] = (),
    freeze: Iterable[str | Component] = (),
    probe: Iterable[str | Component] = (),
    follow: Iterable[str | Component] = (),
    rest: Word = Word.FOLLOW,
) -> Program:
    """Return the program in which components do as they are named.

    Args:
      config: the model's.
      clamp: components that are set to values: "attn 23", "mlp 29", for a head "attn 23.4", or "layer 5" for both
        writes; negative layers count from the end.
      freeze: components that stay as they are in the clean run; "norm" for the final norm's divisor.
      probe: whole writes that stay so, and of which is recorded what they would have changed.
      follow: whole writes that compute on, where `rest` is not FOLLOW.
      rest: the word of every write that is not named.

    Raises:
      UserError: if a name is not one of the model's components, or a component is named twice.
    """
    writes = np.full((config.layers, len(SITES)), int(rest))
    heads = np.full((config.layers, config.heads), int(Word.FOLLOW))
    norm, named = Word.FOLLOW, set[str | Component]()
    words = {Word.CLAMP: clamp, Word.FREEZE: freeze, Word.PROBE: probe, Word.FOLLOW: follow}
    for word, components in words.items():
        for name in [components] if isinstance(components, str | Component) else components:
            for component in [NORM] if name == NORM else components_of(config, name):
                if component in named:
                    raise UserError(f"program: {component} is named twice; name it once")
                named.add(component)
                if isinstance(component, str):
                    if word not in NORM_WORDS:
                        raise UserError(f"program: the {NORM} can be frozen or follow, not {word.name}")
                    norm = word
                elif component.head == WHOLE:
                    writes[component.layer, component.site] = word
                elif word in HEAD_WORDS and word != Word.FOLLOW:
                    heads[component.layer, component.head] = word
                else:
                    raise UserError(f"program: {component} is a head, which can be clamped or frozen, not {word.name}")
    for layer in np.flatnonzero((heads != Word.FOLLOW).any(axis=1)).tolist():
        if Component(layer, ATTN) in named:
            raise both_named(layer)
        writes[layer, ATTN] = Word.FOLLOW
    return checked(config, Program(writes, heads, np.array(int(norm))))


def from_words(config: ModelConfig, words: Sequence[int]) -> Program:
    """Return the program of words in forward order: attn 0, mlp 0, attn 1, ..., and the final norm's.

    Raises:
      UserError: if they are not one for each component and one for the norm, or are no words.
    """
    wanted = config.components + 1
    if len(words) != wanted:
        raise UserError(
            f"program: has {len(words)} words, a model of {config.layers} layers has {wanted}: one for each attention"
            " and MLP in forward order, and one for the final norm"
        )
    places: list[str | Component] = [*all_components(config.layers), NORM]
    for place, word in zip(places, words, strict=True):
        whole = isinstance(word, int | np.integer) and not isinstance(word, bool)
        if not whole or word not in tuple(Word):
            raise unknown(place, int(word) if whole else word, NORM_WORDS if place == NORM else Word)
    given = np.array([int(word) for word in words])
    heads = np.full((config.layers, config.heads), int(Word.FOLLOW))
    return checked(config, Program(given[:-1].reshape(config.layers, 2), heads, given[-1]))


def known(config: ModelConfig, name: str | Component) -> Component:
    """Return the component of a name.

    Raises:
      UserError: if the model has none such.
    """
    return _checked(config, Component.parse(name) if isinstance(name, str) else name)


def components_of(config: ModelConfig, name: str | Component) -> list[Component]:
    """Return the components of a name: "layer 5" has two; negative layers count from the end.

    Raises:
      UserError: if the model has none such.
    """
    return [_checked(config, component) for component in (parse(name) if isinstance(name, str) else [name])]


def ablation_of(config: ModelConfig, names: str) -> Ablation:
    """Return the ablation of components that are named together, as in "attn 23 + mlp 29".

    Raises:
      UserError: if the model has none such, or one is named twice.
    """
    found = [component for name in names.split("+") for component in components_of(config, name)]
    for one, other in itertools.combinations(found, 2):
        if one.overlaps(other):
            raise UserError(f"{other} is named twice in {shown(names.strip())}; name it once")
    return Ablation.of(*found)


def _checked(config: ModelConfig, component: Component) -> Component:
    """Return the component with its layer counted from the first, if it is one of the model's."""
    if -config.layers <= component.layer < 0:
        component = dataclasses.replace(component, layer=component.layer + config.layers)
    heads = range(WHOLE, config.heads if component.site == ATTN else 0)
    if component.layer not in range(config.layers) or component.head not in heads:
        raise UserError(
            f"component {component}: the model has layers 0-{config.layers - 1}, and heads 0-{config.heads - 1} of"
            " attention, this is not among them; name one of these"
        )
    return component


def unknown(place: str | Component, word: object, allowed: Iterable[Word]) -> UserError:
    """Return the error of a place whose word is not among those that it may have."""
    known_words = ", ".join(f"{int(one)} ({one.name})" for one in allowed)
    return UserError(f"program: {place} has the word {shown(word)}; give one of {known_words}")


def both_named(layer: int) -> UserError:
    """Return the error of an attention that is named beside heads of it."""
    return UserError(f"program: attn {layer} and some of its heads are named; name the whole write, or heads of it")


def checked(config: ModelConfig, program: Program) -> Program:
    """Return `program` if it is one of the model's.

    Raises:
      UserError: if it has the wrong shape, or words that its components do not know.
    """
    shapes = program.writes.shape, program.heads.shape, program.norm.shape
    if shapes != ((config.layers, 2), (config.layers, config.heads), ()):
        raise UserError(f"program: is of another shape than the model's {config.layers} layers; make it for this model")
    for words, allowed, named in (
        (program.writes, Word, Component),
        (program.heads, HEAD_WORDS, lambda layer, head: Component(layer, ATTN, head)),
        (program.norm, NORM_WORDS, lambda: NORM),
    ):
        for place in np.argwhere(~np.isin(words, [int(word) for word in allowed])).tolist():
            raise unknown(named(*place), int(words[tuple(place)]), allowed)
    for layer in np.flatnonzero(program.by_heads & (program.writes[:, ATTN] != Word.FOLLOW)).tolist():
        raise both_named(layer)
    return program


def together(programs: Sequence[Program]) -> Program:
    """Return G programs as one, along a first axis."""
    return Program(*(np.stack(parts) for parts in zip(*((p.writes, p.heads, p.norm) for p in programs), strict=True)))


def first_clamp(program: Program) -> Int[np.ndarray, "*G"]:
    """Return the index of the first component that a program clamps: before it, its row is the clean run."""
    clamps = program.clamps.reshape(*program.norm.shape, -1)
    return np.where(clamps.any(axis=-1), clamps.argmax(axis=-1), clamps.shape[-1])
