"""The main job: a sweep from its config into a working directory, resumable."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from hydra_jax import files, store
from hydra_jax import prompts as prompt_sets
from hydra_jax.ablations import ablate_one, fill, frame
from hydra_jax.config import SweepConfig
from hydra_jax.edits import ATTN, SITES, check_enough
from hydra_jax.errors import UserError, shown
from hydra_jax.models.load import Model, load
from hydra_jax.plan import CleanRow, Plan, choose, clean_rows, evenly, facts_beside, itemise, prompts_at_once
from hydra_jax.prompts import Prompt
from hydra_jax.version import __version__

SINGLE = "prompt"
"""Id of the prompt of `config.prompts.text`."""

EXAMINED = "prompts.csv"
EXAMPLES = 4
EXAMPLE_COORDINATES = (
    *("prompt_id", "text", "target_text", "clean_logit", "clean_probability"),
    *("ablated_layer", "ablated_site", "ablated_head"),
)


def protocol(config: SweepConfig, model: Model, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """All that a sweep's results depend on, as a JSON tree."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    return {
        "model": {
            "name": config.model,
            "step": config.model_step,
            "sha256": model.weights_hash,
            "dropout": model.dropout,
        },
        "dtype": config.dtype,
        "precision": config.precision,
        "prompts": {
            "source": "one prompt" if config.prompts.text else Path(config.prompts.path).name or "built-in facts",
            "sha256": prompt_sets.content_hash(prompts),
            "kind": config.prompts.kind,
            "correct_only": config.prompts.filtered,
            "limit": config.prompts.limit,
            "target": config.prompts.target,
        },
        "ablation": dataclasses.asdict(config.ablation) | {"replacements": config.ablation.draws},
        "seed": config.seed,
        "versions": {"hydra_jax": __version__, **versions},
    }


def run(config: SweepConfig, workdir: Path, progress: bool = True) -> xr.Dataset:
    """Sweep into `<workdir>/effects.zarr`, going on from what is finished there.

    Beside the store stand `prompts.csv`, every prompt that was examined and whether it was kept, and
    `examples.zarr`, a few prompts' ablations with every replacement.

    Args:
      config: the sweep.
      workdir: made if it is not there.
      progress: whether to show bars.

    Returns:
      The store's dataset, all of it finished.

    Raises:
      UserError: if anything asked for cannot be; then nothing half-written is left behind.
    """
    with files.directory(workdir), files.alone(workdir):
        prompts = _prompts(config)
        model = load(config.model, config.dtype, config.precision, config.model_step)
        config = dataclasses.replace(config, dtype=model.config.dtype)
        _check(config, model, prompts)
        asked = protocol(config, model, prompts)
        items = itemise(model, prompts)
        batch = prompts_at_once(config.rows, config.ablation.draws)
        resumed = store.exists(workdir)
        if resumed:
            old = store.open_effects(workdir)
            store.check_protocol(old, asked, workdir)
            finished = store.recover(workdir)
            if finished.all() and store.has_examples(workdir, config.example):
                return old
        by_head = config.ablation.by_head
        if config.prompts.text:
            bank = clean_rows(model, items, batch, by_head, progress)
            kept = examined = [row for row in bank if row.item.prompt.id == SINGLE]
        elif resumed:
            chosen = {item.prompt.id: item for item in items}
            swept = [chosen[i] for i in old["prompt_id"].values]
            kept = bank = clean_rows(model, swept, batch, by_head, progress, config.prompts.target)
        else:
            kept, examined = choose(model, items, config.prompts, config.seed, batch, by_head, progress)
            bank = kept
        plan = Plan(
            model=model,
            rows=kept,
            bank=bank,
            ablation=config.ablation,
            seed=config.seed,
            chunks=evenly(len(kept), batch),
            tolerance=config.identity_tolerance,
        )
        if not resumed:
            dataset = frame(plan).assign_attrs(store.protocol_attributes(asked))
            table = examined_table(model, kept, examined)
            beside = {EXAMINED: lambda part: table.to_csv(part, index=False)}
            store.create(workdir, dataset, plan.chunks[0].stop, beside)
            finished = np.zeros(len(kept), bool)
        try:
            fill(plan, finished, functools.partial(store.write, workdir), progress)
        except UserError:
            if not resumed and not store.open_effects(workdir)["finished"].values.any():
                store.discard(workdir, [EXAMINED])
            raise
        effects = store.open_effects(workdir)
        store.write_examples(workdir, examples(plan, effects, config.example))
        store.seal(workdir)
        return effects


