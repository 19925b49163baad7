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

import enum
from collections.abc import Iterable, Sequence
from typing import Any

import flax.struct
import numpy as np
from jaxtyping import Bool, Int

from hydra_jax.core.edits import ATTN, SITES, WHOLE, Component
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
      clamp: components that are set to values: "attn 23", "mlp 29", or for a head "attn 23.4".
      freeze: components that stay as they are in the clean run; "norm" for the final norm's divisor.
      probe: whole writes that stay so, and of which is recorded what they would have changed.
      follow: whole writes that compute on, where `rest` is not FOLLOW.
      rest: the word of every write that is not named.

    Raises:
      UserError: if a name is not one of the model's components, or a component is named twice.
    """
    writes = np.full((config.layers, len(SITES)), int(rest))
    heads = np.full((config.layers, config.heads), int(Word.FOLLOW))
    norm, named = Word.FOLLOW, set()
    words = {Word.CLAMP: clamp, Word.FREEZE: freeze, Word.PROBE: probe, Word.FOLLOW: follow}
    for word, components in words.items():
        for name in [components] if isinstance(components, str | Component) else components:
            if name == NORM and word is Word.FREEZE:
                norm = Word.FREEZE
                continue
            component = known(config, name)
            if component in named:
                raise UserError(f"program: {component} is named twice; name it once")
            named.add(component)
            if component.head == WHOLE:
                writes[component.layer, component.site] = word
            elif word in (Word.CLAMP, Word.FREEZE):
                heads[component.layer, component.head] = word
                if Component(component.layer, ATTN) not in named:
                    writes[component.layer, ATTN] = Word.FOLLOW
            else:
                raise UserError(f"program: {component} is a head, which can be clamped or frozen, not {word.name}")
    return checked(config, Program(writes, heads, np.array(int(norm))))


def from_words(config: ModelConfig, words: Sequence[int]) -> Program:
    """Return the program of words in forward order: attn 0, mlp 0, attn 1, ..., and the final norm's.

    Raises:
      UserError: if they are not one for each component and one for the norm, or are no words.
    """
    given = np.asarray(words)
    wanted = config.components + 1
    if given.shape != (wanted,) or given.dtype.kind not in "iu":
        raise UserError(
            f"program: has {len(given) if given.ndim else 'no'} words, {config.layers} layers have {wanted}: one for"
            " each attention and MLP in forward order, and one for the final norm"
        )
    heads = np.full((config.layers, config.heads), int(Word.FOLLOW))
    return checked(config, Program(given[:-1].reshape(config.layers, 2), heads, given[-1]))


def known(config: ModelConfig, name: str | Component) -> Component:
    """Return the component of a name.

    Raises:
      UserError: if the model has none such.
    """
    component = Component.parse(name) if isinstance(name, str) else name
    if component.layer >= config.layers or component.head >= config.heads:
        raise UserError(
            f"component {component}: the model has layers 0-{config.layers - 1} and heads 0-{config.heads - 1}"
        )
    return component


def checked(config: ModelConfig, program: Program) -> Program:
    """Return `program` if it is one of the model's.

    Raises:
      UserError: if it has the wrong shape, or words that its components do not know.
    """
    shapes = program.writes.shape, program.heads.shape, program.norm.shape
    if shapes != ((config.layers, 2), (config.layers, config.heads), ()):
        raise UserError(f"program: is of another shape than the model's {config.layers} layers; make it for this model")
    for words, allowed in (
        (program.writes, tuple(Word)),
        (program.heads, (Word.FOLLOW, Word.CLAMP, Word.FREEZE)),
        (program.norm, (Word.FOLLOW, Word.FREEZE)),
    ):
        wrong = np.setdiff1d(words, [int(word) for word in allowed])
        if wrong.size:
            raise UserError(f"program: {shown(int(wrong[0]))} is none of {', '.join(word.name for word in allowed)}")
    both = np.flatnonzero(program.by_heads & (program.writes[:, ATTN] != Word.FOLLOW))
    if both.size:
        raise UserError(
            f"program: attn {both[0]} and some of its heads are named; name the whole write, or heads of it"
        )
    return program


def together(programs: Sequence[Program]) -> Program:
    """Return G programs as one, along a first axis."""
    return Program(*(np.stack(parts) for parts in zip(*((p.writes, p.heads, p.norm) for p in programs), strict=True)))


def first_clamp(program: Program) -> Int[np.ndarray, "*G"]:
    """Return the index of the first component that a program clamps: before it, its row is the clean run."""
    clamps = program.clamps.reshape(*program.norm.shape, -1)
    return np.where(clamps.any(axis=-1), clamps.argmax(axis=-1), clamps.shape[-1])
