"""A sweep as one page that opens offline, beside its tables and figures."""

from __future__ import annotations

import base64
import functools
import html
import importlib.resources
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.offline

from hydra_jax.analysis import findings
from hydra_jax.analysis.results import Results
from hydra_jax.config import ANSWER, LAST_STEP
from hydra_jax.core import causal
from hydra_jax.core.edits import SITES, Component
from hydra_jax.report import figures
from hydra_jax.report.figures.motifs import MOTIFS
from hydra_jax.report.figures.style import reach
from hydra_jax.store import files, variables

PAGE = "report.html"
PROMPT_BYTES = 7_000_000
"""Of what the page holds of single prompts: of more than fit, some are drawn at random. Statistics are of all."""

BESIDE = ("kinds", "heads")
"""Figures that want sweeps beside the one."""

FAINT = 4000
"""Points of other components behind the chosen one's."""

SOME = 60
"""Prompts in each of the small panels."""

VERDICT_CLASSES = {
    findings.HOLDS: "yes",
    findings.WEAKLY: "part",
    findings.PARTLY: "part",
    findings.FAILS: "no",
}


def write(
    workdir: Path,
    results: Results,
    kinds: Sequence[Results] = (),
    heads: Results | None = None,
    progress: bool = False,
    comparison: str = "",
) -> list[Path]:
    """Write a sweep's tables (CSV and Parquet), figures (PNG and PDF) and page into `workdir`.

    Args:
      workdir: where.
      results: the sweep.
      kinds: it and sweeps of other kinds on the same prompts, side by side.
      heads: a sweep of heads of the same model.
      progress: whether to show a bar.
      comparison: a section on matched models, from `report_arms`.

    Returns:
      The paths, the page last.
    """
    paths = write_tables(workdir, results.tables)
    drawn = figures.draw(workdir, results, kinds, heads, progress)
    for name in BESIDE:  # of an earlier report that had other sweeps beside it
        for form in figures.FORMATS:
            if (stale := workdir / f"{name}.{form}") not in drawn:
                stale.unlink(missing_ok=True)
    paths += drawn
    text = page(results, kinds, heads, comparison)
    paths.append(workdir / PAGE)
    files.write_text(paths[-1], text)
    return paths


def write_tables(workdir: Path, tables: Mapping[str, pd.DataFrame]) -> list[Path]:
    """Write tables as `NAME.csv` and `NAME.parquet`; returns the paths."""
    paths = []
    for name, table in tables.items():
        for form, save in (
            ("csv", functools.partial(table.to_csv, index=False, float_format="%.6g")),
            ("parquet", functools.partial(table.to_parquet, index=False)),
        ):
            paths.append(workdir / f"{name}.{form}")
            files.write_whole(paths[-1], save)
    return paths


