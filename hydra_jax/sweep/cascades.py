"""Cascades: the strongest attention is cut, then what repaired it most, and so on, in each prompt for itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from hydra_jax.core.edits import MLP, SITES, all_components
from hydra_jax.core.programs import program, together
from hydra_jax.engine.batching import fill_up
from hydra_jax.engine.rows import Rows
from hydra_jax.store.variables import NO_CUT
from hydra_jax.sweep.ablations import Walked
from hydra_jax.sweep.plan import Plan
from hydra_jax.sweep.sources import Sources


def cascade(
    plan: Plan, part: slice, size: int, sources: Sources, progress: Callable[[float], object] = lambda done: None
) -> dict[str, np.ndarray]:
    """Cut, in some of a plan's prompts, one component after another, and return the variables of a result store.

    The first is `plan.start`, or the attention that contributes most in the clean run: the last MLP often contributes
    more, but has nothing downstream that could repair it. Each next one is the component whose contribution grew most,
    on average over replacements, in the run without those before it. Where none grew, the cascade ends. Every step is
    one walk of all the prompts, each with its own cuts.

    Args:
      plan: the sweep; its components are all writes.
      part: which of its prompts.
      size: how many they are filled up to, so that all walks of a sweep share their compilations.
      sources: of replacements.
      progress: told of how many more interventions are done.

    Returns:
      Those of cascades, and those of the clean run.
    """
    steps, draws, count = plan.ablation.cascade, plan.ablation.draws, part.stop - part.start
    prompts = np.array(fill_up(range(part.start, part.stop), size))
    clamps = np.zeros((size, plan.model.config.layers, 2), bool)
    clean = _walk(plan, prompts, sources, clamps)
    cut = np.full((count, steps), NO_CUT, np.int16)
    logits, probabilities, ranks = (np.full((count, steps, draws), np.nan, np.float32) for _ in range(3))
    answers = np.full((count, steps, plan.model.config.components), np.nan, np.float32)
    rising = np.nan_to_num(clean.contributions[:count, 0])
    if plan.start is None:
        rising[:, MLP :: len(SITES)] = 0
    else:
        rising[:] = 0
        rising[:, plan.start.index] = 1
    frozen = [one.index for one in plan.ablation.frozen(plan.model.config)]
    going = np.arange(count)
    for step in range(steps):
        rising[:, frozen] = 0
        going = going[rising[going].max(axis=1) > 0]
        if going.size:
            cut[going, step] = rising[going].argmax(axis=1)
            clamps.reshape(size, -1)[going, cut[going, step]] = True
            effects, metrics = _ablated(_walk(plan, prompts, sources, clamps), going)
            rising[going] = answers[going, step] = _mean_of_finite(effects.compensation.reshape(len(going), draws, -1))
            logits[going, step] = clean.reading.centred_logit[going] - effects.total_effect
            probabilities[going, step] = clean.reading.probability[going] * np.exp(-metrics.log_probability_drop)
            ranks[going, step] = metrics.target_rank
        progress(count * draws)
    named = {"cut_logit": logits, "cut_probability": probabilities, "cut_rank": ranks, "cut_compensation": answers}
    whole: dict[str, Any] = {
        "clean_logit": clean.reading.centred_logit[:, 0],
        "clean_probability": clean.reading.probability[:, 0],
        "final_scale": clean.reading.final_scale[:, 0],
        "delta_unembed": clean.contributions[:, 0],
    }
    return {"cut_component": cut, **named, **{name: values[:count] for name, values in whole.items()}}


def _walk(plan: Plan, prompts: np.ndarray, sources: Sources, clamps: np.ndarray) -> Walked:
    """Walk prompts with one program, of which each clamps its own writes, [P, L, 2]."""
    config = plan.model.config
    cut = [one for one in all_components(config.layers) if clamps[:, one.layer, one.site].any()]
    programs = together([program(config, cut, plan.ablation.frozen_names)])
    return Walked(plan, prompts, programs, sources, lambda done: None, clamps=clamps)


def _ablated(walked: Walked, prompts: np.ndarray) -> tuple[Any, Any]:
    """Return the effects and the metrics of some of the prompts that were walked, [P, R] each."""
    effects = walked.each(Rows.effects)
    metrics = walked.each(lambda rows, reading: rows.metrics(reading, walked.logits_at_once))
    return jax.tree.map(lambda leaf: np.asarray(leaf)[prompts, 0, 0], (effects, metrics))


def _mean_of_finite(values: np.ndarray) -> np.ndarray:
    """Return the mean over replacements of [P, R, C], of those that are finite: 0 where none is."""
    finite = np.isfinite(values).all(axis=-1, keepdims=True)
    return np.where(finite, values, 0).sum(axis=1) / np.maximum(finite.sum(axis=1), 1)
