"""What a sweep computes with: prompts as tokens, their clean runs, which are kept, and all draws."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from hydra_jax import prompts as prompt_sets
from hydra_jax.config import ANSWER, TOP, AblationConfig, PromptsConfig
from hydra_jax.edits import Component, WriteStatistics, draw_sources, prompt_keys
from hydra_jax.effects import delta_unembed, head_unembed
from hydra_jax.errors import UserError
from hydra_jax.models.load import Model
from hydra_jax.models.tokenizer import answer_token, encode
from hydra_jax.models.transformer import Params
from hydra_jax.prefill import MOST_LIKELY, Clean, prefill
from hydra_jax.prompts import Prompt

PREFILL_TOKENS = 4096
"""Tokens of clean runs at once: their traces are the largest thing in memory when prompts are long."""

POOL = 64
"""Built-in facts that replacements for a single prompt come from."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt as the model reads it: its tokens, and its answer's first (None without an answer)."""

    prompt: Prompt
    tokens: tuple[int, ...]
    answer: int | None


@dataclasses.dataclass(frozen=True)
class CleanRow:
    """A prompt's clean run as the host keeps it.

    Attributes:
      item: the prompt.
      top: the most likely next token.
      target: the token that is read.
      delta_unembed: [2L], what each component contributes to its logit.
      head_unembed: [L * H], what each head does.
      clean_logit: centred.
      clean_probability: of the target.
      final_scale: sigma.
      ablatable: [U, E], what ablations replace: every write [2L, D], or what every head mixed [L * H, head_dim].
    """

    item: Item
    top: int
    target: int
    delta_unembed: np.ndarray
    head_unembed: np.ndarray
    clean_logit: float
    clean_probability: float
    final_scale: float
    ablatable: np.ndarray

    @property
    def correct(self) -> bool:
        """Whether the most likely next token begins the answer."""
        return self.top == self.item.answer


def itemise(model: Model, prompts: Sequence[Prompt]) -> list[Item]:
    """Tokens of every prompt.

    Raises:
      UserError: if a prompt is longer than the model's context, or has a token that the model has no row for.
    """
    items = []
    for prompt in prompts:
        tokens = tuple(encode(model.tokenizer, prompt.text))
        if not 0 < len(tokens) <= model.config.context:
            raise UserError(
                f"prompt {prompt.name}: has {len(tokens):,} tokens, {model.name} takes 1 to"
                f" {model.config.context:,}; shorten or remove it"
            )
        if max(tokens) >= model.config.vocab_size:
            raise UserError(
                f"prompt {prompt.name}: token {model.tokenizer.id_to_token(max(tokens))} has no row in the embedding of"
                f" {model.name}; reword or remove it"
            )
        answer = answer_token(model.tokenizer, prompt.text, prompt.answer) if prompt.answer else None
        items.append(Item(prompt, tokens, answer))
    return items


def padded_length(tokens: int, context: int) -> int:
    """What a length is padded to: few different ones, as each is compiled for anew."""
    step = 32 if tokens > 32 else 8
    return min(math.ceil(tokens / step) * step, context)


def default_rows() -> int:
    """Edits at once that fill the device's matrix units: on a CPU as measured, on accelerators an estimate."""
    return 512 if jax.default_backend() == "cpu" else 4096


