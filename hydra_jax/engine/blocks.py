"""The programs that move rows on one device, in blocks of one size.

A text's N rows stand program by program, in the order in which the programs' first clamps come, each program's
M = Q * R together (readings, replacements). A block is n rows of each of several texts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from hydra_jax.core import row as one_row
from hydra_jax.core.edits import ATTN, WHOLE, Kind, WriteStatistics, replacement
from hydra_jax.core.effects import Effects, effects
from hydra_jax.core.metrics import Metrics, Said, metrics
from hydra_jax.core.prefill import LayerClean, Reading
from hydra_jax.core.programs import Word
from hydra_jax.core.row import Row
from hydra_jax.engine.batching import round_up
from hydra_jax.models.pieces import LayerParams
from hydra_jax.models.transformer import Params

LEAST_ROWS = 128
"""Rows of a block for which programs are put together, where a chunk has few texts and replacements."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The rows of one device's texts, and the blocks that they are computed in.

    Attributes:
      texts: P, of one device.
      readings: Q.
      draws: R.
      programs: G.
      rows: n, of each text in a block.
      texts_at_once: texts in a block; divides P.
    """

    texts: int
    readings: int
    draws: int
    programs: int
    rows: int
    texts_at_once: int

    @classmethod
    def of(cls, texts: int, readings: int, draws: int, programs: int, at_once: int, alike: int = 1) -> Layout:
        """Return the layout with blocks of about `at_once` rows; `alike` programs each begin together."""
        each = readings * draws
        if each > at_once:
            rows = math.ceil(each / math.ceil(each / at_once))
        else:
            most = alike if texts * each * alike <= at_once else 1  # a block is computed as soon as one row needs it
            rows = each * min(programs, max(most, math.ceil(min(LEAST_ROWS, at_once) / (texts * each))))
        most = max(1, at_once // rows)
        together = next(size for size in range(min(most, texts), 0, -1) if texts % size == 0)
        return cls(texts, readings, draws, programs, rows, together)

    @property
    def of_program(self) -> int:
        """A program's rows, Q * R, and with them those that fill its last block where it has several."""
        each = self.readings * self.draws
        return round_up(each, self.rows) if each > self.rows else each

    @property
    def total(self) -> int:
        """N, of one text."""
        return round_up(self.programs * self.of_program, self.rows)

    @property
    def columns(self) -> int:
        """Blocks beside each other that have the same rows, of other texts."""
        return self.texts // self.texts_at_once

    @property
    def blocks(self) -> int:
        """Blocks in all."""
        return self.columns * self.total // self.rows

    def per_row(self, of_programs: np.ndarray) -> np.ndarray:
        """Return [N, ...] of each row's program, from [G, ...]; 0 for those that only fill a block."""
        every = np.repeat(of_programs, self.of_program, axis=0)
        every[np.tile(np.arange(self.of_program), self.programs) >= self.readings * self.draws] = 0
        return np.concatenate([every, np.zeros((self.total - len(every), *every.shape[1:]), every.dtype)])

    def by_program(self, rows: Any) -> Any:
        """Return rows [P, N, ...] as [P, G, Q, R, ...]."""
        rows = rows[:, : self.programs * self.of_program].reshape(len(rows), self.programs, -1, *rows.shape[2:])
        rows = rows[:, :, : self.readings * self.draws]
        return rows.reshape(len(rows), self.programs, self.readings, self.draws, *rows.shape[3:])

    def reading(self) -> np.ndarray:
        """Return [N], each row's reading among Q."""
        return np.arange(self.total) % self.of_program // self.draws % self.readings


def zeros(readout: Float[Array, "P Q D"], rows: int) -> tuple[Float[Array, "P N D"], Float[Array, "P N"]]:
    """Return the shifts and direct effects of rows that are the clean run."""
    shape = len(readout), rows
    return jnp.zeros((*shape, readout.shape[-1])), jnp.zeros(shape)


