"""Evaluation of a model in training: the prompts that it answers right, and its loss on text kept from it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from hydra_jax.errors import UserError
from hydra_jax.models import transformer
from hydra_jax.models.transformer import Params
from hydra_jax.text.padding import padded
from hydra_jax.text.prompts import Prompt
from hydra_jax.text.tokenizer import answer_tokens, encode
from hydra_jax.training.config import TrainConfig
from hydra_jax.training.data import Corpus
from hydra_jax.training.step import batch_loss, computing

ASKED = 256
"""The most prompts of a split, and the most rows of text, that an evaluation takes; drawn by seed."""


class Questions(NamedTuple):
    """Prompts as arrays: tokens [P, T], lengths [P] and answers' first tokens [P].

    Like all inputs of an evaluation but the weights, they are on the host, so that every process may pass them in.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    answers: np.ndarray


def questions(tokenizer: Tokenizer, prompts: Sequence[Prompt], context: int) -> Questions:
    """Encode prompts, padded on the right.

    Raises:
      UserError: if a prompt is longer than the context.
    """
    encoded = [encode(tokenizer, prompt.text) for prompt in prompts]
    longest = max(map(len, encoded))
    if longest > context:
        raise UserError(f"config.model.context: is {context}, a prompt has {longest} tokens; give that or more")
    answers = [answer_tokens(tokenizer, prompt.text, prompt.answer)[0] for prompt in prompts]
    return Questions(*padded(encoded, context), np.array(answers, np.int32))


class Evaluation:
    """Evaluates weights of one run, always on the same prompts and rows.

    Args:
      corpus: the run's corpus.
      config: the run's settings.
    """

    def __init__(self, corpus: Corpus, config: TrainConfig):
        self._config, self._boundary = config, np.int32(corpus.boundary)
        random = np.random.default_rng(config.data.seed)
        self._asked: Mapping[str, Questions] = {
            split: questions(
                corpus.tokenizer,
                [prompts[index] for index in random.permutation(len(prompts))[:ASKED]],
                config.model.context,
            )
            for split, prompts in corpus.prompts.items()
            if prompts
        }
        self._rows = corpus.unseen_rows[random.permutation(len(corpus.unseen_rows))[:ASKED]]
        self._vocab_size = corpus.tokenizer.get_vocab_size()

    def __call__(self, weights: dict) -> dict[str, float]:
        """Return the share of right answers by split as `recall_SPLIT`; for text, `unseen_loss` in nats a token."""
        params = computing(self._config, weights, self._vocab_size)
        values = {f"recall_{split}": answered(params, asked).mean() for split, asked in self._asked.items()}
        if len(self._rows):
            values["unseen_loss"] = _unseen_loss(params, self._rows, self._boundary, self._config)
        return {name: float(value) for name, value in values.items()}


@jax.jit
def answered(params: Params, asked: Questions) -> jax.Array:
    """Return [P] bool, whether a prompt's most likely next token begins its answer."""

    def right(tokens: jax.Array, length: jax.Array, answer: jax.Array) -> jax.Array:
        _, trace = transformer.forward(params, tokens)
        return jnp.argmax(transformer.unembed(params, trace.resid_post[-1, length - 1])) == answer

    return jax.lax.map(lambda question: right(*question), asked, batch_size=ASKED)


@functools.partial(jax.jit, static_argnames="config")
def _unseen_loss(params: Params, rows: jax.Array, boundary: jax.Array, config: TrainConfig) -> jax.Array:
    total, count = batch_loss(params, rows, boundary, None, config)
    return total / count
