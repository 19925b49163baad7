"""What the README shows: a sweep in memory, and one ablation of one prompt."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xarray as xr

from hydra_jax import prompts as prompt_sets
from hydra_jax import store
from hydra_jax.ablations import ablate_one, fill, frame
from hydra_jax.config import HEADS, AblationConfig, PromptsConfig, SweepConfig
from hydra_jax.edits import ATTN, SITES, Component
from hydra_jax.errors import UserError
from hydra_jax.models.load import Model
from hydra_jax.plan import Plan, choose, clean_rows, evenly, facts_beside, itemise, prompts_at_once
from hydra_jax.prompts import Prompt
from hydra_jax.run import protocol


def sweep(
    model: Model,
    prompts: Iterable[str | Prompt] | None = None,
    *,
    kind: str = "resample",
    replacements: int = 15,
    sites: str = "attn,mlp",
    layers: str = "all",
    edges: bool = True,
    correct_only: bool = False,
    limit: int = 0,
    seed: int = 0,
    rows: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Ablate every chosen component in every prompt, in memory.

    Args:
      model: from `load`.
      prompts: texts or `Prompt`s; None for the built-in facts.
      kind: "resample", "mean", "zero" or "noise".
      replacements: R, drawn for each ablation where the kind is random.
      sites: "attn", "mlp", "attn,mlp", or "heads" for each attention head by itself.
      layers: "all", or e.g. "0,5,10-14".
      edges: also compute direct edges, at about the cost of the rest.
      correct_only: keep only prompts whose answer the model gives.
      limit: of prompts; 0 for none.
      seed: of every draw.
      rows: edits replayed at once; 0 for the device's default.
      progress: whether to show bars.

    Returns:
      The dataset that `python -m launch.sweep` stores: effects over (prompt, ablated, replacement).

    Raises:
      UserError: if an argument is out of range or a prompt cannot be swept.
    """
    config = SweepConfig(
        model=model.name,
        dtype=model.config.dtype,
        precision=model.config.precision,
        prompts=PromptsConfig(correct_only=correct_only, limit=limit),
        ablation=AblationConfig(kind=kind, replacements=replacements, sites=sites, layers=layers, edges=edges),
        seed=seed,
        rows=rows,
    )
    chosen = prompt_sets.builtin() if prompts is None else prompt_sets.as_prompts(prompts)
    batch = prompts_at_once(rows, config.ablation.draws)
    kept, _ = choose(model, itemise(model, chosen), config.prompts, seed, batch, config.ablation.by_head, progress)
    plan = Plan(model, kept, kept, config.ablation, seed, evenly(len(kept), batch), config.identity_tolerance)
    dataset = frame(plan).copy(deep=True)
    dataset.attrs = store.protocol_attributes(protocol(config, model, chosen))

    def write(chunk: slice, arrays: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            dataset[name][chunk] = array
        dataset["finished"][chunk] = True

    fill(plan, dataset["finished"].values.copy(), write, progress)
    return dataset


def ablate(
    model: Model,
    prompt: str,
    site: str,
    layer: int,
    head: int | None = None,
    *,
    kind: str = "resample",
    replacements: int = 15,
    sources: Iterable[str] | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Ablate one component in one prompt.

    Args:
      model: from `load`.
      prompt: the text; its last token is where the ablation takes place.
      site: "attn" or "mlp".
      layer: which.
      head: of attention, to ablate its share alone; None for all of the write.
      kind: "resample", "mean", "zero" or "noise".
      replacements: R, where the kind is random.
      sources: other prompts, for replacements, means and deviations; None draws 64 of the built-in ones.
      seed: of every draw.

    Returns:
      A dataset of (replacement, component): `compensation` and the contributions `delta_unembed`
      (clean) and `ablated_unembed`, labelled by `layer` and `site`, and the effects over (replacement).

    Raises:
      UserError: if an argument is out of range.
    """
    component = _component(model, site, layer, head)
    ablation = AblationConfig(kind=kind, replacements=replacements, sites=site if head is None else HEADS, edges=False)
    SweepConfig(ablation=ablation, seed=seed)  # checks both
    if kind == "zero":
        others: list[str] = []
    elif sources is None:
        others = [fact.text for fact in facts_beside(prompt, replacements, seed)]
    else:
        others = [text for text in dict.fromkeys(sources) if text != prompt]
    items = itemise(model, prompt_sets.as_prompts([prompt, *others]))
    batch = prompts_at_once(0, ablation.draws)
    rows = clean_rows(model, items, batch, ablation.by_head, progress=False)
    tolerance = SweepConfig().identity_tolerance
    plan = Plan(model, rows, rows, ablation, seed, evenly(len(rows), batch), tolerance)
    return ablate_one(plan, plan.ids.index(prompt), component)


def _component(model: Model, site: str, layer: int, head: int | None) -> Component:
    c = model.config
    if site not in SITES or not 0 <= layer < c.layers:
        raise UserError(
            f"{site} {layer}: is not a component of {model.name}; sites are {', '.join(SITES)}, layers 0-{c.layers - 1}"
        )
    if head is None:
        return Component(layer, SITES.index(site))
    if site != SITES[ATTN] or not 0 <= head < c.heads:
        raise UserError(f"{site} {layer} head {head}: is not a head of {model.name}; attention has 0-{c.heads - 1}")
    return Component(layer, ATTN, head)