def cut(rows: Float[Array, "P N D"], start: Int[Array, ""], count: int) -> Float[Array, "P M D"]:
    """Return `count` rows of each text."""
    return jax.lax.dynamic_slice_in_dim(rows, start, count, axis=1)


def advance(
    layer: LayerParams,
    clean: LayerClean,
    places: Int[Array, "P Q"],
    readout: Float[Array, "P Q D"],
    shift: Float[Array, "P N D"],
    blocks: Int[Array, " B"],
    count: Int[Array, ""],
    moved: Bool[Array, "N S"],
    recorded: Bool[Array, "N S"],
    reading: Int[Array, " N"],
    clamped: Bool[Array, "P S"] | None,
    sites: tuple[int, ...],
    layout: Layout,
    by_head: bool,
) -> tuple[Float[Array, "P N D"], Float[Array, "P N S"], Float[Array, "P N H"] | None]:
    """Move the rows of the first `count` of `blocks` through the sites of a stage, block after block.

    Where texts differ in what they clamp, `clamped` ones are neither moved nor recorded.
    """
    texts = clean, places, readout, clamped

    def block(index: Int[Array, ""], state: Any) -> Any:
        shift = state[0]
        first = blocks[index] % layout.columns * layout.texts_at_once
        start = blocks[index] // layout.columns * layout.rows

        def of_texts(leaf: Any) -> Any:
            if layout.columns == 1:
                return leaf
            return jax.lax.dynamic_slice_in_dim(leaf, first, layout.texts_at_once)

        def of_rows(leaf: Any) -> Any:
            return jax.lax.dynamic_slice_in_dim(leaf, start, layout.rows)

        def text(texts: Any, shift: Float[Array, "n D"]) -> Any:
            clean, places, readout, clamped = texts
            free: Any = True if clamped is None else ~clamped

            def one(
                shift: Float[Array, " D"], at: Int[Array, ""], moved: Bool[Array, " S"], recorded: Bool[Array, " S"]
            ) -> Any:
                # Rows that share a reading share all that is computed of it.
                place: Any = at if layout.readings > 1 else 0
                here = clean.at(place), places[place], readout[place]
                return one_row.move(layer, *here, shift, moved & free, recorded & free, sites, by_head)

            return jax.vmap(one)(shift, of_rows(reading), of_rows(moved), of_rows(recorded))

        corner = first, start, 0
        here = jax.lax.dynamic_slice(shift, corner, (layout.texts_at_once, layout.rows, shift.shape[-1]))
        new = jax.tree.leaves(jax.vmap(text)(jax.tree.map(of_texts, texts), here))  # without heads, where they are None
        return [jax.lax.dynamic_update_slice(whole, part, corner) for whole, part in zip(state, new, strict=True)]

    widths = [len(sites), layer.config.heads] if by_head else [len(sites)]
    nothing = [jnp.zeros((*shift.shape[:2], width)) for width in widths]
    shift, changes, *of_heads = jax.lax.fori_loop(0, count, block, [shift, *nothing])
    return shift, changes, of_heads[0] if by_head else None


def clamp(
    shift: Float[Array, "P N D"],
    direct: Float[Array, "P N"],
    clean: LayerClean,
    readout: Float[Array, "P Q D"],
    start: Int[Array, ""],
    values: Float[Array, "P M D"],
    reading: Int[Array, " M"],
    clamped: Bool[Array, " P"] | None,
    site: int,
) -> tuple[Float[Array, "P N D"], Float[Array, "P N"]]:
    """Set a write of a program's rows to its values; where texts differ, of those in which it is `clamped`."""
    change = values - clean.writes[:, :, site][:, reading]
    if clamped is not None:
        change = jnp.where(clamped[:, None, None], change, 0)
    part = (change * readout[:, reading]).sum(axis=-1)
    return _added(shift, change, start), _added(direct, -part, start)


