"""A row: one intervened run of a text at one token, moved through a layer by its program.

s is the row's shift, how far its stream is from the clean one; w_d the clean write of a component d, and f_d what it
computes. At each component

    change = value - w_d if CLAMP, 0 if FREEZE, else f_d(clean + s) - w_d
    s      = s + (0 if PROBE else change)          recorded: <change, r>

Earlier tokens are clean, as attention carries nothing back to them: their keys and values stay true in every row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hydra_jax.core.edits import ATTN, MLP
from hydra_jax.core.prefill import LayerClean
from hydra_jax.core.programs import Word
from hydra_jax.models import pieces
from hydra_jax.models.pieces import LayerParams

SEQUENTIAL, PARALLEL = ((ATTN,), (MLP,)), ((ATTN, MLP),)


class Row(flax.struct.PyTreeNode):
    """A row after some or all of the layers; effects are not yet divided by sigma.

    Attributes:
      shift: [D], s.
      direct: [], -sum over clamped components of <value - w, r>.
      changes: [L, 2], <change, r> of the components that follow or are probed; 0 upstream of the first clamp.
    """

    shift: jax.Array
    direct: jax.Array
    changes: jax.Array


class Words(NamedTuple):
    """A layer's part of a program, and of `Program.living`."""

    writes: Int[Array, " 2"]
    heads: Int[Array, " H"]
    living: Bool[Array, " 2"]


class Values(NamedTuple):
    """The values of a layer's clamps; of components that are not clamped they are not read."""

    writes: Float[Array, "2 D"]
    mixed: Float[Array, "H head_dim"]


class Followed(NamedTuple):
    """A component's change, [D], and, of attention, the values that its heads mix, [H, head_dim], else None."""

    change: jax.Array
    mixed: jax.Array | None


def stages(parallel: bool) -> tuple[tuple[int, ...], ...]:
    """Return a layer's sites, those together that read the same stream."""
    return PARALLEL if parallel else SEQUENTIAL


def follow(
    layer: LayerParams, clean: LayerClean, position: Int[Array, ""], site: int, shift: Float[Array, " D"]
) -> Followed:
    """Return f_d(clean + s) - w_d: what a component changes by itself.

    Args:
      layer: the layer.
      clean: the text's run in it, at the row's token.
      position: the token's place.
      site: attention or MLP.
      shift: s where the component reads.
    """
    resid = clean.read(site, layer.config.parallel) + shift
    if site == MLP:
        return Followed(pieces.mlp_write(layer, resid) - clean.writes[MLP], None)
    mixed = pieces.attend(layer, resid, position, clean.keys, clean.values)
    return Followed(pieces.attn_write(layer, mixed) - clean.writes[ATTN], mixed)


def clamp_heads(
    layer: LayerParams,
    clean: LayerClean,
    mixed: Float[Array, "H head_dim"] | None,
    heads: Int[Array, " H"],
    values: Float[Array, "H head_dim"],
) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
    """Return the change of attention's write where heads are clamped or frozen, and the clamps' own part of it.

    The others follow; the write is computed anew from what all of them mix.

    Args:
      layer: the layer.
      clean: the text's run in it, at the row's token.
      mixed: what the heads mix as they read the row's stream; None where it is the clean one.
      heads: their words.
      values: what the clamped ones mix.
    """
    clamped = pieces.heads_delta(layer, clean.mixed, values, heads == Word.CLAMP)
    if mixed is None:
        return clamped, clamped
    mixed = with_words(clean.mixed, mixed, heads, values)
    return pieces.attn_write(layer, mixed) - clean.writes[ATTN], clamped


def with_words(
    clean: Float[Array, "H head_dim"],
    mixed: Float[Array, "H head_dim"],
    heads: Int[Array, " H"],
    values: Float[Array, "H head_dim"],
) -> Float[Array, "H head_dim"]:
    """Return what heads mix where some are frozen at the clean run's, and some clamped to values; see `clamp_heads`."""
    mixed = jnp.where((heads == Word.FREEZE)[:, None], clean, mixed)
    return jnp.where((heads == Word.CLAMP)[:, None], values, mixed)