def page(results: Results, kinds: Sequence[Results] = (), heads: Results | None = None, comparison: str = "") -> str:
    """The page as text. Whatever comes from prompts, models or files is escaped; `comparison` is HTML."""
    parts = importlib.resources.files("hydra_jax.report") / "assets"
    # A "<" would let a prompt end the script that holds the data.
    data = json.dumps(payload(results, kinds, heads), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    values = {
        "STYLE": parts.joinpath("page.css").read_text("utf-8"),
        "TITLE": html.escape(f"Self-repair in {results.protocol['model']['name']}"),
        "SUBTITLE": html.escape(_subtitle(results)),
        "ABOUT": html.escape(_about(results)),
        "FINDINGS": "".join(_card(number, finding) for number, finding in enumerate(results.findings, 1)),
        "COMPARISON": comparison,
        "GLOSSARY": _terms(GLOSSARY),
        "TABLE": _table(results.summary),
        "PROTOCOL": _protocol(results),
        "SCRIPT": parts.joinpath("page.js").read_text("utf-8"),
        "PLOTLY": plotly.offline.get_plotlyjs(),
        "DATA": data,
    }
    pieces = parts.joinpath("page.html").read_text("utf-8").split("[[")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("]]")
        filled += [values[name], rest]
    return "".join(filled)


def _subtitle(results: Results) -> str:
    what = (
        "attention heads" if results.by_head else " and ".join(figures.style.SITE_NAMES[site] for site in results.sites)
    )
    of_answer = results.protocol["prompts"].get("target") == ANSWER
    read = "the answer" if of_answer else "the model's most likely next token"
    return (
        f"{results.kind} ablation of {what}, one at a time, at the last token of {results.effects.sizes['prompt']:,}"
        f" prompts ({results.protocol['prompts']['source']}), {results.effects.sizes['replacement']} replacements each."
        f" Effects are in logits of {read}, less the mean logit;"
        " where a model soft-caps its logits (Gemma 2), before it does."
    )


def _about(results: Results) -> str:
    return (
        "The claims are McGrath et al.'s (arXiv 2307.15771) of Chinchilla 7B; another model need not behave alike."
        f" In brackets 95 % bootstrap intervals over prompts and replacements ({results.samples:,} resamples)."
    )


def _card(number: int, finding: findings.Finding) -> str:
    verdict = VERDICT_CLASSES.get(finding.verdict, "open")
    return (
        f'<article class="card"><h3><span>{number}. {html.escape(finding.title)}</span>'
        f'<span class="verdict {verdict}">{html.escape(finding.verdict)}</span></h3>'
        f'<p class="claim">{html.escape(finding.claim)}</p><p>{html.escape(finding.measured)}</p>'
        f'<p class="criterion">Holds if {html.escape(finding.criterion)}.</p></article>'
    )


def _table(summary: pd.DataFrame) -> str:
    columns = {
        "direct_effect": "direct effect",
        "total_effect": "total effect",
        "restored_share": "restored share",
        **{f"{part}_compensation": f"by {part}" for part in ("attn", "mlp", "norm")},
        "slope": "slope",
        "r2": "R²",
        "responders": "responders",
    }
    head = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in ("ablated", *columns.values()))
    rows = []
    for row in summary.to_dict("records"):
        cells = [f"<td>{html.escape(str(Component.named(row['layer'], row['site'], row['head'])))}</td>"]
        for name in columns:
            missing = not np.isfinite(row[name])
            text = "" if missing else f"{row[name]:.2f} ({row[f'{name}_low']:.2f} to {row[f'{name}_high']:.2f})"
            cells.append(f"<td>{text}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _protocol(results: Results) -> str:
    protocol = results.protocol
    lines = {
        "model": f"{protocol['model']['name']}, SHA-256 {protocol['model']['sha256']}",
        "numbers": f"{protocol['dtype']}, matrix products at precision {protocol['precision']}",
        "prompts": ", ".join(f"{key} {value}" for key, value in protocol["prompts"].items()),
        "ablation": ", ".join(f"{key} {value}" for key, value in protocol["ablation"].items()),
        "seed": str(protocol["seed"]),
        "versions": ", ".join(f"{key} {value}" for key, value in protocol["versions"].items()),
        "protocol SHA-256": results.effects.attrs["protocol_sha256"],
    }
    return f"{_terms(lines)}<pre>{html.escape(_command(protocol))}</pre>"


def _terms(lines: Mapping[str, str]) -> str:
    terms = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in lines.items())
    return f"<dl>{terms}</dl>"


