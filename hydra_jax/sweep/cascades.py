"""Cascades: what contributes most is cut, then what repaired that most, and so on, in each prompt for itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from hydra_jax.core.edits import all_components
from hydra_jax.core.effects import Effects
from hydra_jax.core.metrics import Metrics
from hydra_jax.core.programs import Program, program, together
from hydra_jax.engine.batching import fill_up
from hydra_jax.engine.rows import Rows
from hydra_jax.store.variables import NO_CUT
from hydra_jax.sweep.ablations import Walked
from hydra_jax.sweep.plan import Plan
from hydra_jax.sweep.sources import Sources

AT_ONCE = 8
"""Prompts that are cut at once: each has a set of its own, and all are run with all of these."""


def cascade(
    plan: Plan,
    part: slice,
    sources: Sources,
    progress: Callable[[float], object] = lambda done: None,
) -> dict[str, np.ndarray]:
    """Cut, in some of a plan's prompts, one component after another, and return the variables of a result store.

    The first is `plan.start`, or what contributes most in the clean run; each next one the component whose
    contribution grew most, on average over replacements, in the run without those before it. Where none grew, the
    cascade ends.

    Args:
      plan: the sweep; its components are all writes.
      part: which of its prompts.
      sources: of replacements.
      progress: told of how many more interventions are done.

    Returns:
      Those of cascades, and those of the clean run.
    """
    size = min(plan.sizer.fill_up(AT_ONCE), plan.sizer.fill_up(part.stop - part.start))
    groups = [range(first, min(first + size, part.stop)) for first in range(part.start, part.stop, size)]
    found = []
    for group in groups:
        found.append(_Cuts(plan, group, size, sources).made())
        progress(len(group) * plan.ablation.cascade * plan.ablation.draws)
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


class _Cuts:
    """The cuts of a few prompts."""

    def __init__(self, plan: Plan, group: Sequence[int], size: int, sources: Sources) -> None:
        self._plan, self._count, self._sources = plan, len(group), sources
        self._prompts = np.array(fill_up(list(group), size))
        self._components = all_components(plan.model.config.layers)

    def made(self) -> dict[str, np.ndarray]:
        """Return the variables, [P, K, ...]."""
        plan, steps = self._plan, self._plan.ablation.cascade
        shape = self._count, steps, plan.ablation.draws
        cut = np.full(shape[:2], NO_CUT, np.int16)
        logits, probabilities, ranks = (np.full(shape, np.nan, np.float32) for _ in range(3))
        answers = np.full((*shape[:2], len(self._components)), np.nan, np.float32)
        clean = self._walk([program(plan.model.config, freeze=plan.ablation.frozen_names)])
        logit, probability = clean.reading.centred_logit[:, 0], clean.reading.probability[:, 0]
        rising = np.nan_to_num(clean.contributions[: self._count, 0])
        if plan.start is not None:
            rising[:] = 0
            rising[:, plan.start.index] = 1
        frozen = [one.index for one in plan.ablation.frozen(plan.model.config)]
        sets: list[tuple[int, ...]] = [()] * self._count
        going = np.ones(self._count, bool)
        for step in range(steps):
            rising[:, frozen] = 0
            going &= rising.max(axis=1) > 0
            if not going.any():
                break
            for index in np.flatnonzero(going):
                cut[index, step] = rising[index].argmax()
                sets[index] = (*sets[index], int(cut[index, step]))
            effects, metrics = self._ablated(sets)
            rising = _mean_of_finite(np.asarray(effects.compensation).reshape(*shape[::2], -1))
            for index in np.flatnonzero(going):
                answers[index, step] = rising[index]
                logits[index, step] = logit[index] - effects.total_effect[index]
                probabilities[index, step] = probability[index] * np.exp(-metrics.log_probability_drop[index])
                ranks[index, step] = metrics.target_rank[index]
        named = {"cut_logit": logits, "cut_probability": probabilities, "cut_rank": ranks}
        whole: dict[str, Any] = {
            "clean_logit": logit,
            "clean_probability": probability,
            "final_scale": clean.reading.final_scale[:, 0],
            "delta_unembed": clean.contributions[:, 0],
        }
        said = {name: values[: self._count] for name, values in whole.items()}
        return {"cut_component": cut, **named, "cut_compensation": answers} | said

    def _ablated(self, sets: Sequence[tuple[int, ...]]) -> tuple[Effects, Metrics]:
        """Return the effects of each prompt's set in that prompt, [P, R]."""
        config, frozen = self._plan.model.config, self._plan.ablation.frozen_names
        different = sorted(set(sets), key=lambda each: (min(each, default=config.components), each))
        # As many programs always: a walk of another number would be compiled anew.
        every = fill_up(different, len(self._prompts))
        clamps = [[self._components[index] for index in each] for each in every]
        walked = self._walk([program(config, clamp, frozen) for clamp in clamps])
        effects: Effects = walked.each(Rows.effects)
        metrics: Metrics = walked.each(lambda rows, reading: rows.metrics(reading, walked.logits_at_once))
        place = np.arange(self._count), np.array([different.index(each) for each in sets]), 0
        return jax.tree.map(lambda leaf: leaf[place], (effects, metrics))

    def _walk(self, programs: Sequence[Program]) -> Walked:
        return Walked(self._plan, self._prompts, together(programs), self._sources, lambda done: None)


def _mean_of_finite(values: np.ndarray) -> np.ndarray:
    """Return the mean over replacements of [P, R, C], of those that are finite: 0 where none is."""
    finite = np.isfinite(values).all(axis=-1, keepdims=True)
    return np.where(finite, values, 0).sum(axis=1) / np.maximum(finite.sum(axis=1), 1)
