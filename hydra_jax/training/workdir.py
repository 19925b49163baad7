"""What a training run's directory says of itself, so that it is gone on with, compared and loaded as what it is."""

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

if TYPE_CHECKING:  # it imports what loading a model need not wait for
    from hydra_jax.training.data import Corpus

PROMPTS = "prompts.jsonl"
METRICS = "metrics.jsonl"


def read_run(workdir: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """A run's config and what else RUN says: `vocab_size` and the corpus' SHA-256.

    Raises:
      UserError: if it is not there or damaged.
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
      UserError: that names every setting that differs, or says that a model from elsewhere is there.
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
    """A run's metrics, a row a step that has any; what was not taken at a step is NaN.

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
      UserError: if it was begun on other data.
    """
    if is_trained(workdir) and read_run(workdir)[1]["corpus"] != corpus.digest:
        raise UserError(f"{workdir}: was begun on other text; give that at config.data.path, or another --workdir")


def describe(workdir: Path, config: TrainConfig, corpus: Corpus) -> None:
    """Write the run's config, tokenizer and prompts, where they are not there yet."""
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
        RUN: json.dumps(stated, indent=2) + "\n",  # last: where it is, all of them are
    }
    for name, text in texts.items():
        if text:
            files.write_text(workdir / name, text)
