"""The rows of a chunk of texts: every intervention, moved through the layers as the texts are.

At every stage only those blocks are computed in which a row follows or is probed; what is clamped there is set after.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from hydra_jax.core.edits import ATTN, Component, Kind, WriteStatistics
from hydra_jax.core.effects import Effects
from hydra_jax.core.metrics import Metrics
from hydra_jax.core.prefill import LayerClean, Reading
from hydra_jax.core.programs import Program, Word, first_clamp
from hydra_jax.core.row import stages
from hydra_jax.engine import blocks
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.blocks import Layout
from hydra_jax.engine.walk import UNEMBED_ROWS, Texts, program
from hydra_jax.models.pieces import LayerParams
from hydra_jax.models.transformer import Contrast


class Rows:
    """All rows of P texts on their way through the layers.

    Attributes:
      layout: of each device's.
      programs: G of them, along a first axis.
      shift: [P, N, D], s.
      direct: [P, N], not yet divided by sigma.
      readout: [P, Q, D], r.
    """

    def __init__(
        self,
        texts: Texts,
        programs: Program,
        draws: int,
        contrasts: Contrast,
        at_once: int,
        by_head: bool = False,
        clamps: Bool[np.ndarray, "P L 2"] | None = None,
    ) -> None:
        """Begin at the clean runs.

        Args:
          texts: the texts, before the first layer.
          programs: G of them, along a first axis, in order of `first_clamp`.
          draws: R.
          contrasts: [P, Q, K], what is read.
          at_once: rows in a block, about.
          by_head: whether is recorded what each head of attention changes.
          clamps: where there is one program and texts differ in what they clamp: those of its clamped writes that each
            does; its others follow.
        """
        c, self._mesh, self._texts = texts.params.config, texts.mesh, texts
        on_device = len(texts.positions) // texts.mesh.shape[meshes.DATA]
        starts = np.unique(first_clamp(programs), return_counts=True)[1]
        shape = on_device, texts.readings, draws, len(programs.norm)
        self.layout = layout = Layout.of(*shape, at_once, math.gcd(*starts.tolist()))
        self.programs, self._by_head = programs, by_head
        self._living = programs.living(c.parallel)
        # Blocks compute what follows or is probed; of the others among the living nothing is computed, or by `clamp`.
        whole = ~(programs.by_heads[..., None] & (np.arange(2) == ATTN))
        follows = programs.writes == Word.FOLLOW
        if clamps is not None:
            follows = follows | (programs.writes == Word.CLAMP)
        computed = self._living & whole & (follows | (programs.writes == Word.PROBE))
        self._recorded = layout.per_row(computed)
        self._moved = layout.per_row(computed & follows)
        self._clamps = clamps
        self._reading = layout.reading().astype(np.int32)
        self.readout, _ = texts.contrast(contrasts)
        self.shift, self.direct = self._program(blocks.zeros, (), rows=layout.total)(self.readout)
        self._changes: list[jax.Array] = []
        self._of_heads: list[jax.Array] = []

    def work(self, number: int) -> int:
        """Return how many components are computed of a text's rows in a layer: the measure of progress."""
        return int(self._recorded[:, number].sum())

    def through(self, number: int, layer: LayerParams, clean: LayerClean, values: Values) -> None:
        """Move all rows through a layer.

        Args:
          number: of the layer.
          layer: the layer.
          clean: the texts' runs in it.
          values: returns the values [P, M, E] of a component's clamps in a program's rows, as `Draws` does.
        """
        for sites in stages(layer.config.parallel):
            by_heads = np.flatnonzero(self.programs.by_heads[:, number]).tolist() if ATTN in sites else []
            entering = {which: self._cut(self.shift, which) for which in by_heads if self._living[which, number, ATTN]}
            self._advance(number, layer, clean, sites)
            for which in by_heads:
                self._clamp_heads(number, layer, clean, which, entering.get(which), values)
            for site in sites:
                for which in np.flatnonzero(self.programs.writes[:, number, site] == Word.CLAMP).tolist():
                    new = values(Component(number, site))
                    run = self._program(blocks.clamp, (4, 6), (0, 1), site=site)
                    self.shift, self.direct = run(
                        *(self.shift, self.direct, clean, self.readout, self._start(which), new, self._of_program()),
                        self._clamped(number, site),
                    )

    def _clamped(self, number: int, sites: int | list[int]) -> Bool[Array, "*shape"] | None:
        """Return whether each text clamps sites of a layer, on its device; None where all texts do alike."""
        return None if self._clamps is None else self._texts.put(self._clamps[:, number, sites])

    def wait(self, number: int) -> None:
        """Wait until the rows are through a layer, or all of those before it where it is -1."""
        if number >= 0:
            jax.block_until_ready(self._changes[(number + 1) * len(stages(self._texts.params.config.parallel)) - 1])

    def effects(self, reading: Reading) -> Effects:
        """Return the rows' effects, [P, G, Q, R], after the last layer; `reading` is what the texts say, [P, Q]."""
        params, frozen = self._texts.params, self.layout.per_row(self.programs.norm == Word.FREEZE)
        probed = self._recorded & ~self._moved
        run = self._program(blocks.effects_of, (0, 5, 6, 7), layout=self.layout)
        return run(params, reading, self.shift, self.direct, self._changes, frozen, probed, self._reading)

    def metrics(self, reading: Reading, at_once: int = UNEMBED_ROWS, every: int = 1) -> Metrics:
        """Return the metrics of rows, [P, G, Q, R], after the last layer.

        Args:
          reading: what the texts say, [P, Q].
          at_once: rows that are unembedded together.
          every: only those of the first of as many programs.
        """
        params, frozen = self._texts.params, self.layout.per_row(self.programs.norm == Word.FREEZE)
        run = self._program(blocks.metrics_of, (0, 3, 4, 5), layout=self.layout, at_once=at_once)
        return run(params, reading, self.shift, frozen, self._reading, self._chosen(every))

    def head_changes(self, reading: Reading, every: int = 1) -> Float[Array, "P G Q R L H"]:
        """Return what each head of attention changes, [P, G, Q, R, L, H], where that was asked for; see `metrics`."""
        run = self._program(blocks.head_effects, (2, 3), layout=self.layout)
        return run(reading, self._of_heads, self._reading, self._chosen(every))

    def _chosen(self, every: int) -> Int[np.ndarray, " G"]:
        return np.arange(0, len(self.programs.norm), every, dtype=np.int32)

    def _advance(self, number: int, layer: LayerParams, clean: LayerClean, sites: tuple[int, ...]) -> None:
        """Move the rows of those blocks in which any is moved or recorded at a stage."""
        layout = self.layout
        moved, recorded = (flags[:, number][:, list(sites)] for flags in (self._moved, self._recorded))
        busy = np.flatnonzero(recorded.reshape(-1, layout.rows * len(sites)).any(axis=1))
        active = (busy[:, None] * layout.columns + np.arange(layout.columns)).reshape(-1)
        listed = np.zeros(layout.blocks, np.int32)
        listed[: len(active)] = active
        by_head = self._by_head and ATTN in sites
        run = self._program(blocks.advance, (0, 5, 6, 7, 8, 9), (4,), sites=sites, layout=layout, by_head=by_head)
        self.shift, changes, of_heads = run(
            *(layer, clean, self._texts.positions, self.readout, self.shift),
            *(listed, np.int32(len(active)), moved, recorded, self._reading, self._clamped(number, list(sites))),
        )
        self._changes.append(changes)
        if by_head:
            self._of_heads.append(of_heads)

    def _clamp_heads(
        self,
        number: int,
        layer: LayerParams,
        clean: LayerClean,
        which: int,
        entering: Float[Array, "P M D"] | None,
        values: Values,
    ) -> None:
        """Move a program's rows through an attention some of whose heads it clamps or freezes.

        Args:
          number: of the layer.
          layer: the layer.
          clean: the texts' runs in it.
          which: the program.
          entering: its rows' shifts where attention reads; None where they are still the clean run.
          values: as of `through`.
        """
        words = self.programs.heads[which, number]
        clamped = np.flatnonzero(words == Word.CLAMP)
        if entering is None and not clamped.size:
            return
        mixed = self._program(blocks.nothing_mixed, (), layout=self.layout)(clean)
        put = self._program(blocks.put_head, (1,), (0,))
        for head in clamped:
            mixed = put(mixed, np.int32(head), values(Component(number, ATTN, int(head))))
        run = self._program(blocks.clamp_heads, (0, 8, 9, 10), (4, 5, 6))
        of_heads = self._of_heads[-1] if self._by_head else None
        self.shift, self.direct, self._changes[-1], of_heads = run(
            *(layer, clean, self._texts.positions, self.readout, self.shift, self.direct, self._changes[-1]),
            *((mixed, entering), words.astype(np.int32), self._start(which), self._of_program(), of_heads),
        )
        if of_heads is not None:
            self._of_heads[-1] = of_heads

    def _cut(self, rows: Float[Array, "P N D"], which: int) -> Float[Array, "P M D"]:
        return self._program(blocks.cut, (1,), count=self.layout.of_program)(rows, self._start(which))

    def _start(self, which: int) -> np.int32:
        return np.int32(which * self.layout.of_program)

    def _of_program(self) -> Int[np.ndarray, " M"]:
        return self._reading[: self.layout.of_program]

    def _program(
        self, run: Callable[..., Any], replicated: tuple[int, ...], donated: tuple[int, ...] = (), **switches: Any
    ) -> jax.stages.Wrapped:
        return program(self._mesh, run, replicated, donated, **switches)


