"""Sweeps in memory or into a directory, one ablation of one prompt, pairs of ablations, and cascades of cuts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from hydra_jax.analysis import cascades
from hydra_jax.analysis import interactions as analysis
from hydra_jax.api.arguments import (
    Names,
    Token,
    ablation_settings,
    as_setting,
    component,
    components_setting,
    distinct,
    one,
    several,
    with_sources,
)
from hydra_jax.config import ALL, AUTO, LAST, LAYERS, sweep_config
from hydra_jax.core.edits import WHOLE, Component, Kind
from hydra_jax.core.programs import known
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.batching import evenly
from hydra_jax.engine.cluster import Cluster
from hydra_jax.engine.memory import BatchSizer, left
from hydra_jax.errors import UserError, shown, speaks_of_arguments
from hydra_jax.store import effects as store
from hydra_jax.sweep.ablations import ablate_each
from hydra_jax.sweep.bank import Bank
from hydra_jax.sweep.chunks import fill, in_memory
from hydra_jax.sweep.clean import CleanPass
from hydra_jax.sweep.inputs import Inputs
from hydra_jax.sweep.items import Positions, facts_beside, itemise
from hydra_jax.sweep.plan import asked
from hydra_jax.sweep.protocol import Given, protocol
from hydra_jax.sweep.run import run
from hydra_jax.text.padding import padded_length
from hydra_jax.weights.model import Model


@speaks_of_arguments
def sweep(
    model: Model,
    prompts: Any = None,
    *,
    components: Names = None,
    freeze: Names = None,
    kind: str = "resample",
    replacements: int = 15,
    target: Token = AUTO,
    foil: Token = AUTO,
    sources: Any = None,
    paired: bool | Sequence[str] = False,
    match: str = "",
    metrics: str | Sequence[str] = (),
    positions: Positions = LAST,
    responders: str = LAYERS,
    interactions: bool = False,
    cascade: int = 0,
    sites: str = "attn,mlp",
    layers: str = ALL,
    edges: bool = True,
    correct_only: bool = False,
    limit: int = 0,
    seed: int = 0,
    rows: int = 0,
    workdir: str | Path | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Make every ablation that is asked for in every prompt.

    Args:
      model: from `load`.
      prompts: texts, `Prompt`s, records, token ids, a DataFrame with a column `prompt`, a path to a file: whatever
        `read_prompts` reads and more; None for the built-in facts.
      components: what is ablated, each by its name: "attn 23", "mlp 29", for a head "attn 23.4", for both writes of a
        layer "layer 5"; negative layers count from the end, and a list in the list is ablated together. None for all
        that `sites` and `layers` say.
      freeze: components that write what they write in the clean run, so that they cannot repair; "norm" for the final
        norm's divisor. `free_total_effect` then says what the total effect is where nothing is held.
      kind: "resample", "mean", "zero" or "noise": what takes a write's place.
      replacements: R, drawn for each ablation where the kind is random.
      target: the token whose logit is read: "top", the clean run's most likely next one; "answer", the prompt's own
        answer; a token by its text (" Paris") or id; or a list with one for each prompt. "auto" is the answer of
        prompts that have a foil, else "top".
      foil: a token whose logit is subtracted, given as a target is: what is read is then the logit difference. "" for
        none, "auto" for the foil of prompts that have one.
      sources: other prompts that replacements, means and deviations come from; None for the prompts themselves. With
        fewer than `replacements`, each is used once.
      paired: True for each prompt's own counterfactual, its `source`, as its one replacement; or a list of texts, one
        for each prompt.
      match: "relation" or "length", to draw only from prompts alike.
      metrics: any of "log_probability", "kl", "rank", "top_changed", of the next token's whole distribution.
      positions: the tokens after which prompts are read and ablated: "last", "all", a list of places from 0 (negative
        ones from the end), a substring whose last token is meant, or a list for each prompt.
      responders: "layers", or "heads" to record what each attention head changes, too.
      interactions: also every pair of what is ablated, together.
      cascade: the number of cuts, one after another, the strongest attention first, as `cascade` does.
      sites: "attn", "mlp", "attn,mlp", or "heads" for each attention head by itself.
      layers: "all", or e.g. "0,5,10-14".
      edges: also compute direct edges, at about the cost of the rest.
      correct_only: keep only prompts whose answer the model gives.
      limit: the most prompts to sweep; 0 for all.
      seed: of every draw.
      rows: rows of a block, moved at once; 0 for the device's default.
      workdir: a directory to sweep into, as `python -m launch.sweep` does, resumable; None for memory alone.
      progress: whether to show bars.

    Returns:
      The dataset that `python -m launch.sweep` stores: effects over (prompt, ablated, replacement), prompts in the
      order in which they are given.

    Raises:
      UserError: if an argument is out of range or a prompt cannot be swept.
    """
    positions = LAST if positions is None else positions
    config = sweep_config(
        {
            "model": model.name,
            "dtype": model.config.dtype,
            "precision": model.config.precision,
            "prompts": {"correct_only": correct_only, "limit": limit},
            "ablation": ablation_settings(
                *(kind, replacements, freeze, paired, match),
                sites=sites,
                layers=layers,
                edges=edges,
                components=components_setting(components),
                interactions=interactions,
                cascade=cascade,
            ),
            "readout": {"metrics": as_setting("metrics", metrics), "responders": responders},
            "seed": seed,
            "rows": rows,
            "memory": model.memory,
        }
    )
    chosen, source = several(prompts)
    given = Given(
        model=model,
        prompts=with_sources(chosen, paired),
        sources=None if sources is None else distinct(sources),
        target=target,
        foil=foil,
        positions=positions,
        source=source,
    )
    if workdir is not None:
        run(config, Path(workdir), progress, given)
        order = [item.prompt.id for item in itemise(model, given.prompts, positions)]
        return _in_order(store.open_effects(workdir).load(), order)
    inputs = Inputs.of(config, model, given.prompts, given)
    return _swept(inputs, given, progress)