def head_changes(
    layer: LayerParams, clean: LayerClean, readout: Float[Array, " D"], mixed: Float[Array, "H head_dim"]
) -> Float[Array, " H"]:
    """Return <change, r> of each head's share of attention's write, which add up to that of the write."""
    after = (mixed * pieces.head_readouts(layer, readout, mixed)).sum(axis=-1)
    return after - (clean.mixed * pieces.head_readouts(layer, readout, clean.mixed)).sum(axis=-1)


def move(
    layer: LayerParams,
    clean: LayerClean,
    position: Int[Array, ""],
    readout: Float[Array, " D"],
    shift: Float[Array, " D"],
    moved: Bool[Array, " S"],
    recorded: Bool[Array, " S"],
    sites: tuple[int, ...],
    by_head: bool,
) -> tuple[Float[Array, " D"], Float[Array, " S"], Float[Array, " H"] | None]:
    """Move a row through the S sites of a stage, none of which it clamps or freezes: the short way of `step`.

    Args:
      layer: the layer.
      clean: the text's run in it, at the row's token.
      position: the token's place.
      readout: r.
      shift: s before the stage.
      moved: whether a site's change is passed on.
      recorded: whether it is recorded.
      sites: that read the same stream.
      by_head: whether is recorded what each head changes, too.

    Returns:
      s after the stage, what is recorded of each site, and of each head where that is asked for.
    """
    entering, changes, of_heads = shift, [], None
    for index, site in enumerate(sites):
        change, mixed = follow(layer, clean, position, site, entering)
        shift = shift + jnp.where(moved[index], change, 0)
        changes.append(jnp.where(recorded[index], change @ readout, 0))
        if by_head and mixed is not None:
            of_heads = jnp.where(recorded[index], head_changes(layer, clean, readout, mixed), 0)
    return shift, jnp.stack(changes), of_heads


def step(
    layer: LayerParams,
    clean: LayerClean,
    position: Int[Array, ""],
    readout: Float[Array, " D"],
    words: Words,
    values: Values,
    row: tuple[Float[Array, " D"], Float[Array, ""]],
) -> tuple[tuple[Float[Array, " D"], Float[Array, ""]], Float[Array, " 2"]]:
    """Move a row through a layer: the definition, of which `engine.walk` computes no more than each row needs.

    Args:
      layer: the layer.
      clean: the text's run in it, at the row's token.
      position: the token's place.
      readout: r.
      words: the layer's.
      values: of the layer's clamps.
      row: its shift and direct effect.

    Returns:
      The row's shift and direct effect after the layer, and what is recorded of each component.
    """
    shift, direct = row
    recorded: list[Any] = []
    for sites in stages(layer.config.parallel):
        entering = shift
        for site in sites:
            change, mixed = follow(layer, clean, position, site, entering)
            change = jnp.where(words.living[site], change, 0)
            clamped = jnp.zeros_like(change)
            if mixed is not None:
                by_heads = (words.heads != Word.FOLLOW).any()
                mixed = jnp.where(words.living[site], mixed, clean.mixed)
                set_change, set_part = clamp_heads(layer, clean, mixed, words.heads, values.mixed)
                change = jnp.where(by_heads, set_change, change)
                clamped = jnp.where(by_heads, set_part, clamped)
            word = words.writes[site]
            change = jnp.where(word == Word.FREEZE, 0, change)
            change = jnp.where(word == Word.CLAMP, values.writes[site] - clean.writes[site], change)
            clamped = jnp.where(word == Word.CLAMP, change, clamped)
            shift = shift + jnp.where(word == Word.PROBE, 0, change)
            direct = direct - clamped @ readout
            recorded.append((change - clamped) @ readout)
    return (shift, direct), jnp.stack(recorded)


def walk(layers: LayerParams, clean: Any, words: Words, values: Values) -> Row:
    """Return a text's row after all layers.

    Args:
      layers: all of them, along a first axis of weights and positions.
      clean: the text's `Clean`.
      words: of each layer, along a first axis.
      values: of each layer, along a first axis.
    """

    def through(row: Any, layer: tuple[LayerParams, LayerClean, Words, Values]) -> tuple[Any, Any]:
        return step(layer[0], layer[1], clean.position, clean.readout, layer[2], layer[3], row)

    start = jnp.zeros_like(clean.readout), jnp.zeros(())
    (shift, direct), changes = jax.lax.scan(through, start, (layers, clean.layers, words, values))
    return Row(shift, direct, changes)
