"""The description that a training run's directory has of itself, by which it is resumed, compared and loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import pandas as pd

from hydra_jax.errors import UserError
from hydra_jax.parsing import differences
from hydra_jax.store import files
from hydra_jax.text.prompts import json_lines
from hydra_jax.training.config import TrainConfig, train_config
from hydra_jax.weights.trained import RUN, TOKENIZER, is_trained, read_description

if TYPE_CHECKING:  # it imports grain, which loading a model need not wait for
    from hydra_jax.training.data import Corpus

PROMPTS = "prompts.jsonl"
METRICS = "metrics.jsonl"


def read_run(workdir: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """Return a run's config, and the rest of its file RUN: `vocab_size` and `corpus`, the corpus' SHA-256.

    Raises:
      UserError: if the file is missing or damaged.
    """
    stated = read_description(workdir)
    path = workdir / RUN
    try:
        return train_config(stated["config"]), {"vocab_size": stated["vocab_size"], "corpus": stated["corpus"]}
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); train into another --workdir") from error


def check_config(workdir: Path, config: TrainConfig) -> None:
    """Refuse to go on with a run of another config.

    Raises:
      UserError: if a setting differs, naming every one that does, or if the directory holds a model from elsewhere.
    """
    if not is_trained(workdir):
        if (workdir / "config.json").exists():
            raise UserError(f"{workdir}: holds another model; give another --workdir")
        return
    old, _ = read_run(workdir)
    differing = differences(dataclasses.asdict(old), dataclasses.asdict(config))
    if differing:
        raise UserError(
            f"{workdir}: holds a run of another configuration ({differing}); give another --workdir, or delete this one"
        )


def read_metrics(workdir: Path) -> pd.DataFrame:
    """Return a run's metrics, a row for each step that has any; metrics that were not taken at a step are NaN.

    Raises:
      UserError: if there are none or they cannot be read.
    """
    path = workdir / METRICS
    try:
        return pd.DataFrame([json.loads(line) for line in path.read_text("utf-8").splitlines()]).set_index("step")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}); train first") from error


def check_corpus(workdir: Path, corpus: Corpus) -> None:
    """Refuse to go on with a run on other data.

    Raises:
      UserError: if the run was begun on other data.
    """
    if is_trained(workdir) and read_run(workdir)[1]["corpus"] != corpus.digest:
        raise UserError(f"{workdir}: was begun on other text; give that at config.data.path, or another --workdir")


def describe(workdir: Path, config: TrainConfig, corpus: Corpus) -> None:
    """Write a run's config, tokenizer and prompts, unless they are there already."""
    if jax.process_index() or is_trained(workdir):
        return
    stated = {
        "config": dataclasses.asdict(config),
        "vocab_size": corpus.tokenizer.get_vocab_size(),
        "corpus": corpus.digest,
    }
    texts = {
        TOKENIZER: corpus.tokenizer.to_str(pretty=True),
        PROMPTS: json_lines(prompt for prompts in corpus.prompts.values() for prompt in prompts),
        RUN: json.dumps(stated, indent=2) + "\n",  # last, so that where it is, the others are
    }
    for name, text in texts.items():
        if text:
            files.write_text(workdir / name, text)
