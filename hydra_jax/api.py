"""What the README shows: a sweep in memory, and one ablation of one prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import xarray as xr

from hydra_jax.config import HEADS, AblationConfig, PromptsConfig, SweepConfig
from hydra_jax.core.edits import ATTN, SITES, Component
from hydra_jax.engine import mesh as meshes
from hydra_jax.engine.batching import evenly
from hydra_jax.engine.cluster import Cluster
from hydra_jax.engine.memory import BatchSizer, free_bytes
from hydra_jax.errors import UserError
from hydra_jax.store import effects as store
from hydra_jax.sweep.bank import Bank
from hydra_jax.sweep.chunks import ablate_one, fill, frame
from hydra_jax.sweep.clean import CleanPass, choose
from hydra_jax.sweep.plan import Item, Plan, facts_beside, itemise
from hydra_jax.sweep.run import protocol
from hydra_jax.text import prompts as prompt_sets
from hydra_jax.text.prompts import Prompt
from hydra_jax.weights.load import Model


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
    clean = _clean_pass(model, config.ablation, rows, progress)
    kept, _ = choose(clean, itemise(model, chosen), config.prompts, seed)
    plan = _plan(clean, kept, kept, config)
    dataset = store.in_memory(frame(plan), edges)
    dataset.attrs = store.protocol_attributes(protocol(config, model, chosen))

    def write(chunk: slice, arrays: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            dataset[name][chunk] = array
        dataset["finished"][chunk] = True

    fill(plan, evenly(len(kept), clean.sizer.wanted), write, progress)
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
    config = SweepConfig(ablation=ablation, seed=seed)
    if kind == "zero":
        others: list[str] = []
    elif sources is None:
        others = [fact.text for fact in facts_beside(prompt, replacements, seed)]
    else:
        others = [text for text in dict.fromkeys(sources) if text != prompt]
    items = itemise(model, prompt_sets.as_prompts([prompt, *others]))
    clean = _clean_pass(model, ablation)
    with clean.bar(len(items)) as bar:
        clean.run(items, bar)
    return ablate_one(_plan(clean, items[:1], items, config), 0, component)


def _clean_pass(model: Model, ablation: AblationConfig, rows: int = 0, progress: bool = False) -> CleanPass:
    """One in memory, by this process alone, on the devices that the model is on."""
    mesh = meshes.of(model.params)
    sizer = BatchSizer(model.config, mesh, ablation.draws, ablation.edges, rows, free_bytes(mesh.local_devices[0]))
    return CleanPass(model, ablation, sizer, Bank(model.config.dtype), Cluster(0, 1), progress)


def _plan(clean: CleanPass, kept: Sequence[Item], pool: Sequence[Item], config: SweepConfig) -> Plan:
    return Plan(
        model=clean.model,
        items=kept,
        targets=np.array([clean.bank.rows[item.prompt.id].target for item in kept]),
        bank=clean.bank,
        bank_ids=[item.prompt.id for item in pool],
        ablation=config.ablation,
        seed=config.seed,
        sizer=clean.sizer,
        tolerance=config.identity_tolerance,
        non_finite=config.non_finite,
    )


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
