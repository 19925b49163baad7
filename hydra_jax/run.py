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

from hydra_jax import prompts as prompt_sets
from hydra_jax import store
from hydra_jax.ablations import ablate_one, fill, frame
from hydra_jax.config import SweepConfig
from hydra_jax.edits import ATTN, SITES, check_enough
from hydra_jax.errors import UserError
from hydra_jax.models.load import Model, load
from hydra_jax.plan import CleanRow, Plan, choose, clean_rows, evenly, itemise, prompts_at_once
from hydra_jax.prompts import Prompt
from hydra_jax.version import __version__


def protocol(config: SweepConfig, weights_hash: str, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """All that a sweep's results depend on, as a JSON tree."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    return {
        "model": {"name": config.model, "sha256": weights_hash},
        "dtype": config.dtype,
        "precision": config.precision,
        "prompts": {
            "source": Path(config.prompts.path).name or "built-in facts",
            "sha256": prompt_sets.content_hash(prompts),
            "kind": config.prompts.kind,
            "correct_only": config.prompts.filtered,
            "limit": config.prompts.limit,
        },
        "ablation": dataclasses.asdict(config.ablation) | {"replacements": config.ablation.draws},
        "seed": config.seed,
        "versions": {"hydra_jax": __version__, **versions},
    }


def run(config: SweepConfig, workdir: Path, progress: bool = True) -> xr.Dataset:
    """Sweep into `<workdir>/effects.zarr`, going on from what is finished there.

    Beside the store stand `prompts.csv`, every prompt that was examined and whether it was kept, and
    `example.zarr`, one prompt's ablation with every replacement.

    Args:
      config: the sweep.
      workdir: made if it is not there.
      progress: whether to show bars.

    Returns:
      The store's dataset, all of it finished.

    Raises:
      UserError: if anything asked for cannot be; then nothing half-written is left behind.
    """
    with store.directory(workdir):
        prompts = prompt_sets.read(config.prompts.path, config.prompts.kind, config.prompts.limit, config.seed)
        model = load(config.model, config.dtype, config.precision)
        _check(config, model, prompts)
        asked = protocol(config, model.weights_hash, prompts)
        items = itemise(model, prompts)
        batch = prompts_at_once(config.rows, config.ablation.draws)
        resumed = store.exists(workdir)
        if resumed:
            old = store.open_effects(workdir)
            store.check_protocol(old, asked, workdir)
            if old["finished"].all() and store.has_example(workdir, config.example):
                return old
            chosen = {item.prompt.id: item for item in items}
            kept = clean_rows(
                model, [chosen[i] for i in old["prompt_id"].values], batch, config.ablation.by_head, progress
            )
        else:
            kept, examined = choose(model, items, config.prompts, config.seed, batch, config.ablation.by_head, progress)
        plan = Plan(
            model=model,
            rows=kept,
            ablation=config.ablation,
            seed=config.seed,
            chunks=evenly(len(kept), batch),
            tolerance=config.identity_tolerance,
        )
        if not resumed:
            dataset = frame(plan).assign_attrs(store.protocol_attributes(asked))
            table = examined_table(model, kept, examined)
            beside = {"prompts.csv": lambda part: table.to_csv(part, index=False)}
            store.create(workdir, dataset, plan.chunks[0].stop, beside)
        fill(plan, store.open_effects(workdir)["finished"].values, functools.partial(store.write, workdir), progress)
        effects = store.open_effects(workdir)
        store.write_example(workdir, example(plan, effects, config.example))
        store.seal(workdir)
        return effects


def _check(config: SweepConfig, model: Model, prompts: Sequence[Prompt]) -> None:
    """Refuse at once what would otherwise be found out after the clean pass, or at the very end."""
    config.ablation.components(model.config)
    if config.ablation.kind == "resample":
        check_enough(len(prompts), config.ablation.draws)
    if config.example and config.example not in {prompt.id for prompt in prompts}:
        raise UserError(f"config.example: there is no prompt of id {config.example!r}; see prompts.csv of a sweep")


def examined_table(model: Model, kept: Sequence[CleanRow], examined: Sequence[CleanRow]) -> pd.DataFrame:
    """One row a prompt: what the model answered, whether that is right, whether the sweep has it."""
    swept = {row.item.prompt.id for row in kept}
    return pd.DataFrame(
        {
            "prompt_id": row.item.prompt.id,
            "relation": row.item.prompt.relation,
            "text": row.item.prompt.text,
            "answer": row.item.prompt.answer,
            "top_token": model.tokenizer.decode([row.target]),
            "probability": row.clean_probability,
            "correct": row.correct,
            "kept": row.item.prompt.id in swept,
        }
        for row in examined
    )


def example(plan: Plan, effects: xr.Dataset, prompt_id: str = "") -> xr.Dataset:
    """One prompt under ablation of its strongest attention layer, the one of the largest mean direct effect.

    Args:
      plan: the sweep.
      effects: its results.
      prompt_id: which prompt; "" picks the one in which that ablation is repaired most, in logits.

    Raises:
      UserError: if the sweep has no such prompt.
    """
    if prompt_id and prompt_id not in plan.ids:
        raise UserError(f"config.example: {prompt_id!r} is not among the prompts swept; see prompts.csv")
    means = effects[["direct_effect", "total_effect"]].mean("replacement")
    attention = means["ablated_site"] == SITES[ATTN]
    direct = means["direct_effect"].where(attention if attention.any() else True, -np.inf).values
    strongest = direct.argmax(axis=1)
    repaired = (means["direct_effect"] - means["total_effect"]).values[np.arange(len(strongest)), strongest]
    place = plan.ids.index(prompt_id) if prompt_id else int(repaired.argmax())
    return ablate_one(plan, place, plan.components[int(strongest[place])])