def prompts_at_once(rows: int, draws: int) -> int:
    """How many prompts make up about `rows` edits (0: the device's default) of `draws` each."""
    return max(1, (rows or default_rows()) // draws)


def batch_of(items: Sequence[Item], size: int, context: int) -> tuple[jax.Array, jax.Array]:
    """Tokens [size, T] and lengths [size]; the last item fills what is left over."""
    items = [*items, *[items[-1]] * (size - len(items))]
    tokens, lengths = padded([item.tokens for item in items], context)
    return jnp.asarray(tokens), jnp.asarray(lengths)


def padded(prompts: Sequence[Sequence[int]], context: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [P, T], padded on the right, and lengths [P]."""
    lengths = np.array([len(tokens) for tokens in prompts], np.int32)
    rows = np.zeros((len(prompts), padded_length(int(lengths.max()), context)), np.int32)
    for row, tokens in zip(rows, prompts, strict=True):
        row[: len(tokens)] = tokens
    return rows, lengths


def evenly(count: int, most: int) -> list[slice]:
    """Slices of `count` things into as few as possible of at most `most`, of one size but the last."""
    size = math.ceil(count / math.ceil(count / most))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


@jax.jit
def prefill_batch(params: Params, tokens: jax.Array, lengths: jax.Array, targets: jax.Array) -> Clean:
    """`prefill` of [P, T] tokens, [P] lengths and [P] targets."""
    together = max(1, PREFILL_TOKENS // tokens.shape[1])
    run = functools.partial(prefill, params)
    return jax.lax.map(lambda each: run(*each), (tokens, lengths, targets), batch_size=together)


@functools.partial(jax.jit, static_argnames="by_head")
def _read(params: Params, clean: Clean, by_head: bool) -> tuple[jax.Array, ...]:
    """What the host keeps of P clean runs: in the order of CleanRow's fields, after `item`."""
    count = len(clean.target)
    contributions = jax.vmap(delta_unembed)(clean).reshape(count, -1)
    heads = jax.vmap(head_unembed, (None, 0))(params, clean).reshape(count, -1)
    values = clean.mixed if by_head else clean.writes
    ablatable = values.reshape(count, -1, values.shape[-1])
    return (
        clean.top,
        clean.target,
        contributions,
        heads,
        clean.centred_logit,
        clean.probability,
        clean.final_scale,
        ablatable,
    )


def _clean_rows(
    model: Model,
    items: Sequence[Item],
    batch: int,
    by_head: bool,
    target: str,
    keep: Callable[[CleanRow], bool],
    bar: tqdm,
) -> Iterator[CleanRow]:
    """The clean runs of `items`, shortest first; those that `keep` refuses come without `ablatable`."""
    items = sorted(items, key=_by_length)
    slices = evenly(len(items), batch)
    for part in slices:
        chosen, size = items[part], slices[0].stop
        tokens, lengths = batch_of(chosen, size, model.config.context)
        targets = [item.answer if target == ANSWER else None for item in chosen]
        read = np.array([MOST_LIKELY if each is None else each for each in targets])
        read = np.pad(read, (0, size - len(chosen)), mode="edge")
        clean = prefill_batch(model.params, tokens, lengths, jnp.asarray(read))
        columns = jax.device_get(_read(model.params, clean, by_head))
        for item, top, read_token, contributions, heads, logit, probability, scale, ablatable in zip(
            chosen, *columns, strict=False
        ):
            # Copies, or the batch that they are views of would stay in memory with them.
            row = CleanRow(
                item=item,
                top=int(top),
                target=int(read_token),
                delta_unembed=contributions.copy(),
                head_unembed=heads.copy(),
                clean_logit=float(logit),
                clean_probability=float(probability),
                final_scale=float(scale),
                ablatable=np.empty(0, np.float32),
            )
            yield dataclasses.replace(row, ablatable=ablatable.copy()) if keep(row) else row
        bar.update(len(chosen))


def facts_beside(text: str, replacements: int, seed: int) -> list[Prompt]:
    """Built-in facts that replacements for a prompt of one's own come from, drawn by seed."""
    facts = [fact for fact in prompt_sets.builtin() if fact.text != text]
    drawn = np.random.default_rng(seed).choice(len(facts), min(len(facts), max(POOL, replacements + 1)), replace=False)
    return [facts[place] for place in drawn]


def clean_rows(
    model: Model, items: Sequence[Item], batch: int, by_head: bool, progress: bool, target: str = TOP
) -> list[CleanRow]:
    """The clean runs of all of `items`, shortest first."""
    with _bar(len(items), progress) as bar:
        return list(_clean_rows(model, items, batch, by_head, target, lambda row: True, bar))


def choose(
    model: Model,
    items: Sequence[Item],
    wanted: PromptsConfig,
    seed: int,
    batch: int,
    by_head: bool,
    progress: bool,
) -> tuple[list[CleanRow], list[CleanRow]]:
    """Which prompts are swept.

    Under a limit, prompts are examined in an order drawn from seed and id until enough are kept.

    Returns:
      The kept ones' clean runs, shortest first, and those of all that were examined to find them.

    Raises:
      UserError: if none can be kept.
    """
    limit, correct_only = wanted.limit, wanted.filtered
    unanswered = next((item.prompt for item in items if item.answer is None), None)
    if wanted.target == ANSWER and unanswered:
        raise UserError(
            f"prompt {unanswered.name}: has no answer to read; give it one, or set --config.prompts.target=top"
        )
    if correct_only and all(item.answer is None for item in items):
        raise UserError("prompts: none has an answer to be right about; set --config.prompts.correct_only=False")

    def keep(row: CleanRow) -> bool:
        return row.correct or not correct_only

    step = len(items)
    if limit:
        items = sorted(items, key=lambda i: hashlib.sha256(f"{seed} {i.prompt.id}".encode()).digest())
        step = 2 * max(limit, PREFILL_TOKENS // 64) if correct_only else limit
    kept: list[CleanRow] = []
    examined: list[CleanRow] = []
    with _bar(len(items), progress) as bar:
        for start in range(0, len(items), step):
            block = items[start : start + step]
            rows = {
                row.item.prompt.id: row for row in _clean_rows(model, block, batch, by_head, wanted.target, keep, bar)
            }
            examined += rows.values()
            kept += [rows[item.prompt.id] for item in block if keep(rows[item.prompt.id])]
            if limit and len(kept) >= limit:
                break
        bar.total = bar.n
    if not kept:
        raise UserError(
            f"prompts: {model.name} answers none of the {len(examined)} right; give prompts that it knows, or"
            " set --config.prompts.correct_only=False"
        )
    return sorted(kept[: limit or None], key=lambda row: _by_length(row.item)), examined


def _by_length(item: Item) -> tuple[int, str]:
    return len(item.tokens), item.prompt.id


def _bar(prompts: int, progress: bool) -> tqdm:
    return tqdm(total=prompts, desc="clean pass", unit=" prompts", disable=not progress)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a sweep computes with, prompts in order of length.

    Attributes:
      model: the model.
      rows: P clean runs, of the prompts that are swept.
      bank: those that replacements, means and deviations come from; among them, or equal to them, are `rows`.
      ablation: what is ablated, and how.
      seed: of the draws.
      chunks: runs of prompts that are computed and stored together.
      tolerance: of the identity, in logits.
    """

    model: Model
    rows: Sequence[CleanRow]
    bank: Sequence[CleanRow]
    ablation: AblationConfig
    seed: int
    chunks: Sequence[slice]
    tolerance: float

    @functools.cached_property
    def ids(self) -> list[str]:
        """The prompts' ids."""
        return [row.item.prompt.id for row in self.rows]

    @functools.cached_property
    def keys(self) -> jax.Array:
        """[P] keys."""
        return prompt_keys(self.seed, self.ids)

    @functools.cached_property
    def sources(self) -> np.ndarray:
        """[P, R], places in the bank; -1 where the kind takes nothing from another prompt."""
        if self.ablation.kind == "resample":
            ids = [row.item.prompt.id for row in self.bank]
            drawn = draw_sources(prompt_keys(self.seed, ids), ids, self.ablation.draws)
            places = {name: place for place, name in enumerate(ids)}
            return drawn[[places[name] for name in self.ids]]
        if self.ablation.kind != "zero" and len(self.bank) < 2:
            raise UserError(f"prompts: a {self.ablation.kind} over one prompt says nothing; give more prompts")
        return np.full((len(self.rows), self.ablation.draws), -1)

    @functools.cached_property
    def components(self) -> list[Component]:
        """The ablated ones."""
        return self.ablation.components(self.model.config)

    @functools.cached_property
    def ablatable(self) -> np.ndarray:
        """[B, U, E], every write or what every head mixed, in every prompt of the bank."""
        return np.stack([row.ablatable for row in self.bank])

    def unit(self, component: Component) -> int:
        """A component's place along `ablatable`'s second axis."""
        if self.ablation.by_head:
            return component.layer * self.model.config.heads + component.head
        return component.place

    @functools.cached_property
    def statistics(self) -> WriteStatistics:
        """[U, E], of every unit over the prompt set; zeros for the kinds that do not read them."""
        if self.ablation.kind not in ("mean", "noise"):
            nothing = np.zeros(self.ablatable.shape[1:], np.float32)
            return WriteStatistics(nothing, nothing)
        # Summed in order of id, so that the order of prompts changes nothing.
        values = self.ablatable[np.argsort([row.item.prompt.id for row in self.bank])]
        mean, deviation = values.mean(axis=0, dtype=np.float64), values.std(axis=0, dtype=np.float64)
        return WriteStatistics(mean.astype(np.float32), deviation.astype(np.float32))
