"""Every component's ablations in a few prompts, by one walk: as a result store has them, or in full for one prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import xarray as xr

from hydra_jax.core.edits import SITES, Component, all_components
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
from hydra_jax.sweep.plan import Plan, batch_of
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
    ) -> None:
        """Begin; for arguments see `Walked`."""
        items = [plan.items[index] for index in prompts]
        tokens, _ = batch_of(items, len(prompts), plan.model.config.context)
        self._contrasts, self._by_head = contrasts, bool(programs.by_heads.any())
        self.texts = Texts(plan.model.params, tokens, places, plan.sizer.sizes(tokens.shape[1]))
        draws, at_once = plan.ablation.draws, plan.sizer.asked.at_once
        self.rows = Rows(self.texts, programs, draws, contrasts, at_once, responding_heads)
        self._values = Draws(
            *(self.texts.mesh, self.rows.layout, plan.ablation.kind, self.texts.put(plan.keys[prompts])),
            lambda component: sources(prompts, component),
            plan.statistics_of,
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
    ) -> None:
        """Walk.

        Args:
          plan: the sweep.
          prompts: indices of P of its prompts.
          programs: G of them, in order of their first clamps, whose clamps are the plan's components.
          sources: of replacements.
          progress: told of how much more is done, all of it 1.
          places: [P, Q], the tokens after which they are read; None for the last ones.
          contrasts: [P, Q, K], what is read; None for the plan's targets.
          responding_heads: whether is recorded what each head changes.
        """
        model, c = plan.model, plan.model.config
        if places is None:
            places = np.array([[len(plan.items[index].tokens) - 1] for index in prompts], np.int32)
        if contrasts is None:
            contrasts = Contrast.target(plan.targets[prompts].astype(np.int32)[:, None])

        def part(some: np.ndarray) -> Part:
            asked = jax.tree.map(lambda leaf: leaf[some], contrasts)
            return Part(plan, prompts[some], programs, sources, places[some], asked, responding_heads)

        # Of one size, whatever the number of prompts: what is computed at once does not hang on memory.
        slices = np.split(np.arange(len(prompts)), plan.sizer.parts(len(prompts)))
        self._parts = [part(some) for some in slices]
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

    def each(self, of: Callable[[Rows, Reading], Any]) -> Any:
        """Return what `of` makes of each part's rows and reading, on this host, along one axis of prompts."""
        return _joined([of(one.rows, reading) for one, reading in zip(self._parts, self._readings, strict=True)])


def _joined(parts: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *jax.device_get(list(parts)))


def ablate(plan: Plan, part: slice, size: int, sources: Sources, progress: Progress) -> dict[str, np.ndarray]:
    """Ablate all of a plan's components in some of its prompts, and return the variables of a result store.

    Args:
      plan: the sweep.
      part: which of its prompts.
      size: how many they are filled up to, so that all walks of a sweep share their compilations.
      sources: of replacements.
      progress: told of how many more interventions are done.

    Raises:
      UserError: if the identity of `core.effects` fails in a prompt.
    """
    count, every = part.stop - part.start, plan.components
    longest = padded_length(len(plan.items[part.stop - 1].tokens), plan.model.config.context)
    at_once = plan.sizer.programs(longest, size) // plan.sizer.asked.least

    def ablated(components: Sequence[Component]) -> dict[str, np.ndarray]:
        interventions = count * len(components) * plan.ablation.draws
        return _ablate(plan, part, size, components, sources, lambda done: progress(done * interventions))

    found = [ablated(every[some]) for some in evenly(len(every), at_once)]
    of_ablated = {name for name in found[0] if "ablated" in variables.VARIABLES[name].dims}
    return {
        name: np.concatenate([one[name] for one in found], axis=1) if name in of_ablated else values
        for name, values in found[0].items()
    }