class Draws:
    """The values of clamps: drawn from other prompts, or made, as `core.edits.replacement` does.

    A component's are the same in all programs that clamp it, so that what differs between them is not the draw.
    """

    def __init__(
        self,
        mesh: Mesh,
        layout: Layout,
        kind: Kind,
        keys: Key[Array, " P"],
        sources: Callable[[Component], Float[Array, "P R E"]],
        statistics: Callable[[Component], WriteStatistics],
    ) -> None:
        """Take what values are made of.

        Args:
          mesh: the devices.
          layout: of the rows.
          kind: of the ablations.
          keys: each text's.
          sources: returns a component's values in the replacements' prompts.
          statistics: returns a component's over the prompt set, [P, E], on the devices of the texts.
        """
        self._run = program(mesh, blocks.values, (3, 4), kind=kind, layout=layout)
        self._keys, self._sources, self._statistics = keys, sources, statistics
        self._last: tuple[Component | None, Any] = None, None

    def __call__(self, component: Component) -> Float[Array, "P M E"]:
        """Return a component's values in a program's rows."""
        if self._last[0] != component:
            head = np.int32(component.head)
            sources, statistics = self._sources(component), self._statistics(component)
            self._last = component, self._run(sources, statistics, self._keys, np.int32(component.index), head)
        return self._last[1]


Values = Callable[[Component], Float[Array, "P M E"]]
"""Returns the values of a component's clamps in the M rows of a program."""
