"""Programs of any kind, and what they do in prompts that are read after any of their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from hydra_jax.api.arguments import distinct, several
from hydra_jax.config import LAST, LAYERS, METRICS, RESPONDERS, TOP, AblationConfig
from hydra_jax.core import programs as core_programs
from hydra_jax.core.edits import Kind
from hydra_jax.core.prefill import MOST_LIKELY
from hydra_jax.core.programs import Program, Word, checked
from hydra_jax.errors import UserError, speaks_of_arguments
from hydra_jax.parsing import one_of
from hydra_jax.sweep import interventions
from hydra_jax.sweep.draws import Pool, few
from hydra_jax.sweep.interventions import Question
from hydra_jax.sweep.items import Positions, facts_beside, places_of, uncut
from hydra_jax.text.tokenizer import token_of
from hydra_jax.weights.model import Model


@speaks_of_arguments
def program(
    model: Model,
    clamp: Iterable[str] = (),
    freeze: Iterable[str] = (),
    probe: Iterable[str] = (),
    follow: Iterable[str] = (),
    rest: str = "follow",
) -> Program:
    """Return a program: what each component of the model does in an intervened run.

    To ablate a set is to clamp each of it; to hold a repairer still is to freeze it; `rest="probe"` gives direct
    edges, and `rest="freeze"` with `follow` the path through those that follow.

    Args:
      model: from `load`.
      clamp: components that are set to a value: "attn 23", "mlp 29", or for a head "attn 23.4".
      freeze: components that write what they write in the clean run; "norm" for the final norm's divisor.
      probe: attention or MLPs that write this, too, and of which is recorded what they would have changed.
      follow: attention or MLPs that go on computing, where `rest` is another word.
      rest: "follow", "freeze" or "probe", the word of every attention and MLP that is not named. The final norm follows
        unless it is frozen by name.

    Raises:
      UserError: if a name is not one of the model's components, or is named twice.
    """
    word = Word[one_of("rest", rest, ("follow", "freeze", "probe")).upper()]
    return core_programs.program(model.config, clamp, freeze, probe, follow, word)


@speaks_of_arguments
def intervene(
    model: Model,
    prompts: Any,
    programs: Mapping[str, Program],
    *,
    kind: str = "resample",
    replacements: int = 15,
    sources: Any = None,
    positions: Positions = LAST,
    target: str | int | Mapping[int, float] = TOP,
    foil: str | int | None = None,
    metrics: Sequence[str] = (),
    responders: str = LAYERS,
    seed: int = 0,
    rows: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Run programs in every prompt, in memory.

    Args:
      model: from `load`.
      prompts: as of `sweep`.
      programs: each from `program`, by a name of one's own.
      kind: "resample", "mean", "zero" or "noise": the values that clamped components take.
      replacements: R, drawn for each program where the kind is random: the same in all of them.
      sources: other prompts that values are drawn from; None for the prompts themselves or, where they are too few,
        for built-in facts.
      positions: the tokens after which a text is read, as of `sweep`: all of one prompt's by one pass over it.
      target: what is read: "top", the logit of the most likely next token of each reading's clean run; another token,
        by its text (" Paris") or id; or weights by id, of a linear combination of logits. Always centred, less the
        mean over the vocabulary.
      foil: a token, by its text or id, whose logit is subtracted; None or "" for none.
      metrics: any of "log_probability" and "rank", of the (first) target, "kl" and "top_changed", as of `sweep`: the
        variables `log_probability_drop`, `target_rank`, `kl`, `top_changed`.
      responders: "layers", or "heads" to record what each head of attention changes, too: 0 for those that are clamped
        or frozen.
      seed: of every draw.
      rows: rows of a block, moved at once; 0 for the device's default.
      progress: whether to show bars.

    Returns:
      A dataset over (prompt, program, reading, replacement): the effects, and `change`, what each component that
      follows or is probed adds to what is read (0 for those that are clamped, whose part is `direct_effect`).

    Raises:
      UserError: if an argument is out of range or a prompt cannot be read.
    """
    asked_kind = Kind(one_of("kind", kind, tuple(known.value for known in Kind)))
    config = AblationConfig(asked_kind, replacements)
    chosen, _ = several(prompts)
    items = uncut(model, chosen)
    if not isinstance(programs, Mapping):
        raise UserError('programs: have no names; give them as in {"cut": hj.program(model, clamp=["attn 23"])}')
    if not items or not programs:
        raise UserError(f"{'programs' if items else 'prompts'}: there are none; give one or more")
    metrics = [metrics] if isinstance(metrics, str) else metrics
    for name in metrics:
        one_of("metrics", name, METRICS)
    others = None
    if sources is not None:
        others = distinct(sources)
    elif len(items) <= config.draws and asked_kind is not Kind.ZERO:
        others = facts_beside(items[0].prompt.text, config.draws, seed)
    pool = None if others is None else uncut(model, others)
    draws = config.draws if sources is None or pool is None else few(Pool(pool), items, config)
    question = Question(
        programs={name: checked(model.config, one) for name, one in programs.items()},
        kind=asked_kind,
        draws=draws,
        **_contrast(model, target, foil),
        metrics=tuple(metrics),
        responders=one_of("responders", responders, RESPONDERS),
        seed=seed,
        rows=rows,
    )
    return interventions.intervene(model, question, items, pool, places_of(model, items, positions), progress)


def _contrast(model: Model, target: str | int | Mapping[int, float], foil: str | int | None) -> dict[str, np.ndarray]:
    """Return the tokens and weights of what is read."""
    if isinstance(target, Mapping):
        weights: dict[int, float] = dict(target)
    else:
        weights = {MOST_LIKELY if target == TOP else _token(model, "target", target): 1.0}
    if foil is not None and foil != "":
        other = _token(model, "foil", foil)
        weights[other] = weights.get(other, 0.0) - 1.0
    wrong = [token for token in weights if token != MOST_LIKELY and not 0 <= token < model.config.vocab_size]
    if wrong or not weights:
        raise UserError(
            f"target: {wrong[0] if wrong else 'nothing'} is no token of {model.name}; give ids from 0 to"
            f" {model.config.vocab_size - 1}"
        )
    return {"tokens": np.array(list(weights)), "weights": np.array(list(weights.values()))}


def _token(model: Model, argument: str, token: str | int) -> int:
    """Return the id of a token that is given by its text or id."""
    return token_of(model.tokenizer, token, argument, model.name) if isinstance(token, str) else int(token)