def _prompts(config: SweepConfig) -> list[Prompt]:
    """The prompts to examine; of a single one, with the facts that replacements come from."""
    asked = config.prompts
    if asked.text:
        return [Prompt(SINGLE, asked.text), *facts_beside(asked.text, config.ablation.draws, config.seed)]
    return prompt_sets.read(asked.path, asked.kind, asked.limit, config.seed)


def _check(config: SweepConfig, model: Model, prompts: Sequence[Prompt]) -> None:
    """Refuse at once what would otherwise be found out after the clean pass, or at the very end."""
    config.ablation.components(model.config)
    if config.ablation.kind == "resample":
        check_enough(len(prompts), config.ablation.draws)
    if config.example and config.example not in {prompt.id for prompt in prompts}:
        raise UserError(f"config.example: there is no prompt of id {shown(config.example)}; see prompts.csv of a sweep")


def examined_table(model: Model, kept: Sequence[CleanRow], examined: Sequence[CleanRow]) -> pd.DataFrame:
    """One row a prompt: what the model answered, whether that is right, whether the sweep has it."""
    swept = {row.item.prompt.id for row in kept}
    return pd.DataFrame(
        {
            "prompt_id": row.item.prompt.id,
            "relation": row.item.prompt.relation,
            "text": row.item.prompt.text,
            "answer": row.item.prompt.answer,
            "top_token": model.tokenizer.decode([row.top]),
            "probability": row.clean_probability,
            "correct": row.correct,
            "kept": row.item.prompt.id in swept,
        }
        for row in examined
    )


def examples(plan: Plan, effects: xr.Dataset, prompt_id: str = "") -> xr.Dataset:
    """A few prompts, each under ablation of its strongest attention layer, the one of the largest direct effect.

    They are the one that is asked for, and those in which that ablation is repaired most, at the
    quartiles, and least (or made worse most), in logits.

    Args:
      plan: the sweep.
      effects: its results.
      prompt_id: which prompt comes first; "" for none in particular.

    Raises:
      UserError: if the sweep has no such prompt.

    Returns:
      `ablations.ablate_one` of each, along the dimension `example`.
    """
    if prompt_id and prompt_id not in plan.ids:
        raise UserError(f"config.example: {shown(prompt_id)} is not among the prompts swept; see prompts.csv")
    means = effects[["direct_effect", "total_effect"]].mean("replacement")
    attention = means["ablated_site"] == SITES[ATTN]
    direct = means["direct_effect"].where(attention if attention.any() else True, -np.inf).values
    strongest = direct.argmax(axis=1)
    repaired = (means["direct_effect"] - means["total_effect"]).values[np.arange(len(strongest)), strongest]
    asked = [plan.ids.index(prompt_id)] if prompt_id else []
    order = np.argsort(-repaired)
    spread = order[np.linspace(0, len(order) - 1, EXAMPLES).round().astype(int)]
    places = list(dict.fromkeys([*asked, *spread.tolist()]))[:EXAMPLES]
    found = []
    for place in places:
        one = ablate_one(plan, place, plan.components[int(strongest[place])])
        named = {name: np.array(one.attrs[name]) for name in EXAMPLE_COORDINATES}
        named |= {name: value.astype(object) for name, value in named.items() if value.dtype.kind == "U"}
        found.append(one.assign_coords(named).drop_attrs(deep=False))
    shared = {"kind": plan.ablation.kind, "units": store.LOGITS}
    return xr.concat(found, "example", coords=list(EXAMPLE_COORDINATES), compat="override").assign_attrs(shared)
