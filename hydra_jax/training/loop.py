"""A training run in its directory: how it begins, stops, goes on and ends."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from hydra_jax.engine.cluster import Cluster
from hydra_jax.errors import UserError
from hydra_jax.store import files
from hydra_jax.text import tokenizer as tokenizers
from hydra_jax.training import data
from hydra_jax.training.checkpoint import Checkpoints
from hydra_jax.training.config import TrainConfig
from hydra_jax.training.recall import Evaluation
from hydra_jax.training.step import Metrics, State, initial, schedule, update
from hydra_jax.training.workdir import METRICS, check_config, check_corpus, describe
from hydra_jax.weights.trained import TOKENIZER, is_trained

BATCH = "data"
"""The mesh axis that a batch is split over."""


class Stopped(Exception):  # noqa: N818  (it is no error)
    """Raised after a signal asked for a stop, once the state is saved.

    Attributes:
      signal: the signal's number.
      step: the step of the checkpoint.
    """

    def __init__(self, number: int, step: int):
        super().__init__(number, step)
        self.signal, self.step = number, step


def train(config: TrainConfig, workdir: Path, progress: bool = True) -> None:
    """Train into a directory, going on from its last checkpoint.

    The directory receives the corpus' tokenizer, the run's settings, prompts with known answers, a line of
    metrics every few steps, and checkpoints.

    Args:
      config: the run's settings.
      workdir: the directory, which is made if it is not there.
      progress: whether to show a bar.

    Raises:
      UserError: if the run cannot be as it is asked for, or the loss is no longer a number.
      Stopped: on SIGINT and SIGTERM, once the state is saved.
    """
    devices = jax.device_count()
    if config.batch // config.accumulate % devices:
        raise UserError(
            f"config.batch: {config.batch} in {config.accumulate} parts does not divide over {devices} devices; give"
            f" a multiple of {devices * config.accumulate}"
        )
    lock = files.exclusive(workdir) if jax.process_index() == 0 else contextlib.nullcontext()
    with files.directory(workdir), contextlib.ExitStack() as held:
        failure, corpus = None, None
        try:
            held.enter_context(lock)
            check_config(workdir, config)
            trained = tokenizers.from_file(workdir / TOKENIZER) if is_trained(workdir) else None
            corpus = data.build(config.data, config.model.context, trained)
            evaluation = Evaluation(corpus, config)  # it may refuse the prompts: before anything is written
            check_corpus(workdir, corpus)
        except UserError as error:
            failure = error
        Cluster.joined().agree(failure, corpus.digest if corpus else "", "other texts (config.data.path)")
        assert corpus is not None
        describe(workdir, config, corpus)
        with Checkpoints(workdir, config.checkpoint) as checkpoints, _signals() as stop:
            _Run(config, workdir, corpus, evaluation, checkpoints, progress).go(stop)


class _Run:
    """The state that the steps of a run share."""

    def __init__(
        self,
        config: TrainConfig,
        workdir: Path,
        corpus: data.Corpus,
        evaluation: Evaluation,
        checkpoints: Checkpoints,
        progress: bool,
    ):
        self.config, self.corpus, self.checkpoints, self.progress = config, corpus, checkpoints, progress
        mesh = Mesh(np.array(jax.devices()), (BATCH,))
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.spread = NamedSharding(mesh, PartitionSpec(None, BATCH))
        self.log = _Log(workdir / METRICS)
        self.evaluation = evaluation
        self.rate = schedule(config.optimizer, config.steps)
        self.update = jax.jit(functools.partial(update, config=config), donate_argnums=0)
        self.boundary = jax.device_put(np.int32(corpus.boundary), self.everywhere)
        self.batches = corpus.batches(config.seed, config.batch)

    def go(self, stop: list[int]) -> None:
        """Train to the end, or until a signal's number is in `stop`, which may be added to at any time."""
        vocab_size = self.corpus.tokenizer.get_vocab_size()
        state = jax.jit(initial, static_argnums=(0, 1), out_shardings=self.everywhere)(self.config, vocab_size)
        if self.checkpoints.steps:
            state, position = self.checkpoints.restore(state)
            self.batches.set_state(position)
            self.log.cut(int(state.step))
        else:
            self.log.cut(-1)
            self.log.write(0, self.evaluation(state.weights))
            self._save(state)
        first = int(state.step)
        with tqdm(
            total=self.config.steps,
            initial=first,
            desc=f"{self.config.arm}, seed {self.config.seed}",
            unit=" steps",
            smoothing=0.1,
            disable=not self.progress,
        ) as bar:
            self._steps(state, first, bar, stop)

    def _steps(self, state: State, first: int, bar: tqdm, stop: list[int]) -> None:
        config = self.config
        shown: dict[str, str] = {}
        since, tokens = time.perf_counter(), 0
        for step in range(first + 1, config.steps + 1):
            state, metrics = self.update(state, self._batch(), self.boundary)
            bar.update()
            tokens += config.batch * config.model.context
            last = step == config.steps
            number = _any_of(stop, step % config.log_every == 0 or last)
            log, evaluate, save = (
                last or step % period == 0
                for period in (config.log_every, config.evaluate_every, config.checkpoint.every)
            )
            if not (log or evaluate or save or number):
                continue
            values = self._checked(metrics, step)
            elapsed = time.perf_counter() - since
            values |= {"learning_rate": float(self.rate(step - 1)), "tokens_per_second": tokens / elapsed}
            if evaluate:
                values |= self.evaluation(state.weights)
            if log or evaluate:
                self.log.write(step, values)
                since, tokens = time.perf_counter(), 0
            shown |= _shown(values)
            bar.set_postfix(shown, refresh=False)
            if save or number:
                self._save(state)
            if number and not last:
                raise Stopped(number, step)

    def _batch(self) -> jax.Array:
        rows = next(self.batches).reshape(self.config.accumulate, -1, self.config.model.context + 1)
        # Every process draws the whole batch, which is small, and gives its devices their part.
        return jax.make_array_from_callback(rows.shape, self.spread, lambda part: rows[part])

    def _checked(self, metrics: Metrics, step: int) -> dict[str, float]:
        values = {name: float(value) for name, value in vars(jax.device_get(metrics)).items()}
        if not np.isfinite(list(values.values())).all():
            saved = self.checkpoints.steps
            raise UserError(
                f"by step {step} the loss or its gradient is not a number; the last good step that is saved is"
                f" {saved[-1] if saved else 'none'}: lower config.optimizer.learning_rate or config.optimizer.clip and"
                " train into another --workdir"
            )
        return values

    def _save(self, state: State) -> None:
        self.checkpoints.save(state, self.batches.get_state())