def _command(protocol: dict[str, Any]) -> str:
    """The command that makes the sweep; a prompt file stands as its name alone."""
    asked = {f"ablation.{key}": protocol["ablation"][key] for key in ("kind", "replacements", "sites", "layers")}
    asked |= {key: protocol[key] for key in ("dtype", "precision", "seed")}
    prompts = protocol["prompts"]
    usual = {"kind": "records", "limit": 0, "target": "top"}
    asked |= {f"prompts.{key}": prompts[key] for key in usual if prompts.get(key, usual[key]) != usual[key]}
    if protocol["model"].get("step", LAST_STEP) != LAST_STEP:
        asked["model_step"] = protocol["model"]["step"]
    if prompts["source"] not in ("built-in facts", "one prompt"):
        asked["prompts.path"] = prompts["source"]
    if not prompts["correct_only"]:
        asked["prompts.correct_only"] = False
    settings = [f"--config.{key}={shlex.quote(str(value))}" for key, value in asked.items()]
    first = f"python -m launch.sweep --config=configs/sweep.py:{shlex.quote(protocol['model']['name'])} --workdir=DIR"
    return " \\\n    ".join([first, *settings])


def payload(results: Results, kinds: Sequence[Results], heads: Results | None) -> dict[str, Any]:
    """What the page's script draws from, as a JSON tree."""
    effects = results.effects
    prompts, ablated = effects.sizes["prompt"], effects.sizes["ablated"]
    compensation = effects["compensation"].values
    firsts = [_first_downstream(compensation[:, place]) for place in range(ablated)]
    components = compensation.shape[2]
    size = 2 * sum(components - first for first in firsts) + 4 * ((len(variables.EFFECTS) + 1) * ablated + components)
    size += 2 * int(np.mean([len(text) for text in effects["text"].values]))
    random = np.random.default_rng(results.seed)
    kept = np.sort(random.permutation(prompts)[: max(1, PROMPT_BYTES // size)])
    packed, scale = _packed(compensation[kept], firsts)
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
                "layer": int(effects["ablated_layer"][place]),
                "site": str(effects["ablated_site"].values[place]),
                "head": int(effects["ablated_head"][place]),
                "place": 2 * int(effects["ablated_layer"][place])
                + SITES.index(str(effects["ablated_site"].values[place])),
                "first": firsts[place],
            }
            for place, name in enumerate(results.ablated_names)
        ],
        "components": [
            {"name": name, "layer": place // 2, "site": SITES[place % 2]}
            for place, name in enumerate(results.component_names)
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
        "compensation": packed,
        "scale": scale,
        "quartiles": {site: _quartiles(results, site) for site in results.sites},
        "scatter": random.permutation(len(kept) * ablated)[:FAINT].tolist(),
        "some": np.sort(random.permutation(len(kept))[:SOME]).tolist(),
        "summary": _columns(results.summary),
        "slope_range": _slope_range(results.summary),
        "matrices": [{"title": title, "z": _rounded(matrix)} for title, matrix in matrices.items()],
        "reach": reach(np.stack(list(matrices.values()))),
        "erasure": _columns(results.erasure),
        "kinds": [{"kind": each.kind, "table": _columns(each.summary)} for each in kinds],
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


GLOSSARY = {
    "component": "the attention or the MLP of a layer; what it writes is added to the residual stream",
    "delta_unembed": "what a component's write contributes to the target's logit in the clean run",
    "direct effect": "the drop of the logit if the ablated write changed and nothing else did",
    "total effect": "the drop that there is, with everything downstream responding",
    "compensation": "by how much a component downstream contributes more once another is ablated; below zero, less",
    "restored share": "mean compensation (with the final norm's) over mean direct effect; below zero, made worse",
    "slope, R²": "of the regression of compensation on direct effect over prompts",
    "responders": "components downstream that move by more than a tenth of the direct effect, median over prompts",
}
"""The page's words."""

ABSENT = {
    "kinds": "Sweep the same prompts with another --config.ablation.kind into a directory of its own, and give it as"
    " --also=DIR to python -m launch.report: the kinds are then drawn side by side here.",
    "heads": "Sweep with --config.ablation.sites=heads into a directory of its own, and give it as --also=DIR to"
    " python -m launch.report: the heads are then drawn here.",
}
"""What stands in place of a figure that wants another sweep."""

MOTIF_VALUES = np.linspace(-1, 2, 60, dtype=np.float32)


def _motifs() -> list[dict[str, Any]]:
    exogenous = {"u": np.ones_like(MOTIF_VALUES)}
    found = []
    for title, model in MOTIFS.items():
        arguments = model, exogenous, "x", MOTIF_VALUES, "y"
        curves = {
            "direct": causal.direct_effect(*arguments),
            "total": causal.total_effect(*arguments),
            "compensation": causal.compensation(*arguments)["f"],
        }
        found.append({"title": title} | {name: _rounded(np.asarray(curve)) for name, curve in curves.items()})
    return found


def _first_downstream(compensation: np.ndarray) -> int:
    """Of [P, C]: the first component that moves in any prompt."""
    moving = np.flatnonzero(compensation.any(axis=0))
    return int(moving[0]) if moving.size else compensation.shape[1]


def _packed(compensation: np.ndarray, firsts: Sequence[int]) -> tuple[str, str]:
    """[P, A, C] as whole numbers of 16 bits, downstream components only, and what each [P, A] is scaled by."""
    scale = np.maximum(np.abs(compensation).max(axis=2), 1e-12) / 32767
    whole = np.round(compensation / scale[..., None]).astype("<i2")
    rows = np.concatenate([whole[:, place, first:] for place, first in enumerate(firsts)], axis=1)
    return base64.b64encode(np.ascontiguousarray(rows).tobytes()).decode(), _base64(scale)


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()


def _rounded(array: np.ndarray) -> list:
    return np.round(np.asarray(array, np.float64), 5).tolist()


def _columns(table: pd.DataFrame) -> dict[str, list]:
    """A table as lists, with a `name` a row where it has components; what is not finite is null."""
    columns: dict[str, list] = {}
    for name in map(str, table.columns):
        values = table[name].to_numpy()
        if values.dtype.kind == "f":
            columns[name] = [round(float(v), 5) if np.isfinite(v) else None for v in values]
        else:
            columns[name] = [str(v) for v in values] if values.dtype.kind == "O" else values.tolist()
    if "head" in table:
        columns["name"] = [
            str(Component.named(*row)) for row in zip(table["layer"], table["site"], table["head"], strict=True)
        ]
    return columns


def _slope_range(summary: pd.DataFrame) -> list[float]:
    slopes = summary[[column for column in summary.columns if str(column).endswith("slope")]].to_numpy(float)
    slopes = slopes[np.isfinite(slopes)]
    if not slopes.size:
        return [-1.0, 1.0]
    low, high = np.quantile(slopes, [0.03, 0.97])
    margin = 0.3 * (high - low) + 0.05
    return [float(low - margin), float(high + margin)]


def _quartiles(results: Results, site: str) -> dict[str, Any]:
    places = results.ablated(site)
    found: dict[str, Any] = {
        "layer": results.effects["ablated_layer"].values[places].tolist(),
        "place": places.tolist(),
    }
    for name, values in (
        ("delta_unembed", results.effects["ablated_delta_unembed"].values),
        ("direct_effect", results.means["direct_effect"].values),
        ("total_effect", results.means["total_effect"].values),
    ):
        found[name] = _rounded(np.quantile(values[:, places], [0.25, 0.5, 0.75], axis=0))
    return found


def _examples(results: Results, kept: np.ndarray) -> list[dict[str, Any]]:
    """Every replacement of the examples' ablations."""
    if results.examples is None:
        return []
    ids = results.effects["prompt_id"].values[kept].tolist()
    labels = ("ablated_layer", "ablated_site", "ablated_head")
    found = []
    for place in range(results.examples.sizes["example"]):
        example = results.examples.isel(example=place)
        name = str(Component.named(*(example[label].item() for label in labels)))
        if example["prompt_id"].item() in ids and name in results.ablated_names:
            runs = _rounded(example["ablated_unembed"].values)
            prompt, ablated = ids.index(example["prompt_id"].item()), results.ablated_names.index(name)
            found.append({"prompt": prompt, "ablated": ablated, "runs": runs})
    return found
