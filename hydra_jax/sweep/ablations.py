"""Every component's ablations in a few prompts, by one walk: as a result store has them, or in full for one prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import xarray as xr

from hydra_jax.config import EDGES, FREE, HEADS
from hydra_jax.core.edits import WHOLE, Ablation, Component, all_components
from hydra_jax.core.effects import Effects
from hydra_jax.core.prefill import Reading
from hydra_jax.core.programs import Program, Word, program, together
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.batching import evenly, fill_up
from hydra_jax.engine.rows import Draws, Rows
from hydra_jax.engine.summary import summarise as summarise_effects
from hydra_jax.engine.walk import Texts, forward
from hydra_jax.engine.walk import program as device_program
from hydra_jax.errors import UserError
from hydra_jax.models.pieces import LayerParams
from hydra_jax.models.transformer import Contrast
from hydra_jax.store import variables
from hydra_jax.sweep.items import batch_of
from hydra_jax.sweep.plan import Plan
from hydra_jax.sweep.readout import NONE
from hydra_jax.sweep.sources import Sources
from hydra_jax.text.padding import padded_length

Progress = Callable[[float], object]


class Part:
    """Some of a plan's prompts on their way through the layers, each with rows of every program, read after Q tokens.

    Attributes:
      texts: the prompts.
      rows: theirs.
    """

    def __init__(
        self,
        plan: Plan,
        prompts: np.ndarray,
        programs: Program,
        sources: Sources,
        places: np.ndarray,
        contrasts: Contrast,
        responding_heads: bool,
        clamps: np.ndarray | None,
    ) -> None:
        """Begin; for arguments see `Walked`."""
        items = [plan.items[index] for index in prompts]
        tokens, _ = batch_of(items, len(prompts), plan.model.config.context)
        self._contrasts, self._by_head = contrasts, bool(programs.by_heads.any())
        self.texts = Texts(plan.model.params, tokens, places, plan.sizer.sizes(tokens.shape[1]))
        draws, at_once = plan.ablation.draws, plan.sizer.asked.at_once
        self.rows = Rows(self.texts, programs, draws, contrasts, at_once, responding_heads, clamps)
        self._values = Draws(
            *(self.texts.mesh, self.rows.layout, plan.ablation.kind, self.texts.put(plan.keys[prompts])),
            lambda component: sources(prompts, component),
            lambda component: jax.tree.map(self.texts.put, plan.statistics_of(component, prompts)),
        )
        self._added: list[tuple[Any, Any]] = []

    def through(self, number: int, layer: LayerParams) -> None:
        """Go through a layer."""
        clean = self.texts.through(layer)
        self._added.append(self.texts.contributions(layer, clean, self.rows.readout, self._by_head))
        self.rows.through(number, layer, clean, self._values)

    def read(self) -> tuple[Reading, np.ndarray, np.ndarray | None]:
        """Return what the texts say [P, Q], what writes add to it [P, Q, 2L], and heads where one is clamped."""
        reading = self.texts.read(self._contrasts)
        writes, heads = zip(*jax.device_get(self._added), strict=True)
        scale = jax.device_get(reading.final_scale)[..., None]

        def joined(each: Sequence[np.ndarray]) -> np.ndarray:
            return np.stack(each, axis=2).reshape(*scale.shape[:2], -1) / scale

        return reading, joined(writes), joined(heads) if self._by_head else None


class Walked:
    """A walk of some of a plan's prompts, in parts that are computed one after another in every layer.

    Attributes:
      reading: [P, Q, ...], on this host.
      contributions: [P, Q, 2L], what each write adds to what is read.
      of_heads: [P, Q, L * H], what each head adds; None where no head is clamped.
      logits_at_once: rows that memory lets be unembedded together.
    """

    def __init__(
        self,
        plan: Plan,
        prompts: np.ndarray,
        programs: Program,
        sources: Sources,
        progress: Progress,
        places: np.ndarray | None = None,
        contrasts: Contrast | None = None,
        responding_heads: bool = False,
        clamps: np.ndarray | None = None,
    ) -> None:
        """Walk.

        Args:
          plan: the sweep.
          prompts: indices of P of its prompts.
          programs: G of them, in order of their first clamps, whose clamps are the plan's components.
          sources: of replacements.
          progress: told of how much more is done, all of it 1.
          places: [P, Q], the tokens after which they are read; None for the last ones.
          contrasts: [P, Q, K], what is read; None for the plan's.
          responding_heads: whether is recorded what each head changes.
          clamps: [P, L, 2], where prompts differ in what one program clamps: see `engine.rows.Rows`.
        """
        model, c = plan.model, plan.model.config
        self._heads = c.heads
        if places is None:
            places = np.array([[len(plan.items[index].tokens) - 1] for index in prompts], np.int32)
        if contrasts is None:
            contrasts = jax.tree.map(lambda leaf: leaf[prompts][:, None], plan.contrasts)

        def part(some: np.ndarray) -> Part:
            asked = jax.tree.map(lambda leaf: leaf[some], contrasts)
            own = None if clamps is None else clamps[some]
            return Part(plan, prompts[some], programs, sources, places[some], asked, responding_heads, own)

        # Of one size, whatever the number of prompts: what is computed at once does not hang on memory.
        slices = np.split(np.arange(len(prompts)), plan.sizer.parts(len(prompts)))
        self._parts = [part(some) for some in slices]
        self.logits_at_once = plan.sizer.sizes(int(places.max()) + 1).logits
        every = max(1, sum(self._parts[0].rows.work(number) for number in range(c.layers)))
        for number, layer in enumerate(forward(c, model.layers)):
            for one in self._parts:
                one.through(number, layer)
                # One layer is computed while the next is handed over; a streamed one has to make room for that.
                one.rows.wait(number if model.layers.streamed else number - 1)
                progress(one.rows.work(number) / every / len(self._parts))
        self._readings, added, of_heads = zip(*(one.read() for one in self._parts), strict=True)
        self.reading: Reading = _joined(self._readings)
        self.contributions = np.concatenate(added)
        self.of_heads = None if of_heads[0] is None else np.concatenate(of_heads)

    def of_ablations(self, ablations: Sequence[Ablation]) -> np.ndarray:
        """Return the sum of what an ablation's components contribute, [P, Q, A]."""
        heads = self._heads

        def one(component: Component) -> np.ndarray:
            if component.head == WHOLE or self.of_heads is None:
                return self.contributions[..., component.index]
            return self.of_heads[..., component.unit(heads)]

        return np.stack([np.sum([one(part) for part in each.components], axis=0) for each in ablations], axis=-1)

    def each(self, of: Callable[[Rows, Reading], Any]) -> Any:
        """Return what `of` makes of each part's rows and reading, on this host, along one axis of prompts."""
        return _joined([of(one.rows, reading) for one, reading in zip(self._parts, self._readings, strict=True)])


