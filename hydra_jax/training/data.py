"""What a model is trained on: documents, as tokens of a tokenizer trained on them, packed into rows of one length."""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import itertools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import grain
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from hydra_jax.errors import UserError
from hydra_jax.text.prompts import Prompt, read_text
from hydra_jax.training import biographies
from hydra_jax.training.config import DataConfig

BOUNDARY = "<|endoftext|>"
"""Stands before every document, and before a prompt, as its first token."""

SMALLEST_VOCABULARY = 257
"""Every byte, and the boundary."""

TOGETHER = 1000
"""Documents tokenised at once."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Rows of tokens to train on, and what to ask.

    Attributes:
      tokenizer: of the text.
      rows: [N, T + 1], of a context T: a row's first T tokens are read, and its last T are to be foretold.
      unseen_rows: [M, T + 1], kept for evaluation, though the tokenizer has seen them; of biographies none, as
        prompts evaluate them.
      prompts: with known answers, by split; of plain text none.
      boundary: the token BOUNDARY. Nothing foretells it: the loss is masked there.
    """

    tokenizer: Tokenizer
    rows: np.ndarray
    unseen_rows: np.ndarray
    prompts: Mapping[str, list[Prompt]]
    boundary: int

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of rows and tokenizer."""
        total = hashlib.sha256(self.tokenizer.to_str().encode())
        for rows in (self.rows, self.unseen_rows):
            total.update(np.ascontiguousarray(rows).data)
        return total.hexdigest()

    def batches(self, seed: int, size: int) -> grain.DatasetIterator:
        """Batches [size, T + 1] without end, every epoch in another order; the iterator's state can be saved."""
        rows = grain.MapDataset.source(self.rows).seed(seed).shuffle().repeat().batch(size, drop_remainder=True)
        return iter(rows.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def build(config: DataConfig, context: int, tokenizer: Tokenizer | None = None) -> Corpus:
    """The corpus of a config.

    Args:
      config: which data.
      context: T, tokens a row foretells.
      tokenizer: where there is one already; else one is trained.

    Raises:
      UserError: if a file cannot be read or is empty, or the vocabulary or text is too small.
    """
    if config.vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"config.data.vocab_size: is {config.vocab_size}, every byte and the boundary of documents take"
            f" {SMALLEST_VOCABULARY}; give that or more"
        )
    if config.kind == "biographies":
        documents = list(biographies.documents(config.seed, config.people, config.variants))
        prompts = biographies.recall_prompts(config.seed, config.people, config.unseen_people)
    else:
        documents, prompts = read_documents(config.path), {}
    tokenizer = tokenizer or train_tokenizer(documents, config.vocab_size)
    rows = pack(tokenizer, documents, context)
    unseen = 0 if prompts else max(1, round(config.holdout * len(rows)))
    if len(rows) <= unseen:
        raise UserError(
            f"config.data: the text makes {len(rows)} rows of {context + 1} tokens, of which {unseen} are kept for"
            " evaluation; give more text or a smaller config.model.context"
        )
    kept = np.zeros(len(rows), bool)
    kept[np.random.default_rng(config.seed).permutation(len(rows))[:unseen]] = True
    return Corpus(tokenizer, rows[~kept], rows[kept], prompts, boundary_of(tokenizer))


def read_documents(path: str) -> list[str]:
    """The files of comma-separated paths, directories (their *.txt) and patterns, a document each.

    Raises:
      UserError: if there are none, or one is empty or cannot be read.
    """
    files: list[Path] = []
    for part in filter(None, path.split(",")):
        part = os.path.expanduser(part.strip())
        found = sorted(Path(part).rglob("*.txt")) if os.path.isdir(part) else sorted(map(Path, glob.glob(part)))
        if not found:
            raise UserError(
                f"config.data.path: there is no text file at {part}; give UTF-8 files, or a directory of them"
            )
        files += found
    if not files:
        raise UserError("config.data.path: is empty; give UTF-8 files, or a directory of *.txt")
    documents = [read_text(file) for file in files]
    for file, text in zip(files, documents, strict=True):
        if not text.strip():
            raise UserError(f"{file}: has no text; remove it or write some")
    return documents


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens (fewer where the text has no more pairs to merge)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOUNDARY], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[BOUNDARY, "$A"], special_tokens=[(BOUNDARY, boundary_of(tokenizer))]
    )
    tokenizer.encode_special_tokens = True  # a document that spells the boundary does not make one
    return tokenizer


def boundary_of(tokenizer: Tokenizer) -> int:
    """The token that stands before a document.

    Raises:
      UserError: if the tokenizer has none.
    """
    token = tokenizer.token_to_id(BOUNDARY)
    if token is None:
        raise UserError(f"tokenizer.json: has no token {BOUNDARY}; train into another --workdir")
    return token


def pack(tokenizer: Tokenizer, documents: Iterable[str], context: int) -> np.ndarray:
    """Documents one after another, cut into rows [N, context + 1]; a row begins with the last token of the one before.

    What is left over at the end, less than a row, is not in it.
    """
    pieces = [np.empty(0, np.int32)]
    waiting = iter(documents)
    while some := list(itertools.islice(waiting, TOGETHER)):
        pieces += [np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch(some)]
    flat = np.concatenate(pieces)
    count = max(0, len(flat) - 1) // context
    rows = [flat[row * context :][: context + 1] for row in range(count)]
    return np.stack(rows) if rows else np.empty((0, context + 1), np.int32)