def clamp_heads(
    layer: LayerParams,
    clean: LayerClean,
    places: Int[Array, "P Q"],
    readout: Float[Array, "P Q D"],
    shift: Float[Array, "P N D"],
    direct: Float[Array, "P N"],
    changes: Float[Array, "P N S"],
    set_and_entering: tuple[Float[Array, "P M H head_dim"], Float[Array, "P M D"] | None],
    words: Int[Array, " H"],
    start: Int[Array, ""],
    reading: Int[Array, " M"],
    of_heads: Float[Array, "P N H"] | None,
) -> tuple[Float[Array, "P N D"], Float[Array, "P N"], Float[Array, "P N S"], Float[Array, "P N H"] | None]:
    """Set heads of a program's rows: see `core.row.clamp_heads`; where heads are recorded, those that follow are."""

    def text(clean: LayerClean, places: Int[Array, " Q"], readout: Float[Array, "Q D"], rows: Any) -> Any:
        def one(at: Int[Array, ""], row: Any) -> Any:
            values, entering = row
            here, mixed = clean.at(at), None
            if entering is not None:
                mixed = one_row.follow(layer, here, places[at], ATTN, entering).mixed
            change, clamped = one_row.clamp_heads(layer, here, mixed, words, values)
            of_each = None
            if of_heads is not None:
                # Beside the clamps alone: where a post-norm follows, these rescale the others' shares.
                alone = one_row.with_words(here.mixed, here.mixed, words, values)
                after = alone if mixed is None else one_row.with_words(here.mixed, mixed, words, values)
                changed, scaled = (one_row.head_changes(layer, here, readout[at], each) for each in (after, alone))
                of_each = jnp.where(words == Word.FOLLOW, changed - scaled, 0)
            return change, -clamped @ readout[at], (change - clamped) @ readout[at], of_each

        return jax.vmap(one)(reading, rows)

    change, part, followed, of_each = jax.vmap(text)(clean, places, readout, set_and_entering)
    recorded = jnp.zeros((*followed.shape, changes.shape[-1])).at[..., 0].set(followed)  # attention is a stage's first
    if of_heads is not None:
        of_heads = _added(of_heads, of_each, start)
    return _added(shift, change, start), _added(direct, part, start), _added(changes, recorded, start), of_heads