def _joined(parts: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *jax.device_get(list(parts)))


def programs_of(plan: Plan, ablations: Sequence[Ablation]) -> list[Program]:
    """Return the programs of ablations, for each those of `AblationConfig.variants`, one after another."""
    c, frozen = plan.model.config, plan.ablation.frozen_names
    made = {
        "": lambda clamp: program(c, clamp, frozen),
        EDGES: lambda clamp: program(c, clamp, rest=Word.PROBE),
        FREE: lambda clamp: program(c, clamp),
    }
    return [made[variant](ablation.components) for ablation in ablations for variant in plan.ablation.variants]


def ablate(plan: Plan, part: slice, size: int, sources: Sources, progress: Progress) -> dict[str, np.ndarray]:
    """Make all of a plan's ablations in some of its prompts, and return the variables of a result store.

    Args:
      plan: the sweep.
      part: which of its prompts.
      size: how many they are filled up to, so that all walks of a sweep share their compilations.
      sources: of replacements.
      progress: told of how many more interventions are done.

    Raises:
      UserError: if the identity of `core.effects` fails in a prompt.
    """
    count, every = part.stop - part.start, plan.ablations
    longest = padded_length(len(plan.items[part.stop - 1].tokens), plan.model.config.context)
    at_once = plan.sizer.programs(longest, size) // plan.sizer.asked.least
    order = sorted(range(len(every)), key=lambda index: every[index].components[0].index)  # as walks begin them

    def ablated(some: slice) -> dict[str, np.ndarray]:
        chosen = [every[index] for index in order[some]]
        interventions = count * len(chosen) * plan.ablation.draws
        return _ablate(plan, part, size, chosen, sources, lambda done: progress(done * interventions))

    found = [ablated(some) for some in evenly(len(every), at_once)]
    back = np.argsort(order)
    of_ablated = {name for name in found[0] if "ablated" in variables.VARIABLES[name].dims}
    return {
        name: np.concatenate([one[name] for one in found], axis=1)[:, back] if name in of_ablated else values
        for name, values in found[0].items()
    }


def _ablate(
    plan: Plan, part: slice, size: int, ablations: Sequence[Ablation], sources: Sources, progress: Progress
) -> dict[str, np.ndarray]:
    """Make some ablations by one walk; see `ablate`. All that is done of it is 1."""
    variants, count = plan.ablation.variants, part.stop - part.start
    prompts = np.array(fill_up(range(part.start, part.stop), size))
    programs = together(programs_of(plan, ablations))
    by_head = HEADS in plan.options
    walked = Walked(plan, prompts, programs, sources, progress, responding_heads=by_head)
    summarise = device_program(meshes.mesh_of(plan.model.params), summarise_effects, (), variants=variants)

    def summary(rows: Rows, reading: Reading) -> Any:
        metrics = rows.metrics(reading, walked.logits_at_once, len(variants)) if _asked_metrics(plan) else None
        heads = rows.head_changes(reading, len(variants)) if by_head else None
        return summarise(rows.effects(reading), metrics, heads)

    found: Any = jax.tree.map(lambda array: array[:count], walked.each(summary))
    _check_identity(plan, part, ablations, found.residual)
    reading: Any = walked.reading
    clean: dict[str, Any] = {
        "clean_logit": reading.centred_logit[:, 0],
        "clean_probability": reading.probability[:, 0],
        "final_scale": reading.final_scale[:, 0],
        "delta_unembed": walked.contributions[:, 0],
        "ablated_delta_unembed": walked.of_ablations(ablations)[:, 0],
    }
    made = found.variables(plan.options)
    return {name: values[:count] for name, values in (clean | made).items()}


