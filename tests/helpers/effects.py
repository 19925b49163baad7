"""Sweeps that no model made, with planted effects."""

import numpy as np

from hydra_jax.core.edits import Ablation, all_components
from hydra_jax.store import effects as store
from hydra_jax.store import variables


def effects(direct, compensation, norm=0.0, texts=None, kind="resample", model="tiny"):
    """A finished sweep of [P, A, R] effects that keep the identity, all of the compensation by attention."""
    prompts, ablated, draws = direct.shape
    numbers = np.arange(prompts)
    names = ("prompt_id", "relation", "answer_text", "target_text")
    columns = {name: numbers.astype(str) for name in names} | {"target_id": numbers, "length": numbers}
    columns["text"] = texts or numbers.astype(str)
    clean = {name: np.ones(prompts, np.float32) for name in ("clean_logit", "clean_probability", "final_scale")}
    clean["delta_unembed"] = np.arange(prompts * ablated, dtype=np.float32).reshape(prompts, ablated)
    clean["ablated_delta_unembed"] = clean["delta_unembed"]
    source = np.zeros((prompts, draws), int)
    components = all_components(ablated // 2)
    frame = variables.frame(columns, [Ablation.of(one) for one in components], ablated // 2, source)
    sizes = {"prompt": prompts, "ablated": ablated, "replacement": draws, "component": ablated}
    dataset = variables.in_memory(frame, sizes, {variables.EDGES})
    dataset["non_finite"][:] = 0
    for name, array in clean.items():
        dataset[name][:] = array
    dataset["direct_effect"][:] = direct
    dataset["attn_compensation"][:] = compensation
    dataset["mlp_compensation"][:] = 0
    dataset["norm_compensation"][:] = norm
    dataset["finished"][:] = True
    dataset["total_effect"][:] = direct - compensation - norm
    dataset["compensation"][:] = dataset["direct_edge"][:] = 0
    source = {"source": "made up", "sha256": "0", "kind": "records", "correct_only": False, "limit": 0}
    protocol = {
        "model": {"name": model, "sha256": model},
        "dtype": "float32",
        "precision": "highest",
        "prompts": source,
        "ablation": {"kind": kind, "replacements": draws, "sites": "attn,mlp", "layers": "all", "edges": True},
        "seed": 0,
        "versions": {},
    }
    return dataset.assign_attrs(store.protocol_attributes(protocol))


def stored(workdir, effects, chunk):
    """Such a sweep as a result store."""
    names = [name for name in variables.VARIABLES if name in effects]
    store.create(workdir, effects.drop_vars(names), chunk, effects.sizes, {variables.EDGES})
    for part in store.chunks(workdir):
        store.write(workdir, part, {name: effects[name].values[part] for name in names})
