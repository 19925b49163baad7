"""The numbers and texts that the page's script draws from, as a JSON tree."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hydra_jax.analysis.names import ablations, example_name
from hydra_jax.analysis.results import Results
from hydra_jax.core import causal
from hydra_jax.core.edits import SITES
from hydra_jax.report.figures.motifs import MOTIFS
from hydra_jax.report.figures.style import reach
from hydra_jax.store import variables

if TYPE_CHECKING:
    import pandas as pd

PROMPT_BYTES = 7_000_000
"""The room for single prompts in the page: if more are swept, some are drawn at random. Statistics are of all."""

POINTS_BEHIND = 4000
"""Points of other components drawn behind the chosen one's."""

PANEL_PROMPTS = 60
"""Prompts in each of the small panels."""

ABSENT = {
    "kinds": "Sweep the same prompts with another --config.ablation.kind into a directory of its own, and give it as"
    " --also=DIR to python -m launch.report: the kinds are then drawn side by side here.",
    "heads": "Sweep with --config.ablation.sites=heads into a directory of its own, and give it as --also=DIR to"
    " python -m launch.report: the heads are then drawn here.",
}
"""The text in place of a figure that needs another sweep."""

MOTIF_VALUES = np.linspace(-1, 2, 60, dtype=np.float32)
"""The values to which the motifs' x is set."""


