"""The clean pass: every prompt's clean run, made once; and which prompts are swept."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from hydra_jax.config import PromptsConfig
from hydra_jax.core.edits import WHOLE, Component, Kind
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.batching import evenly, fill_up
from hydra_jax.engine.cluster import Cluster
from hydra_jax.engine.memory import BatchSizer
from hydra_jax.engine.mesh import Worker
from hydra_jax.engine.walk import PREFILL_TOKENS, Texts, clean_runs
from hydra_jax.errors import UserError
from hydra_jax.models.transformer import Contrast
from hydra_jax.sweep.bank import COLUMNS, Bank
from hydra_jax.sweep.items import Item, batch_of, by_length
from hydra_jax.sweep.plan import places
from hydra_jax.sweep.readout import candidates
from hydra_jax.text.padding import padded_length
from hydra_jax.text.tokenizer import spelled
from hydra_jax.weights.model import Model

Keep = Callable[[Item, int], bool]
"""Says of a prompt and its most likely next token whether its values are kept."""


@dataclasses.dataclass(frozen=True)
class CleanPass:
    """A maker of clean runs.

    Attributes:
      model: the model.
      kind: of the ablations: zero takes no values from clean runs.
      components: those whose values are kept.
      sizer: says how many prompts go at once.
      bank: takes them in.
      cluster: the processes that share the work.
      progress: whether to show a bar.
    """

    model: Model
    kind: Kind
    components: Sequence[Component]
    sizer: BatchSizer
    bank: Bank
    cluster: Cluster
    progress: bool = False

    def bar(self, total: int) -> tqdm:
        """Return the bar of the whole pass."""
        return tqdm(total=total, desc="clean pass", unit=" prompts", disable=not self.progress)

    def run(self, items: Sequence[Item], bar: tqdm, keep: Keep | None = None) -> None:
        """Make the clean runs of `items` that the bank does not have yet.

        Args:
          items: the prompts.
          bar: told of every prompt.
          keep: says whose values are kept; None for all.
        """
        end = bar.n + len(items)
        wanted = {item.key: item for item in items if not self._has(item, keep)}
        missing = sorted(wanted.values(), key=by_length)
        bar.update(len(items) - len(missing))
        alone = self.cluster.count == 1
        worker = Worker(0, 1, True) if alone else meshes.worker(meshes.mesh_of(self.model.params))
        longest = padded_length(len(missing[-1].tokens), self.model.config.context) if missing else 1
        size = self.sizer.prompts(longest, clean=True)
        size = min(self.cluster.gather(size))  # a process that ran out of memory goes on with fewer
        parts = evenly(len(missing), min(size, -(-len(missing) // worker.count)))
        say = functools.partial(bar.write, file=sys.stderr)
        for part in worker.share(parts):
            chosen = missing[part]
            runs = functools.partial(self._runs, chosen)
            columns, values = self.sizer.run(runs, self.sizer.fill_up(parts[0].stop, clean=True), say)
            tops = columns["top"].tolist()
            kept = np.array([keep is None or keep(item, top) for item, top in zip(chosen, tops, strict=True)])
            if worker.leads:
                self.bank.add([item.key for item in chosen], columns, kept, values[kept])
            bar.update(min(len(chosen) * worker.count, end - bar.n))
        bar.update(end - bar.n)
        self.bank.refresh(self.cluster)

    def _has(self, item: Item, keep: Keep | None) -> bool:
        """Return whether the bank has an item's clean run and, where all values are kept, its values."""
        row = self.bank.rows.get(item.key)
        return row is not None and (keep is not None or row.part >= 0)

    def _runs(self, items: Sequence[Item], size: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Run `items`, `size` at once: the columns of the bank's rows [P], and values [P, F]."""
        parts = [self._run(items[part], size) for part in evenly(len(items), size)]
        joined = {name: np.concatenate([columns[name] for columns, _ in parts]) for name in COLUMNS}
        return joined, np.concatenate([values for _, values in parts])

    def _run(self, items: Sequence[Item], size: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Run `items`, filled up to `size`, through the layers; see `_runs`."""
        model, c = self.model, self.model.config
        kept = self.components if self.kind.needs_sources or self.kind.needs_statistics else []
        where = places(c, kept)
        values = np.empty((len(items), sum(place.stop - place.start for place in where.values())), jnp.dtype(c.dtype))
        asked = candidates(fill_up(items, size))
        contrasts = Contrast(asked[:, None], np.tile(np.array([1, 0, 0], np.float32), (size, 1, 1)))
        tokens, lengths = batch_of(items, size, c.context)
        parts = np.split(np.arange(size), self.sizer.parts(size, clean=True))
        sizes = self.sizer.sizes(tokens.shape[1])
        every = [Texts(model.params, tokens[some], lengths[some, None] - 1, sizes) for some in parts]
        for number, index, clean in clean_runs(model.layers, every):
            here = [component for component in kept if component.layer == number]
            rows = parts[index][parts[index] < len(items)]
            if here:
                writes, mixed = jax.device_get((clean.writes[:, 0], clean.mixed[:, 0]))
            for component in here:
                of = writes[:, component.site] if component.head == WHOLE else mixed[:, component.head]
                values[rows, where[component]] = of[: len(rows)]
        readings = [
            texts.read(jax.tree.map(lambda leaf, some=some: leaf[some], contrasts))
            for texts, some in zip(every, parts, strict=True)
        ]
        said = jax.tree.map(lambda *leaves: np.concatenate(leaves), *jax.device_get(readings))
        return _columns(items, asked, said.top[: len(items), 0], said.probabilities[: len(items), 0]), values


def _columns(
    items: Sequence[Item], asked: np.ndarray, top: np.ndarray, probabilities: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the columns of the bank's rows, of what clean runs say of the tokens they are `asked` for, [P, 3]."""
    answers = np.array(
        [spelled(item.answers, one) if item.answers else -1 for item, one in zip(items, top, strict=True)]
    )
    place = (asked[: len(items)] == answers[:, None]).argmax(
        axis=1
    )  # beside the most likely one, as it is the answer's
    of_answers = np.take_along_axis(probabilities, place[:, None], axis=1)[:, 0]
    columns = {
        "top": top,
        "top_probability": probabilities[:, 0],
        "answer": answers,
        "answer_probability": np.where(answers < 0, np.nan, of_answers),
    }
    return {name: columns[name].astype(dtype) for name, dtype in COLUMNS.items()}


def choose(clean: CleanPass, items: Sequence[Item], wanted: PromptsConfig, seed: int) -> tuple[list[Item], list[Item]]:
    """Choose the prompts that are swept, making the clean runs of all that are examined.

    Under a limit, prompts are examined in an order drawn from seed and id until enough are kept.

    Returns:
      The kept ones, shortest first, and all that were examined to find them.

    Raises:
      UserError: if none can be kept.
    """
    limit, correct_only = wanted.limit, wanted.filtered
    if correct_only and not any(item.answers for item in items):
        raise UserError("prompts: none has an answer to be right about; set --config.prompts.correct_only=False")

    def keep(item: Item, top: int) -> bool:
        return top in item.answers or not correct_only

    step = len(items)
    if limit:
        items = sorted(items, key=lambda i: hashlib.sha256(f"{seed} {i.prompt.id}".encode()).digest())
        step = 2 * max(limit, PREFILL_TOKENS // 64) if correct_only else limit
    kept: list[Item] = []
    examined: list[Item] = []
    with clean.bar(len(items)) as bar:
        for start in range(0, len(items), step):
            block = items[start : start + step]
            clean.run(block, bar, keep)
            examined += block
            kept += [item for item in block if keep(item, clean.bank.rows[item.key].top)]
            if limit and len(kept) >= limit:
                break
        bar.total = bar.n
    if not kept:
        raise UserError(
            f"prompts: {clean.model.name} answers none of the {len(examined)} right; give prompts that it knows, or"
            " set --config.prompts.correct_only=False"
        )
    return sorted(kept[: limit or None], key=by_length), examined