def _swept(
    inputs: Inputs, given: Given, progress: bool, start: Component | None = None, cuts_alone: bool = False
) -> xr.Dataset:
    """Sweep in memory; of `cuts_alone` no ablations but cascades', from `start` where it is given."""
    clean = _clean_pass(inputs, progress)
    kept, _ = inputs.choose(clean)
    plan = dataclasses.replace(inputs.plan(clean, kept), start=start)
    if cuts_alone:
        plan = dataclasses.replace(plan, ablations=[])
    dataset = in_memory(plan)
    dataset.attrs = store.protocol_attributes(protocol(inputs.config, given.model, given.prompts, given))

    def write(chunk: slice, arrays: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            dataset[name][chunk] = array
        dataset["finished"][chunk] = True

    longest = padded_length(len(kept[-1].tokens), given.model.config.context)
    fill(plan, evenly(len(kept), clean.sizer.chunk(longest)), write, progress)
    return _in_order(dataset, [item.prompt.id for item in inputs.items])


def _clean_pass(inputs: Inputs, progress: bool = False) -> CleanPass:
    """Return a clean pass in memory, by this process alone, on the devices that the model is on."""
    model, mesh, streamed = inputs.model, meshes.mesh_of(inputs.model.params), inputs.model.layers.streamed
    wanted = asked(inputs.config, model.config, streamed)
    sizer = BatchSizer(model.config, mesh, wanted, left(model.memory, model.config, mesh, streamed))
    return inputs.clean_pass(sizer, Bank(model.config.dtype), Cluster(0, 1), progress)


def _in_order(dataset: xr.Dataset, ids: Sequence[str]) -> xr.Dataset:
    """Return a sweep with its prompts in the order of `ids`, of which it may not have all."""
    place = {name: number for number, name in enumerate(dataset["prompt_id"].values)}
    order = np.array([place[name] for name in ids if name in place], int)
    ordered = dataset.isel(prompt=order)
    back = np.append(np.argsort(order), -1)  # so that -1 stays -1
    return ordered.assign(source=ordered["source"].copy(data=back[ordered["source"].values]))


@speaks_of_arguments
def ablate(
    model: Model,
    prompt: Any,
    site: Names = None,
    layer: int | None = None,
    head: int | None = None,
    *,
    components: Names = None,
    freeze: Names = None,
    kind: str = "resample",
    replacements: int = 15,
    target: Token = AUTO,
    foil: Token = AUTO,
    sources: Any = None,
    paired: bool | str | Sequence[str] = False,
    match: str = "",
    metrics: str | Sequence[str] = (),
    positions: Positions = LAST,
    responders: str = LAYERS,
    seed: int = 0,
) -> xr.Dataset:
    """Ablate one component, or several together, in one prompt.

    Args:
      model: from `load`.
      prompt: the text, or whatever else `sweep` takes for one prompt.
      site: the component, as in "attn 23", "mlp 29", for one head "attn 23.4", or "layer 5" for both writes; a list of
        them, which are ablated together; or "attn" or "mlp" alone, with `layer` and `head` beside it.
      layer: its layer, where `site` does not say it.
      head: one head of attention, to ablate its share alone; None for all of the write.
      components: another name for `site`.
      freeze: as of `sweep`, and so are all that follow; `sources` None draws 64 of the built-in facts.
      kind: "resample", "mean", "zero" or "noise".
      replacements: R, where the kind is random.
      target: the token whose logit is read.
      foil: a token whose logit is subtracted.
      sources: other prompts that replacements, means and deviations come from.
      paired: the counterfactual text that is its one replacement, or True for the prompt's own.
      match: "relation" or "length", to draw only from prompts alike.
      metrics: readings of the next token's whole distribution.
      positions: one token after which the prompt is read and ablated.
      responders: "layers", or "heads" to record what each attention head changes, too.
      seed: of every draw.

    Returns:
      A dataset of (replacement, component): `compensation` and the contributions `delta_unembed`
      (clean) and `ablated_unembed`, labelled by `layer` and `site`, and the effects over (replacement). Of several
      that are ablated together, `ablated_unembed` is NaN: only the sum of what they lose is known, `direct_effect`.

    Raises:
      UserError: if an argument is out of range.
    """
    if (site is None) == (components is None):
        raise UserError("components: say what is ablated; give a name, as in 'attn 23', or a list of names")
    if site is None and (layer is not None or head is not None):
        raise UserError("components: say the layer and the head themselves; give layer and head beside site='attn'")
    name = component(model, site, layer, head) if site is not None else components
    together = name if name is None or isinstance(name, str | Component) else [list(name)]
    config = sweep_config(
        {
            "ablation": ablation_settings(
                *(kind, replacements, freeze, paired, match), edges=False, components=components_setting(together)
            ),
            "readout": {"metrics": as_setting("metrics", metrics), "responders": responders},
            "seed": seed,
        }
    )
    chosen = with_sources(one(prompt), [paired] if isinstance(paired, str) else paired)
    others: Any = None
    if config.ablation.kind.needs_statistics or (config.ablation.kind.needs_sources and not config.ablation.paired):
        others = facts_beside(chosen[0].text, replacements, seed) if sources is None else distinct(sources)
    given = Given(model, chosen, others, target, foil, positions)
    inputs = Inputs.of(config, model, chosen, given)
    if len(inputs.items) > 1:
        raise UserError(f"positions: are {len(inputs.items)} of the prompt; give one, or sweep it")
    plan = inputs.plan(_clean_pass(inputs), inputs.items)
    if len(plan.ablations) > 1:
        raise UserError(f"components: are {len(plan.ablations)} ablations; give one, or sweep them")
    return ablate_each(plan, [(0, plan.ablations[0])])[0]


@speaks_of_arguments
def interactions(model: Model, prompts: Any, components: Sequence[Any], **words: Any) -> xr.Dataset:
    """Ablate every pair of components together, and each by itself: which are more than their sum.

    Args:
      model: from `load`.
      prompts: as of `sweep`.
      components: two or more, as of `sweep`.
      **words: any others of `sweep`.

    Returns:
      A dataset over (prompt, first, second, replacement), by the components' names: `interaction`, the joint effect
      less both single ones; `joint_effect`, `single_effect`; `effect_after`, what the second's ablation costs once the
      first is gone; and `woken`, what the second contributes more when only the first is ablated.

    Raises:
      UserError: as `sweep`, and if there are fewer than two components, or two of them overlap.
    """
    if not isinstance(components, Sequence) or isinstance(components, str) or len(components) < 2:
        raise UserError("components: are fewer than two; give a list of those to pair")
    return analysis.interactions(
        sweep(model, prompts, components=components, interactions=True, **{"edges": False, **words})
    )


@speaks_of_arguments
def cascade(
    model: Model,
    prompts: Any,
    start: str | Component | None = None,
    steps: int = 8,
    *,
    freeze: Names = None,
    kind: str = "resample",
    replacements: int = 15,
    target: Token = AUTO,
    foil: Token = AUTO,
    sources: Any = None,
    paired: bool | Sequence[str] = False,
    match: str = "",
    positions: Positions = LAST,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Cut the strongest attention, then what repaired it most, and so on, in each prompt for itself.

    Args:
      model: from `load`.
      prompts: as of `sweep`; where they are too few to draw from, built-in facts are.
      start: the first cut in every prompt, as in "attn 23"; None for the attention that contributes most.
      steps: the most cuts.
      freeze: as of `sweep`, and so are all that follow.
      kind: "resample", "mean", "zero" or "noise".
      replacements: R, where the kind is random.
      target: the token whose logit is read.
      foil: a token whose logit is subtracted.
      sources: other prompts that replacements, means and deviations come from.
      paired: each prompt's own counterfactual is its one replacement.
      match: "relation" or "length", to draw only from prompts alike.
      positions: the tokens after which prompts are read.
      seed: of every draw.
      progress: whether to show bars.

    Returns:
      A dataset over (prompt, cut): `cut_name`, the component of each cut, "" where nothing repaired any more; and what
      is left after it: `cut_logit`, `cut_probability` and `cut_rank` of the target over (prompt, cut, replacement), and
      `cut_compensation`, what each component contributes more than in the clean run. `survived` (prompt) is the number
      of cuts in a row after which the target is still the most likely token, in more than half of the replacements.

    Raises:
      UserError: as `sweep`.
    """
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"steps: is {shown(steps)}; give 1 or more")
    if not isinstance(start, str | Component | None):
        raise UserError(f"start: is {shown(start)}; give one component, as in 'attn 23'")
    config = sweep_config(
        {
            "model": model.name,
            "ablation": ablation_settings(*(kind, replacements, freeze, paired, match), edges=False, cascade=steps),
            "prompts": {"correct_only": False},
            "seed": seed,
        }
    )
    first = None if start is None else known(model.config, start)
    if first is not None and first.head != WHOLE:
        raise UserError(f"start: {first} is a head; give attention or an MLP, as in 'attn {first.layer}'")
    if first is not None and any(map(first.overlaps, config.ablation.frozen(model.config))):
        raise UserError(f"start: {first} is both cut and frozen; leave it out of freeze")
    chosen, source = several(prompts)
    others: Any = None
    if sources is not None:
        others = distinct(sources)
    elif config.ablation.kind is not Kind.ZERO and not config.ablation.paired and len(chosen) <= replacements:
        others = facts_beside(chosen[0].text, replacements, seed)
    given = Given(model, with_sources(chosen, paired), others, target, foil, positions, source)
    inputs = Inputs.of(config, model, given.prompts, given)
    return cascades.labelled(_swept(inputs, given, progress, first, cuts_alone=True))