def _shown(values: dict[str, float]) -> dict[str, str]:
    """Return the values that the bar shows, formatted, by the names that it shows them by."""
    forms = {
        "loss": "{:.3f}",
        "tokens_per_second": "{:,.0f}",
        "recall_trained": "{:.0%}",
        "recall_unseen_template": "{:.0%}",
        "unseen_loss": "{:.3f}",
    }
    names = {"tokens_per_second": "tokens/s", "recall_trained": "recall", "recall_unseen_template": "unseen templates"}
    return {names.get(name, name): form.format(values[name]) for name, form in forms.items() if name in values}


class _Log:
    """Metrics as JSON lines, written by one process."""

    def __init__(self, path: Path):
        self._path, self._mine = path, jax.process_index() == 0

    def cut(self, step: int) -> None:
        """Remove the lines of steps after `step`: those are taken again."""
        if not self._mine or not self._path.is_file():
            return
        kept = [line for line in self._path.read_text("utf-8").splitlines(keepends=True) if _step_of(line) <= step]
        files.write_text(self._path, "".join(kept))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a line."""
        if self._mine:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | values) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line that a kill has cut off
        return float("inf")


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Give a list that SIGINT and SIGTERM add their numbers to; a second SIGINT stops at once."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        del frame
        caught.append(number)
        if caught.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _any_of(stop: list[int], together: bool) -> int:
    """Return the signal that any process has caught, the same in all of them.

    It is 0 for none, and for several processes that do not ask `together`.
    """
    number = stop[0] if stop else 0
    if jax.process_count() == 1:
        return number
    if not together:
        return 0
    return int(multihost_utils.process_allgather(jnp.int32(number)).max())
