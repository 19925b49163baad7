"""A sweep as one page that opens offline, beside its tables and figures."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_jax.analysis import findings
from hydra_jax.analysis.results import Results
from hydra_jax.config import ANSWER, LAST_STEP
from hydra_jax.core.edits import Component
from hydra_jax.report import figures, tables, templates
from hydra_jax.report.figures.style import SITE_NAMES
from hydra_jax.report.payload import payload
from hydra_jax.store import files

if TYPE_CHECKING:
    import pandas as pd

PAGE = "report.html"
BESIDE = ("kinds", "heads")
"""Figures that need other sweeps beside the one."""

VERDICT_CLASSES = {
    findings.HOLDS: "yes",
    findings.WEAKLY: "part",
    findings.PARTLY: "part",
    findings.FAILS: "no",
}
"""The style of each verdict; any other is open."""

GLOSSARY = {
    "component": "the attention or the MLP of a layer; what it writes is added to the residual stream",
    "delta_unembed": "what a component's write contributes to the target's logit in the clean run",
    "direct effect": "the drop of the logit if the ablated write changed and nothing else did",
    "total effect": "the actual drop, with everything downstream responding",
    "compensation": "how much more a component downstream contributes once another is ablated; below zero, less",
    "restored share": "mean compensation (with the final norm's) over mean direct effect; below zero, the loss grows",
    "slope, R²": "the slope and the fit of a regression of compensation on direct effect over prompts",
    "responders": "components downstream that move by more than a tenth of the direct effect, median over prompts",
}
"""The page's words and their meanings."""

TABLE = {
    "direct_effect": "direct effect",
    "total_effect": "total effect",
    "restored_share": "restored share",
    **{f"{part}_compensation": f"by {part}" for part in ("attn", "mlp", "norm")},
    "slope": "slope",
    "r2": "R²",
    "responders": "responders",
}
"""The columns of the page's table, and their titles."""


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
      workdir: the directory they go into.
      results: the sweep.
      kinds: it and sweeps of other kinds on the same prompts, shown side by side.
      heads: a sweep of heads of the same model.
      progress: whether to show a bar.
      comparison: a section on matched models: Markup from `comparison.report.section`; other text is escaped.

    Returns:
      The paths that were written, the page last.
    """
    paths = write_tables(workdir, results.tables)
    drawn = figures.draw(workdir, results, kinds, heads, progress)
    for name in BESIDE:  # an earlier report may have had other sweeps beside it
        for form in figures.FORMATS:
            if (stale := workdir / f"{name}.{form}") not in drawn:
                stale.unlink(missing_ok=True)
    paths += drawn
    text = page(results, kinds, heads, comparison)
    paths.append(workdir / PAGE)
    files.write_text(paths[-1], text)
    return paths


def write_tables(workdir: Path, tables: Mapping[str, pd.DataFrame]) -> list[Path]:
    """Write tables as `NAME.csv` and `NAME.parquet`, and return the paths."""
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
    """Return the page's HTML; arguments as `write`."""
    return templates.render(
        "page.html",
        title=f"Self-repair in {results.protocol['model']['name']}",
        subtitle=_subtitle(results),
        about=_about(results),
        findings=results.findings,
        verdict_classes=VERDICT_CLASSES,
        comparison=comparison,
        glossary=GLOSSARY,
        columns=["ablated", *TABLE.values()],
        rows=_rows(results.summary),
        protocol=_protocol(results.protocol) | {"protocol SHA-256": results.effects.attrs["protocol_sha256"]},
        command=_command(results.protocol),
        style=templates.asset("page.css"),
        script=templates.asset("page.js"),
        plotly=templates.plotly(),
        data=templates.script_data(payload(results, kinds, heads)),
    )


def _subtitle(results: Results) -> str:
    """A sentence on what was ablated in which prompts, and one on the unit of effects."""
    what = "attention heads" if results.by_head else " and ".join(SITE_NAMES[site] for site in results.sites)
    answers = results.protocol["prompts"].get("target") == ANSWER
    target = "the answer" if answers else "the model's most likely next token"
    return (
        f"{results.kind} ablation of {what}, one at a time, at the last token of {results.effects.sizes['prompt']:,}"
        f" prompts ({results.protocol['prompts']['source']}), {results.effects.sizes['replacement']} replacements each."
        f" Effects are in logits of {target}, less the mean logit;"
        " for models that soft-cap their logits (Gemma 2), before the cap."
    )


def _about(results: Results) -> str:
    """A note on the origin of the claims and on the brackets."""
    return (
        "The claims are those of McGrath et al. (arXiv 2307.15771) about Chinchilla 7B; other models need not behave"
        " alike. In brackets are 95 % bootstrap intervals over prompts and replacements"
        f" ({results.samples:,} resamples)."
    )


def _rows(summary: pd.DataFrame) -> list[tuple[str, ...]]:
    """The rows of the page's table as text: a name, and means with their intervals."""
    names = [str(Component.named(*row)) for row in summary[["layer", "site", "head"]].itertuples(index=False)]
    columns = [names, *(tables.interval(summary, column) for column in TABLE)]
    return list(zip(*columns, strict=True))


def _protocol(protocol: dict[str, Any]) -> dict[str, str]:
    """The protocol by what it says, as text."""

    def pairs(settings: Mapping[str, Any]) -> str:
        return ", ".join(f"{key} {value}" for key, value in settings.items())

    return {
        "model": f"{protocol['model']['name']}, SHA-256 {protocol['model']['sha256']}",
        "numbers": f"{protocol['dtype']}, matrix products at precision {protocol['precision']}",
        "prompts": pairs(protocol["prompts"]),
        "ablation": pairs(protocol["ablation"]),
        "seed": str(protocol["seed"]),
        "versions": pairs(protocol["versions"]),
    }


def _command(protocol: dict[str, Any]) -> str:
    """Return the command that makes the sweep; of a prompt file it gives the name alone."""
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