def _added(whole: Float[Array, "P N *rest"], part: Float[Array, "P M *rest"], start: Int[Array, ""]) -> Any:
    """Return `whole` with `part` added to its rows from `start`."""
    before = jax.lax.dynamic_slice_in_dim(whole, start, part.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(whole, before + part, start, axis=1)


def nothing_mixed(clean: LayerClean, layout: Layout) -> Float[Array, "P M H head_dim"]:
    """Return zeros for what the heads of a program's rows mix."""
    mixed = clean.mixed
    return jnp.zeros((len(mixed), layout.of_program, *mixed.shape[2:]))


def put_head(
    mixed: Float[Array, "P M H head_dim"], head: Int[Array, ""], values: Float[Array, "P M head_dim"]
) -> Float[Array, "P M H head_dim"]:
    """Return `mixed` with one head's values."""
    return mixed.at[:, :, head].set(values)


def values(
    sources: Float[Array, "P R E"],
    statistics: WriteStatistics,
    keys: Key[Array, " P"],
    component: Int[Array, ""],
    head: Int[Array, ""],
    kind: Kind,
    layout: Layout,
) -> Float[Array, "P M E"]:
    """Make a component's values in the rows of a program; `head` is WHOLE for its whole write."""
    every = layout.readings * layout.draws
    rows = np.arange(layout.of_program) % every  # those that fill a block are like the first

    def text(sources: Float[Array, "R E"], statistics: WriteStatistics, key: Key[Array, ""]) -> Float[Array, "M E"]:
        own = jax.random.fold_in(key, component)
        own = jax.lax.select(head == WHOLE, own, jax.random.fold_in(own, head))
        draws = jax.random.split(own, every)
        new = functools.partial(replacement, kind, statistics=statistics)
        return jax.vmap(lambda source, key: new(source=source.astype(jnp.float32), key=key))(
            sources[rows % layout.draws], draws[rows]
        )

    return jax.vmap(text)(sources, statistics, keys)


def effects_of(
    params: Params,
    reading: Reading,
    shift: Float[Array, "P N D"],
    direct: Float[Array, "P N"],
    changes: list[Float[Array, "P N S"]],
    frozen: Bool[Array, " N"],
    probed: Bool[Array, "N L 2"],
    of: Int[Array, " N"],
    layout: Layout,
) -> Effects:
    """Return the effects of all rows, [P, G, Q, R], from their state after the last layer."""
    changed = jnp.concatenate(changes, axis=-1).reshape(*direct.shape, params.config.layers, -1)

    def text(reading: Reading, rows: Row, of: Int[Array, " n"], *flags: Any) -> Effects:
        def one(at: Int[Array, ""], row: Row, frozen: Bool[Array, ""], probed: Bool[Array, "L 2"]) -> Effects:
            place: Any = at if layout.readings > 1 else 0
            return effects(params, jax.tree.map(lambda leaf: leaf[place], reading), row, frozen, probed)

        return jax.vmap(one)(of, rows, *flags)

    def block(start: Int[Array, ""]) -> Effects:
        def cut_out(axis: int) -> Any:
            return functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=layout.rows, axis=axis)

        rows = jax.tree.map(cut_out(1), Row(shift, direct, changed))
        return jax.vmap(text, (0, 0, None, None, None))(reading, rows, *map(cut_out(0), (of, frozen, probed)))

    # Block by block, as rows are moved: what is computed at once is the same however many there are.
    every = jax.lax.map(block, jnp.arange(0, layout.total, layout.rows))
    joined = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(*direct.shape, *leaf.shape[3:]), every)
    return jax.tree.map(layout.by_program, joined)


def head_effects(
    reading: Reading,
    changes: list[Float[Array, "P N H"]],
    of: Int[Array, " N"],
    chosen: Int[Array, " G"],
    layout: Layout,
) -> Float[Array, "P G Q R L H"]:
    """Return what each head changes in the rows of `chosen` programs, from what is recorded in each layer."""
    scaled = jnp.stack(changes, axis=2) / reading.final_scale[:, of][..., None, None]
    return layout.by_program(scaled)[:, chosen]


def metrics_of(
    params: Params,
    reading: Reading,
    shift: Float[Array, "P N D"],
    frozen: Bool[Array, " N"],
    of: Int[Array, " N"],
    chosen: Int[Array, " G"],
    layout: Layout,
    at_once: int,
) -> Metrics:
    """Return the metrics of the rows of `chosen` programs, [P, G, Q, R], with the logits of `at_once` in memory."""
    rows = chosen[:, None] * layout.of_program + jnp.arange(layout.readings * layout.draws)[None]
    shift, frozen, of = shift[:, rows.reshape(-1)], frozen[rows.reshape(-1)], of[rows.reshape(-1)]

    def text(text: tuple[Reading, Float[Array, "N D"]]) -> Metrics:
        reading, shift = text
        said = jax.lax.map(functools.partial(Said.of, params), reading, batch_size=at_once)

        def row(row: Any) -> Metrics:
            at, shift, frozen = row
            place: Any = at if layout.readings > 1 else 0
            here, says = jax.tree.map(lambda leaf: leaf[place], (reading, said))
            return metrics(params, here, says, shift, frozen)

        return jax.lax.map(row, (of, shift, frozen), batch_size=at_once)

    found = jax.lax.map(text, (reading, shift))
    shape = len(chosen), layout.readings, layout.draws
    return jax.tree.map(lambda leaf: leaf.reshape(len(leaf), *shape), found)
