"""Matched training runs compared: the same prompts swept in every model, and what differs between the arms."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from tqdm import tqdm

from hydra_jax.analysis.bootstrap import Bootstrap, interval
from hydra_jax.comparison import arms
from hydra_jax.comparison.arms import Key
from hydra_jax.config import ANSWER, AblationConfig, PromptsConfig, SweepConfig
from hydra_jax.errors import UserError
from hydra_jax.parsing import differences
from hydra_jax.store import effects as store
from hydra_jax.store import files, variables
from hydra_jax.sweep import run
from hydra_jax.text.prompts import Prompt, json_lines
from hydra_jax.text.prompts import read as read_prompts
from hydra_jax.training.config import TrainConfig
from hydra_jax.training.recall import answered, questions
from hydra_jax.training.workdir import PROMPTS, read_metrics, read_run
from hydra_jax.weights import checkpoints
from hydra_jax.weights.load import load

SWEEPS, COMMON = "sweeps", "prompts.jsonl"
SPLIT = "trained"
"""The split of the recall prompts that is swept: every model should answer them correctly."""

FEWEST = 20
"""The fewest prompts, answered correctly by all models, from which models are compared."""

MAY_DIFFER = ("arm", "seed", "dropout")
"""Settings in which matched runs may differ: all others are the same."""


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A training run.

    Attributes:
      workdir: its directory.
      config: its settings.
      corpus: SHA-256 of the text it was trained on.
      steps: the steps of its checkpoints.
    """

    workdir: Path
    config: TrainConfig
    corpus: str
    steps: list[int]

    def key(self, step: int) -> Key:
        """Return the key of its model at a step."""
        return Key(self.config.arm, self.config.seed, step)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The results of a comparison.

    Attributes:
      table: `arms.compared`, at every step.
      recall: `arm`, `seed`, `step` and the share of each split's prompts that is answered correctly.
      last: the last step, at which arms are compared.
      by_layer: `arm`, `ablated` site, `layer`, and the means over seeds and prompts of direct effect, total
        effect and parts of the compensation at that step, each with an interval.
      prompts: the number of prompts swept.
      sweeps: the directories of the sweeps at that step.
    """

    table: pd.DataFrame
    recall: pd.DataFrame
    last: int
    by_layer: pd.DataFrame
    prompts: int
    sweeps: dict[Key, Path]

    @property
    def arms(self) -> list[str]:
        """The arms, the reference first."""
        return sorted(self.table["arm"].unique(), key=lambda arm: (arm != arms.REFERENCE, arm))

    @property
    def final(self) -> pd.DataFrame:
        """The table at the last step."""
        return self.table[self.table["step"] == self.last]


def find(patterns: Sequence[str]) -> list[Path]:
    """Return the directories that match patterns, sorted within each; what has no wildcard stands for itself.

    Raises:
      UserError: if a pattern matches nothing.
    """
    workdirs = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        if not matches or not pattern:
            raise UserError(f"--workdirs: there is nothing at {pattern!r}; give directories of training runs")
        workdirs += [Path(match) for match in matches]
    return workdirs


def read_runs(workdirs: Sequence[Path], unfinished: bool = False) -> list[TrainedRun]:
    """Read training runs, and check that they are matched.

    Args:
      workdirs: their directories.
      unfinished: whether unfinished runs are allowed. Otherwise their last common step would be an earlier one
        without a word.

    Raises:
      UserError: if a directory is not a run, has no checkpoint or is not finished; or if a run differs from the
        first in more than it may, or is given twice.
    """
    runs: list[TrainedRun] = []
    for workdir in workdirs:
        config, stated = read_run(workdir)
        kept = checkpoints.steps(workdir)
        if not kept:
            raise UserError(f"{workdir}: has no checkpoint; train first")
        trained = TrainedRun(workdir, config, stated["corpus"], kept)
        if runs:
            first = runs[0]
            expected, settings = (
                {k: v for k, v in dataclasses.asdict(r.config).items() if k not in MAY_DIFFER} for r in (first, trained)
            )
            differing = differences(expected, settings) or ("" if trained.corpus == first.corpus else "the text")
            if differing:
                raise UserError(f"{workdir}: does not match {first.workdir} ({differing}); compare runs of one config")
        if kept[-1] < config.steps and not unfinished:
            raise UserError(
                f"{workdir}: has trained {kept[-1]} of {config.steps} steps; go on with it, or name --steps"
            )
        other = next((r for r in runs if r.config.arm == config.arm and r.config.dropout != config.dropout), None)
        if other:
            raise UserError(
                f"{workdir}: has other dropout than {other.workdir}, of the same arm; name arms --config.arm"
            )
        twin = next((r for r in runs if r.key(0) == trained.key(0)), None)
        if twin:
            raise UserError(f"{workdir}: is {config.arm}, seed {config.seed}, like {twin.workdir}; give each run once")
        runs.append(trained)
    return runs


def common_steps(runs: Sequence[TrainedRun], asked: Sequence[int] = ()) -> list[int]:
    """Return the steps of which every run has a checkpoint, or of them those `asked` for.

    Raises:
      UserError: if there are none, or a step that is asked for is not among them.
    """
    common = sorted(set.intersection(*(set(r.steps) for r in runs)))
    missing = next((step for step in asked if step not in common), None)
    if not common or missing is not None:
        what = "no step" if missing is None else f"not step {missing}"
        raise UserError(f"--steps: the runs have {what} in common; there are {', '.join(map(str, common)) or 'none'}")
    return sorted(set(asked)) or common


def common_prompts(runs: Sequence[TrainedRun], step: int, limit: int, progress: bool) -> list[Prompt]:
    """Return the recall prompts that every run answers correctly at a step; at most `limit`, drawn at random.

    Raises:
      UserError: if there are too few, or the runs have no recall prompts.
    """
    path = runs[0].workdir / PROMPTS
    if not path.is_file():
        raise UserError(f"{path}: is not there; only models trained on biographies have prompts with known answers")
    prompts = [prompt for prompt in read_prompts(str(path)) if prompt.id.startswith(f"{SPLIT}/")]
    right = np.ones(len(prompts), bool)
    for trained in tqdm(runs, desc="what all of them know", unit=" runs", disable=not progress):
        model = load(str(trained.workdir), step=step)
        right &= np.asarray(answered(model.params, questions(model.tokenizer, prompts, model.config.context)))
    known = [prompts[index] for index in np.flatnonzero(right)]
    if len(known) < FEWEST:
        raise UserError(
            f"--workdirs: all of the runs answer {len(known)} of {len(prompts)} prompts right at step {step}, a"
            f" comparison needs {FEWEST}; train longer"
        )
    order = np.random.default_rng(0).permutation(len(known))[: limit or None]
    return [known[index] for index in sorted(order)]


def compare(
    runs: Sequence[TrainedRun],
    workdir: Path,
    steps: Sequence[int],
    *,
    limit: int = 128,
    replacements: int = 15,
    samples: int = 1000,
    seed: int = 0,
    from_layer: int = 0,
    progress: bool = True,
) -> Comparison:
    """Sweep the layers of every run at every step into `workdir`, and compare the arms.

    Args:
      runs: from `read_runs`.
      workdir: the directory for sweeps; finished ones are not made again.
      steps: from `common_steps`; the last is where arms are compared.
      limit: the most prompts that are swept.
      replacements: replacements drawn for each ablation.
      samples: resamples of the bootstrap.
      seed: of the bootstrap and of the replacements.
      from_layer: the first ablated layer that enters the measures.
      progress: whether to show bars.

    Raises:
      UserError: if there is too little to compare, or the directory holds another comparison.
    """
    last = steps[-1]
    prompts = common_prompts(runs, last, limit, progress)
    path = workdir / COMMON
    text = json_lines(prompts)
    if path.is_file() and path.read_text("utf-8") != text:
        raise UserError(f"{workdir}: holds a comparison on other prompts; give another --workdir, or delete this one")
    files.write_text(path, text)
    draws = Bootstrap.draw_all(len(prompts), replacements, samples, np.random.default_rng(seed))
    measured, layers, sweeps = {}, {}, {}
    todo = [(trained, step) for step in steps for trained in runs]
    for trained, step in tqdm(todo, desc="sweeps", unit=" models", disable=not progress):
        key = trained.key(step)
        sweeps[key] = workdir / SWEEPS / f"{key.arm}-seed{key.seed}-step{key.step}"
        effects = _sweep(trained, step, sweeps[key], path, replacements, seed)
        late = np.flatnonzero(effects["ablated_layer"].values >= from_layer)
        measured[key] = arms.measures(effects.isel(ablated=late), draws)
        if step == last:
            layers[key] = effects
    return Comparison(
        table=arms.compared(arms.by_arm(measured, draws, seed), measured),
        recall=_recall(runs, steps),
        last=last,
        by_layer=_by_layer(layers, samples, seed),
        prompts=len(prompts),
        sweeps={key: path for key, path in sweeps.items() if key.step == last},
    )


def _sweep(trained: TrainedRun, step: int, into: Path, prompts: Path, replacements: int, seed: int) -> xr.Dataset:
    config = SweepConfig(
        model=str(trained.workdir),
        model_step=step,
        prompts=PromptsConfig(path=str(prompts), correct_only=False, target=ANSWER),
        ablation=AblationConfig(replacements=replacements, edges=False),
        seed=seed,
    )
    run.run(config, into, progress=False)
    effects = store.load_effects(into)
    if left_out := effects.attrs.get("left_out"):
        raise UserError(f"{into}: values of {left_out} prompts are not finite; leave this run or step out")
    return effects.sortby("prompt_id")


def _recall(runs: Sequence[TrainedRun], steps: Sequence[int]) -> pd.DataFrame:
    tables = []
    for trained in runs:
        metrics = read_metrics(trained.workdir)
        chosen = metrics[metrics.index.isin(steps)].filter(like="recall_")
        tables.append(chosen.reset_index().assign(arm=trained.config.arm, seed=trained.config.seed))
    return pd.concat(tables, ignore_index=True)


def _by_layer(layers: dict[Key, xr.Dataset], samples: int, seed: int) -> pd.DataFrame:
    """Tabulate the mean effects of each ablated layer by arm, with a bootstrap over seeds and prompts."""
    random = np.random.default_rng(seed)
    draws = Bootstrap.draw(next(iter(layers.values())).sizes["prompt"], samples, random)
    rows = []
    for arm in dict.fromkeys(key.arm for key in layers):
        sweeps = [effects for key, effects in layers.items() if key.arm == arm]
        with_seeds = draws.with_seeds(len(sweeps), random)
        labels = {"ablated": sweeps[0]["ablated_site"].values, "layer": sweeps[0]["ablated_layer"].values}
        for name in variables.EFFECTS:
            means = np.stack([effects[name].values.mean(axis=2) for effects in sweeps])
            low, high = interval(with_seeds.mean_over_seeds(means))
            columns = {"value": means.mean(axis=(0, 1)), "low": low, "high": high}
            rows.append(pd.DataFrame({"arm": arm, **labels, "effect": name} | columns))
    return pd.concat(rows, ignore_index=True)