def _asked_metrics(plan: Plan) -> list[str]:
    return [name for name in variables.METRICS if name in plan.options]


def ablate_each(plan: Plan, ablations: Sequence[tuple[int, Ablation]]) -> list[xr.Dataset]:
    """Make single ablations in single prompts, by one walk.

    Args:
      plan: the sweep.
      ablations: each the index of a prompt, and what is ablated in it.

    Returns:
      Everything about each, a dataset of (replacement, component).
    """
    every = sorted({ablation for _, ablation in ablations}, key=lambda one: one.components[0].index)
    indices = list(dict.fromkeys(index for index, _ in ablations))
    prompts = np.array(fill_up(indices, plan.sizer.fill_up(len(indices))))
    by_head, variants = HEADS in plan.options, len(plan.ablation.variants)
    programs = together(programs_of(plan, every))
    walked = Walked(plan, prompts, programs, Sources(plan, False), lambda done: None, responding_heads=by_head)
    effects: Effects = walked.each(Rows.effects)
    more: dict[str, tuple[tuple[str, ...], Any]] = {}
    if names := _asked_metrics(plan):
        metrics = walked.each(lambda rows, reading: rows.metrics(reading, walked.logits_at_once, variants))
        kept = [variables.METRICS[name][0] for name in names]
        more |= {name: (("replacement",), getattr(metrics, name)[:, :, 0].astype(np.float32)) for name in kept}
    if by_head:
        heads = walked.each(lambda rows, reading: rows.head_changes(reading, variants))
        more["head_compensation"] = ("replacement", "attn_layer", "head"), heads[:, :, 0]
    if FREE in plan.options:
        more["free_total_effect"] = ("replacement",), effects.total_effect[:, variants - 1 :: variants, 0]
    return [
        _everything(plan, walked, effects, more, indices.index(index), index, every.index(ablation), ablation)
        for index, ablation in ablations
    ]


def _everything(
    plan: Plan,
    walked: Walked,
    every: Effects,
    more: dict[str, tuple[tuple[str, ...], Any]],
    place: int,
    index: int,
    unit: int,
    ablation: Ablation,
) -> xr.Dataset:
    """Return one ablation's dataset: that of the prompt at `place` in the walk, `index` in the plan."""
    effects: Effects = jax.tree.map(lambda array: array[place, unit * len(plan.ablation.variants), 0], every)
    reading: Reading = jax.tree.map(lambda array: array[place, 0], walked.reading)
    contributions = walked.contributions[place, 0]
    compensation = effects.compensation.reshape(len(effects.compensation), -1)
    # What is ablated is not among the compensations: its own change is its direct effect, alone or with the others'.
    ablated = contributions + compensation
    ablated[:, [one.index for one in ablation.components]] = np.nan
    single = ablation.single
    if single is not None:
        ablated[:, single.index] = contributions[single.index] + compensation[:, single.index] - effects.direct_effect
    prompt = plan.items[index].prompt
    target, foil = plan.tokens[index].tolist()
    labels = {name: values.item() for name, (_, values) in variables.ablated_labels([ablation]).items()}
    return xr.Dataset(
        {
            "delta_unembed": ("component", contributions, {"long_name": "contribution, clean run"}),
            "ablated_unembed": (("replacement", "component"), ablated, {"long_name": "contribution, ablated run"}),
            "compensation": (("replacement", "component"), compensation),
            **{name: ("replacement", getattr(effects, name)) for name in variables.EFFECTS},
            **{name: (dims, values[place, unit]) for name, (dims, values) in more.items()},
        },
        variables.labels("component", all_components(plan.model.config.layers)),
        {
            "prompt_id": prompt.id,
            "text": prompt.text,
            "target_text": plan.model.tokenizer.decode([target]),
            "foil_text": "" if foil == NONE else plan.model.tokenizer.decode([foil]),
            "clean_logit": float(reading.centred_logit),
            "clean_probability": float(reading.probability),
            **labels,
            "kind": str(plan.ablation.kind),
            "units": variables.LOGITS,
        },
    )


def _check_identity(plan: Plan, part: slice, ablations: Sequence[Ablation], residual: np.ndarray) -> None:
    """Refuse results of which the identity does not hold; `residual` is [P, A]."""
    wrong = np.argwhere(residual > plan.tolerance)
    if wrong.size:
        prompt, unit = wrong[0]
        raise UserError(
            f"prompt {plan.items[part.start + prompt].prompt.name}, {ablations[unit]}: total effect is not direct"
            f" effect less compensation, by {residual[prompt, unit]:.2g} logits (more than {plan.tolerance:g}); the"
            " activations lose precision: use float32 and precision=highest, or raise identity_tolerance"
        )
