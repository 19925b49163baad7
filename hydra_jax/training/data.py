"""Training data: documents as tokens, by a tokenizer that is trained on them, packed into rows of one length."""

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
"""The token that begins every document, and every prompt."""

SMALLEST_VOCABULARY = 257
"""The tokens that no vocabulary can do without: every byte, and the boundary."""

TOGETHER = 1000
"""The number of documents that are tokenised at once."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Rows of tokens to train on, and prompts or rows to evaluate with.

    Attributes:
      tokenizer: the text's tokenizer.
      rows: [N, T + 1] for a context of T: a row's first T tokens are read, and its last T predicted.
      unseen_rows: [M, T + 1], kept for evaluation, though the tokenizer has seen them; M = 0 for biographies, which
        are evaluated by prompts.
      prompts: prompts with known answers, by split; empty for plain text.
      boundary: the token BOUNDARY, which nothing predicts: the loss is masked there.
    """

    tokenizer: Tokenizer
    rows: np.ndarray
    unseen_rows: np.ndarray
    prompts: Mapping[str, list[Prompt]]
    boundary: int

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 (hex) of tokenizer and rows."""
        total = hashlib.sha256(self.tokenizer.to_str().encode())
        for rows in (self.rows, self.unseen_rows):
            total.update(np.ascontiguousarray(rows).data)
        return total.hexdigest()

    def batches(self, seed: int, size: int) -> grain.DatasetIterator:
        """Return endless batches [size, T + 1], every epoch in another order; the iterator's state can be saved."""
        rows = grain.MapDataset.source(self.rows).seed(seed).shuffle().repeat().batch(size, drop_remainder=True)
        return iter(rows.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def build(config: DataConfig, context: int, tokenizer: Tokenizer | None = None) -> Corpus:
    """Build the corpus of a config.

    Args:
      config: the data's settings.
      context: T, tokens that are predicted in a row.
      tokenizer: the text's tokenizer, if it exists already; else one is trained.

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
    """Read the files of comma-separated paths, directories (their *.txt) and patterns, a document each.

    Raises:
      UserError: if there is no file, or one is empty or cannot be read.
    """
    files: list[Path] = []
    for pattern in filter(None, path.split(",")):
        pattern = os.path.expanduser(pattern.strip())
        matches = Path(pattern).rglob("*.txt") if os.path.isdir(pattern) else map(Path, glob.glob(pattern))
        if not (matching := sorted(matches)):
            raise UserError(
                f"config.data.path: there is no text file at {pattern}; give UTF-8 files, or a directory of them"
            )
        files += matching
    if not files:
        raise UserError("config.data.path: is empty; give UTF-8 files, or a directory of *.txt")
    documents = [read_text(file) for file in files]
    for file, text in zip(files, documents, strict=True):
        if not text.strip():
            raise UserError(f"{file}: has no text; remove it or write some")
    return documents


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens (fewer where the text has no more pairs to merge)."""
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
    """Return the token that begins a document.

    Raises:
      UserError: if the tokenizer has no such token.
    """
    token = tokenizer.token_to_id(BOUNDARY)
    if token is None:
        raise UserError(f"tokenizer.json: has no token {BOUNDARY}; train into another --workdir")
    return token


def pack(tokenizer: Tokenizer, documents: Iterable[str], context: int) -> np.ndarray:
    """Join documents and cut them into rows [N, context + 1]; a row begins with the last token of the row before.

    Tokens at the end that do not fill a row are left out.
    """
    encoded = [np.empty(0, np.int32)]
    remaining = iter(documents)
    while some := list(itertools.islice(remaining, TOGETHER)):
        encoded += [np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch(some)]
    flat = np.concatenate(encoded)
    count = max(0, len(flat) - 1) // context
    rows = [flat[row * context :][: context + 1] for row in range(count)]
    return np.stack(rows) if rows else np.empty((0, context + 1), np.int32)