def _ablate(
    plan: Plan, part: slice, size: int, components: Sequence[Component], sources: Sources, progress: Progress
) -> dict[str, np.ndarray]:
    """Ablate some components by one walk; see `ablate`. All that is done of it is 1."""
    c, edges, count = plan.model.config, plan.ablation.edges, part.stop - part.start
    prompts = np.array(fill_up(range(part.start, part.stop), size))
    rests = (Word.FOLLOW, Word.PROBE) if edges else (Word.FOLLOW,)
    programs = together([program(c, clamp=[one], rest=rest) for one in components for rest in rests])
    walked = Walked(plan, prompts, programs, sources, progress)
    summarise = device_program(meshes.mesh_of(plan.model.params), summarise_effects, (), edges=edges)
    every = walked.each(lambda rows, reading: summarise(rows.effects(reading)))
    summary: Any = jax.tree.map(lambda array: array[:count], every)
    _check_identity(plan, part, components, summary.residual)
    reading: Any = walked.reading
    own = walked.contributions if walked.of_heads is None else walked.of_heads
    clean: dict[str, Any] = {
        "clean_logit": reading.centred_logit[:, 0],
        "clean_probability": reading.probability[:, 0],
        "final_scale": reading.final_scale[:, 0],
        "delta_unembed": walked.contributions[:, 0],
        "ablated_delta_unembed": own[:, 0, [component.unit(c.heads) for component in components]],
    }
    made = {name: getattr(summary, name) for name in variables.VARIABLES if hasattr(summary, name)}
    return {name: values[:count] for name, values in (clean | made).items() if values is not None}


def ablate_each(plan: Plan, ablations: Sequence[tuple[int, Component]]) -> list[xr.Dataset]:
    """Make single ablations in single prompts, by one walk.

    Args:
      plan: the sweep.
      ablations: each the index of a prompt, and the component that is ablated in it.

    Returns:
      Everything about each, a dataset of (replacement, component).
    """
    components = sorted({component for _, component in ablations})
    indices = list(dict.fromkeys(index for index, _ in ablations))
    prompts = np.array(fill_up(indices, plan.sizer.fill_up(len(indices))))
    sources = Sources(plan, resident=False)
    programs = together([program(plan.model.config, clamp=[component]) for component in components])
    walked = Walked(plan, prompts, programs, sources, lambda done: None)
    effects: Effects = walked.each(Rows.effects)
    return [
        _everything(plan, walked, effects, indices.index(index), index, component, components.index(component))
        for index, component in ablations
    ]


def _everything(
    plan: Plan, walked: Walked, every: Effects, place: int, index: int, component: Component, unit: int
) -> xr.Dataset:
    """Return one ablation's dataset: that of the prompt at `place` in the walk, `index` in the plan."""
    effects: Effects = jax.tree.map(lambda array: array[place, unit, 0], every)
    reading: Reading = jax.tree.map(lambda array: array[place, 0], walked.reading)
    contributions = walked.contributions[place, 0]
    compensation = effects.compensation.reshape(len(effects.compensation), -1)
    # The ablated component's own change is its direct effect: it is not among the compensations.
    ablated = contributions + compensation
    ablated[:, component.index] -= effects.direct_effect
    prompt = plan.items[index].prompt
    return xr.Dataset(
        {
            "delta_unembed": ("component", contributions, {"long_name": "contribution, clean run"}),
            "ablated_unembed": (("replacement", "component"), ablated, {"long_name": "contribution, ablated run"}),
            "compensation": (("replacement", "component"), compensation),
            **{name: ("replacement", getattr(effects, name)) for name in variables.EFFECTS},
        },
        variables.labels("component", all_components(plan.model.config.layers)),
        {
            "prompt_id": prompt.id,
            "text": prompt.text,
            "target_text": plan.model.tokenizer.decode([int(plan.targets[index])]),
            "clean_logit": float(reading.centred_logit),
            "clean_probability": float(reading.probability),
            "ablated_layer": component.layer,
            "ablated_site": SITES[component.site],
            "ablated_head": component.head,
            "kind": str(plan.ablation.kind),
            "units": variables.LOGITS,
        },
    )


def _check_identity(plan: Plan, part: slice, components: Sequence[Component], residual: np.ndarray) -> None:
    """Refuse results of which the identity does not hold; `residual` is [P, A]."""
    wrong = np.argwhere(residual > plan.tolerance)
    if wrong.size:
        prompt, unit = wrong[0]
        raise UserError(
            f"prompt {plan.items[part.start + prompt].prompt.name}, {components[unit]}: total effect is not direct"
            f" effect less compensation, by {residual[prompt, unit]:.2g} logits (more than {plan.tolerance:g}); the"
            " activations lose precision: use float32 and precision=highest, or raise identity_tolerance"
        )