def payload(results: Results, kinds: Sequence[Results], heads: Results | None) -> dict[str, Any]:
    """Return what the page's script draws from, as a JSON tree.

    Args:
      results: the sweep.
      kinds: it and sweeps of other kinds, from `results.beside`.
      heads: a sweep of heads of the same model.
    """
    effects = results.effects
    prompts, ablated = effects.sizes["prompt"], effects.sizes["ablated"]
    compensation = effects["compensation"].values
    firsts = [first_downstream(compensation[:, index]) for index in range(ablated)]
    components = compensation.shape[2]
    size = 2 * sum(components - first for first in firsts) + 4 * ((len(variables.EFFECTS) + 1) * ablated + components)
    size += 2 * int(np.mean([len(text) for text in effects["text"].values]))
    random = np.random.default_rng(results.seed)
    kept = np.sort(random.permutation(prompts)[: max(1, PROMPT_BYTES // size)])
    packed_compensation, scale = pack(compensation[kept], firsts)
    means = results.means.isel(prompt=kept)
    heads = results if results.by_head else heads
    matrices = {"compensation": compensation.mean(axis=0)}
    if "direct_edge" in effects:
        edges = effects["direct_edge"].values.mean(axis=0)
        matrices |= {"direct edges": edges, "passed on": matrices["compensation"] - edges}
    examples = _examples(results, kept)
    strongest = {"prompt": 0, "ablated": int(np.argmax(results.resampled.values["direct_effect"]))}
    return {
        "by_head": results.by_head,
        "sites": results.sites,
        "ablated": [
            {
                "name": name,
                "layer": int(effects["ablated_layer"][index]),
                "site": str(effects["ablated_site"].values[index]),
                "head": int(effects["ablated_head"][index]),
                "components": [component.index for component in ablation.components],
                "first": firsts[index],
            }
            for index, (name, ablation) in enumerate(zip(results.ablated_names, ablations(effects), strict=True))
        ],
        "components": [
            {"name": name, "layer": index // 2, "site": SITES[index % 2]}
            for index, name in enumerate(results.component_names)
        ],
        "prompts": {
            "text": effects["text"].values[kept].tolist(),
            "target": effects["target_text"].values[kept].tolist(),
            "relation": effects["relation"].values[kept].tolist(),
            "probability": _rounded(effects["clean_probability"].values[kept]),
            "note": ""
            if len(kept) == prompts
            else f"{len(kept):,} of {prompts:,} prompts, drawn at random; statistics are of all",
        },
        "effects": {name: _base64(means[name].values) for name in variables.EFFECTS},
        "delta_unembed": _base64(effects["delta_unembed"].values[kept]),
        "compensation": packed_compensation,
        "scale": scale,
        "quartiles": {site: _quartiles(results, site) for site in results.sites},
        "scatter": random.permutation(len(kept) * ablated)[:POINTS_BEHIND].tolist(),
        "some": np.sort(random.permutation(len(kept))[:PANEL_PROMPTS]).tolist(),
        "summary": _columns(results.summary),
        "slope_range": _slope_range(results.summary),
        "matrices": [{"title": title, "z": _rounded(matrix)} for title, matrix in matrices.items()],
        "reach": reach(np.stack(list(matrices.values()))),
        "erasure": _columns(results.erasure),
        "kinds": [{"kind": sweep.kind, "table": _columns(sweep.summary)} for sweep in kinds],
        "kinds_sites": results.sites,
        "kinds_prompts": kinds[0].effects.sizes["prompt"] if kinds else prompts,
        "heads": _columns(heads.summary) if heads else None,
        "heads_reach": float(heads.summary[["direct_effect"]].abs().quantile(0.99).iloc[0]) if heads else 0,
        "motifs": _motifs(),
        "motif_values": _rounded(MOTIF_VALUES),
        "examples": examples,
        "start": {name: examples[0][name] for name in strongest} if examples else strongest,
        "absent": ABSENT,
    }


def _motifs() -> list[dict[str, Any]]:
    """The paper's two motifs: the effects on y of setting x to each of `MOTIF_VALUES`."""
    exogenous = {"u": np.ones_like(MOTIF_VALUES)}
    motifs = []
    for title, model in MOTIFS.items():
        arguments = model, exogenous, "x", MOTIF_VALUES, "y"
        curves = {
            "direct": causal.direct_effect(*arguments),
            "total": causal.total_effect(*arguments),
            "compensation": causal.compensation(*arguments)["f"],
        }
        motifs.append({"title": title} | {name: _rounded(np.asarray(curve)) for name, curve in curves.items()})
    return motifs


def first_downstream(compensation: np.ndarray) -> int:
    """Return the index of the first component that moves in any prompt, of [P, C]; C if none does."""
    moving = np.flatnonzero(compensation.any(axis=0))
    return int(moving[0]) if moving.size else compensation.shape[1]


def pack(compensation: np.ndarray, firsts: Sequence[int]) -> tuple[str, str]:
    """Pack [P, A, C] as 16-bit integers, downstream components only; return them and the scale of each [P, A]."""
    scale = np.maximum(np.abs(compensation).max(axis=2), 1e-12) / 32767
    whole = np.round(compensation / scale[..., None]).astype("<i2")
    rows = np.concatenate([whole[:, index, first:] for index, first in enumerate(firsts)], axis=1)
    return base64.b64encode(np.ascontiguousarray(rows).tobytes()).decode(), _base64(scale)


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()


def _rounded(array: np.ndarray) -> list:
    return np.round(np.asarray(array, np.float64), 5).tolist()


def _columns(table: pd.DataFrame) -> dict[str, list]:
    """Return a table as lists; what is not finite is null."""
    columns: dict[str, list] = {}
    for name in map(str, table.columns):
        values = table[name].to_numpy()
        if values.dtype.kind == "f":
            columns[name] = [round(float(v), 5) if np.isfinite(v) else None for v in values]
        else:
            columns[name] = [str(v) for v in values] if values.dtype.kind == "O" else values.tolist()
    return columns


def _slope_range(summary: pd.DataFrame) -> list[float]:
    """Return the ends of an axis that shows most slopes: where a layer writes next to nothing, they run away."""
    slopes = summary[[column for column in summary.columns if str(column).endswith("slope")]].to_numpy(float)
    slopes = slopes[np.isfinite(slopes)]
    if not slopes.size:
        return [-1.0, 1.0]
    low, high = np.quantile(slopes, [0.03, 0.97])
    margin = 0.3 * (high - low) + 0.05
    return [float(low - margin), float(high + margin)]


def _quartiles(results: Results, site: str) -> dict[str, Any]:
    """Quartiles over prompts of a site's contributions and effects, by layer."""
    indices = results.ablated(site)
    quartiles: dict[str, Any] = {
        "layer": results.effects["ablated_layer"].values[indices].tolist(),
        "ablated": indices.tolist(),
    }
    for name, values in (
        ("delta_unembed", results.effects["ablated_delta_unembed"].values),
        ("direct_effect", results.means["direct_effect"].values),
        ("total_effect", results.means["total_effect"].values),
    ):
        quartiles[name] = _rounded(np.quantile(values[:, indices], [0.25, 0.5, 0.75], axis=0))
    return quartiles


def _examples(results: Results, kept: np.ndarray) -> list[dict[str, Any]]:
    """The ablations of the examples among the `kept` prompts, with every replacement."""
    if results.examples is None:
        return []
    ids = results.effects["prompt_id"].values[kept].tolist()
    examples = []
    for index in range(results.examples.sizes["example"]):
        example = results.examples.isel(example=index)
        name = example_name(example)
        if example["prompt_id"].item() in ids and name in results.ablated_names:
            runs = _rounded(example["ablated_unembed"].values)
            prompt, ablated = ids.index(example["prompt_id"].item()), results.ablated_names.index(name)
            examples.append({"prompt": prompt, "ablated": ablated, "runs": runs})
    return examples
