"""Sweeps that no model made, with planted effects."""

import json

import numpy as np

from hydra_jax.analysis.names import ablation
from hydra_jax.core.edits import Ablation, all_components
from hydra_jax.store import effects as store
from hydra_jax.store import variables


def effects(
    direct,
    compensation,
    norm=0.0,
    texts=None,
    kind="resample",
    model="tiny",
    ablated=None,
    layers=None,
    options=(),
    cuts=0,
    heads=0,
    columns=None,
    protocol=None,
):
    """A finished sweep of [P, A, R] effects that keep the identity, all of the compensation by attention.

    Args:
      direct: the direct effects.
      compensation: what comes back of them.
      norm: what the final norm restores.
      texts: of the prompts.
      kind: of ablation.
      model: its name.
      ablated: names of what is ablated; None for every component.
      layers: of the model; None for as many as `direct` has pairs of components.
      options: of `variables.shapes`, beside direct edges; what they bring is 0.
      cuts: K, of cascades; none of them is made.
      heads: of attention, for head responders.
      columns: further coordinates of the prompts.
      protocol: changes of it, by its top keys.
    """
    prompts, entries, draws = direct.shape
    layers = layers or entries // 2
    components = all_components(layers)
    numbers = np.arange(prompts)
    names = ("prompt_id", "relation", "answer_text", "target_text")
    every = {name: numbers.astype(str) for name in names} | {"target_id": numbers, "length": numbers}
    every["text"] = texts or numbers.astype(str)
    every |= columns or {}
    clean = {name: np.ones(prompts, np.float32) for name in ("clean_logit", "clean_probability", "final_scale")}
    shape = (prompts, len(components))
    clean["delta_unembed"] = np.arange(prompts * len(components), dtype=np.float32).reshape(shape)
    clean["ablated_delta_unembed"] = np.arange(prompts * entries, dtype=np.float32).reshape(prompts, entries)
    source = np.zeros((prompts, draws), int)
    made = [Ablation.of(one) for one in components] if ablated is None else [ablation(name) for name in ablated]
    frame = variables.frame(every, made, layers, source)
    sizes = {"prompt": prompts, "ablated": entries, "replacement": draws, "component": len(components)}
    sizes |= {"cut": cuts, "attn_layer": layers, "head": heads}
    dataset = variables.in_memory(frame, sizes, {variables.EDGES, *options})
    dataset["non_finite"][:] = 0
    for name, array in clean.items():
        dataset[name][:] = array
    for name in set(dataset.variables) & {name for name, one in variables.VARIABLES.items() if one.option}:
        dataset[name][:] = variables.NO_CUT if name == "cut_component" else np.nan if name.startswith("cut") else 0
    dataset["direct_effect"][:] = direct
    dataset["attn_compensation"][:] = compensation
    dataset["mlp_compensation"][:] = 0
    dataset["norm_compensation"][:] = norm
    dataset["finished"][:] = True
    dataset["total_effect"][:] = direct - compensation - norm
    dataset["compensation"][:] = 0
    read = {"source": "made up", "sha256": "0", "kind": "records", "correct_only": False, "limit": 0}
    everything = {
        "model": {"name": model, "sha256": model},
        "dtype": "float32",
        "precision": "highest",
        "prompts": read,
        "ablation": {"kind": kind, "replacements": draws, "sites": "attn,mlp", "layers": "all", "edges": True},
        "seed": 0,
        "versions": {},
    }
    return dataset.assign_attrs(store.protocol_attributes(everything | (protocol or {})))


PAIRS = ("attn 1", "mlp 2", "attn 3", "attn 1 + mlp 2", "attn 1 + attn 3", "mlp 2 + attn 3", "layer 0")


def rich(prompts=24, replacements=3, layers=4, cuts=3, heads=4, positions=4, seed=0, ablated=PAIRS, **more):
    """A sweep with all that may be asked for: sets and pairs, metrics, a freeze, heads, cascades, positions, foils."""
    random = np.random.default_rng(seed)
    strength = np.array([1.0 + name.count("+") + 0.3 * name.count("attn") for name in ablated])
    direct = strength[:, None] + random.normal(0, 0.5, (prompts, len(ablated), replacements))
    direct = direct.astype(np.float32)
    options = {variables.FREE, variables.HEADS, variables.CASCADE, *variables.METRICS}
    number = np.arange(prompts)
    columns = {
        "foil_id": number + 1,
        "foil_text": [f"$foil {i}$" for i in number],
        "position": number % positions,
        "token_text": [f" $t{i}" for i in number % positions],
        "text_id": [f"text {i}" for i in number // positions],
    }
    dataset = effects(
        direct,
        0.4 * direct + random.normal(0, 0.1, direct.shape).astype(np.float32),
        ablated=list(ablated),
        layers=layers,
        options=options,
        cuts=cuts,
        heads=heads,
        columns=columns,
        **more,
    )
    dataset["free_total_effect"][:] = dataset["total_effect"] - 0.2
    dataset["log_probability_drop"][:] = 0.5 * dataset["total_effect"]
    dataset["kl"][:] = dataset["total_effect"] ** 2
    dataset["target_rank"][:] = random.integers(0, 5, direct.shape)
    dataset["top_changed"][:] = dataset["target_rank"] > 0
    for index, name in enumerate(ablated):
        first = max(one.index for one in ablation(name).components) + 1
        shape = (prompts, 2 * layers - first)
        dataset["compensation"][:, index, first:] = random.normal(0.1, 0.2, shape)
        dataset["head_compensation"][:, index, (first + 1) // 2 :] = random.normal(
            0.02, 0.1, (prompts, layers - (first + 1) // 2, heads)
        )
    lasting = random.integers(1, cuts + 1, prompts)
    for cut in range(cuts):
        here = lasting > cut
        dataset["cut_component"][here, cut] = random.integers(0, 2 * layers, here.sum())
        dataset["cut_logit"][here, cut] = 1 - 0.4 * (cut + 1) + random.normal(0, 0.2, (here.sum(), replacements))
        dataset["cut_probability"][here, cut] = 0.8 * 0.5 ** (cut + 1)
        dataset["cut_rank"][here, cut] = random.integers(0, 2, (here.sum(), replacements)) * (cut + 1)
        dataset["cut_compensation"][here, cut] = random.normal(0.05, 0.2, (here.sum(), 2 * layers))
    return dataset


def protocol(dataset):
    """The protocol of a sweep."""
    return json.loads(dataset.attrs["protocol"])


def stored(workdir, effects, chunk):
    """Such a sweep as a result store."""
    names = [name for name in variables.VARIABLES if name in effects]
    options = {variables.VARIABLES[name].option for name in names} - {""}
    store.create(workdir, effects.drop_vars(names), chunk, effects.sizes, options)
    for part in store.chunks(workdir):
        store.write(workdir, part, {name: effects[name].values[part] for name in names})
