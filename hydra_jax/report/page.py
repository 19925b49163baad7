"""A sweep as one page that opens offline, beside its tables and figures."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_jax.analysis import findings
from hydra_jax.analysis.names import is_set
from hydra_jax.analysis.positions import has_positions, is_single_text
from hydra_jax.analysis.results import Results
from hydra_jax.config import ANSWER, AUTO, GIVEN, LAST_STEP, TOP, ReadoutConfig
from hydra_jax.report import figures, tables, templates
from hydra_jax.report.figures.style import SITE_NAMES
from hydra_jax.report.payload import payload
from hydra_jax.report.pictures import pictures
from hydra_jax.store import files

if TYPE_CHECKING:
    import pandas as pd

PAGE = "report.html"
BESIDE = ("kinds", "heads")
"""Figures that need other sweeps beside the one."""

ABLATION = ("components", "freeze", "paired", "match", "interactions", "cascade")
"""The settings of ablations that the command names where they are set."""

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
    "restored share": "mean compensation (with the final norm's) over mean direct effect, where that is clearly above"
    " zero; below zero, the loss grows",
    "slope, R²": "the slope and the fit of a regression of compensation on direct effect over prompts",
    "responders": "components downstream that move by more than a tenth of the direct effect, median over prompts",
}
"""The page's words and their meanings."""

GLOSSARY_WHERE_THERE = {
    "sets": {"set": "several components that are ablated together; layer 5 is its attention and its MLP"},
    "interactions": {
        "interaction": "the total effect of two ablations together less that of each alone",
        "woken": "the change of a component's contribution when another alone is ablated",
    },
    "cascade": {
        "cascade": "one cut after the other: the component of the largest direct effect, then each time the one that"
        " repairs most",
        "survives": "the target is still the most likely token, in more than half of the replacements",
    },
    "frozen_against_free": {"frozen": "held at what it writes in the clean run, so that it cannot respond"},
    "head_responders": {"responding head": "a head whose contribution changes once another component is ablated"},
    "positions": {"position": "a token of a text; the sweep reads what the model predicts after it"},
}
"""The words of figures that only some sweeps have, by figure."""

METRIC_WORDS = {
    "log_probability_drop": ("log-probability drop", "the drop of the target's log-probability, in nats"),
    "kl": ("KL", "the divergence of the ablated run's next token from the clean run's, in nats"),
    "target_rank": ("rank", "how many tokens are more likely than the target in the ablated run"),
    "top_changed": ("top changed", "the share of ablated runs in which another token is the most likely one"),
    "free_total_effect": ("free total effect", "the total effect with nothing frozen"),
    "frozen_gain": ("frozen less free", "by how much the total effect is larger with the freeze"),
}
"""The further columns of the page's table, where a sweep has them: their titles and meanings."""

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
    for name in (*BESIDE, *figures.OPTIONAL):  # an earlier report may have had other sweeps beside it
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
    drawn = pictures(results)
    metrics = {name: words for name, words in METRIC_WORDS.items() if name in results.summary}
    glossary = GLOSSARY | dict(metrics.values())
    for picture in drawn:
        glossary |= GLOSSARY_WHERE_THERE[picture.name]
    table = TABLE | {name: title for name, (title, _) in metrics.items()}
    return templates.render(
        "page.html",
        title=f"Self-repair in {results.protocol['model']['name']}",
        subtitle=_subtitle(results),
        about=_about(results),
        findings=results.findings,
        verdict_classes=VERDICT_CLASSES,
        comparison=comparison,
        glossary=glossary,
        pictures=drawn,
        columns=["ablated", *table.values()],
        rows=_rows(results.summary, table),
        protocol=_protocol(results.protocol) | {"protocol SHA-256": results.effects.attrs["protocol_sha256"]},
        command=_command(results.protocol),
        style=templates.asset("page.css"),
        script=templates.asset("page.js"),
        plotly=templates.plotly(),
        data=templates.script_data(payload(results, kinds, heads)),
    )


def _subtitle(results: Results) -> str:
    """A sentence on what was ablated in which prompts, and one on the unit of effects."""
    effects, prompts = results.effects, results.protocol["prompts"]
    what = "attention heads" if results.by_head else " and ".join(SITE_NAMES[site] for site in results.sites)
    what = f"{what}, one at a time," if what else ""
    if results.has_sets:
        what = " and of ".join(filter(None, [what, f"{is_set(effects).sum()} sets of components together,"]))
    read = results.protocol.get("readout", {}).get("target") or prompts.get("target") or TOP
    likeliest = "the model's most likely next token"
    words = {ANSWER: "the answer", TOP: likeliest, AUTO: "the answer" if results.has_foils else likeliest}
    target = words.get(read, f"the token {read!r}")
    less = "those of a foil" if results.has_foils else "the mean logit"
    where = results.prompts if has_positions(effects) else f"the last token of {results.prompts}"
    return (
        f"{results.kind} ablation of {what} at {where}"
        f" ({prompts['source']}), {effects.sizes['replacement']} replacements each."
        f" Effects are in logits of {target}, less {less};"
        " for models that soft-cap their logits (Gemma 2), before the cap."
    )


def _about(results: Results) -> str:
    """A note on the origin of the claims and on the brackets."""
    drawn = "prompts"
    if results.positions is not None:
        drawn = "positions of this one text" if is_single_text(results.effects) else "whole texts"
    return (
        "The claims are those of McGrath et al. (arXiv 2307.15771) about Chinchilla 7B; other models need not behave"
        " alike. In brackets are 95 % bootstrap intervals over"
        f" {drawn} and replacements"
        f" ({results.samples:,} resamples)."
    )


def _rows(summary: pd.DataFrame, table: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The rows of the page's table as text: a name, and means with their intervals of the columns of `table`."""
    columns = [summary["name"], *(tables.interval(summary, column) for column in table)]
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
        **({"readout": pairs(protocol["readout"])} if protocol.get("readout") else {}),
        "seed": str(protocol["seed"]),
        "versions": pairs(protocol["versions"]),
    }


def _command(protocol: dict[str, Any]) -> str:
    """Return the command that makes the sweep; of a prompt file it gives the name alone. Of several, one each."""
    if isinstance(protocol["seed"], list):
        counts = protocol["ablation"]["replacements"]
        parts = [
            protocol | {"seed": seed, "ablation": protocol["ablation"] | {"replacements": count}}
            for seed, count in zip(protocol["seed"], counts, strict=True)
        ]
        return "\n".join(map(_command, parts))
    if protocol["prompts"]["source"] == GIVEN:
        return "It was made in Python, by hydra_jax.sweep of prompts that were given there."
    ablation, readout = protocol["ablation"], protocol.get("readout", {})
    chosen = ("kind", "replacements") if ablation.get("components") else ("kind", "replacements", "sites", "layers")
    asked = {f"ablation.{key}": ablation[key] for key in chosen}
    asked |= {f"ablation.{key}": ablation[key] for key in ABLATION if ablation.get(key)}
    usual = dataclasses.asdict(ReadoutConfig())
    asked |= {f"readout.{key}": readout[key] for key in usual if readout.get(key, usual[key]) != usual[key]}
    asked |= {key: protocol[key] for key in ("dtype", "precision", "seed")}
    prompts = protocol["prompts"]
    usual_prompts = {"kind": "records", "limit": 0, "target": TOP, "positions": "last"}
    asked |= {
        f"prompts.{key}": prompts[key] for key, value in usual_prompts.items() if (prompts.get(key) or value) != value
    }
    if protocol["model"].get("step", LAST_STEP) != LAST_STEP:
        asked["model_step"] = protocol["model"]["step"]
    if prompts["source"] not in ("built-in facts", "one prompt"):
        asked["prompts.path"] = prompts["source"]
    if not prompts["correct_only"]:
        asked["prompts.correct_only"] = False
    settings = [f"--config.{key}={shlex.quote(str(value))}" for key, value in asked.items()]
    first = f"python -m launch.sweep --config=configs/sweep.py:{shlex.quote(protocol['model']['name'])} --workdir=DIR"
    return " \\\n    ".join([first, *settings])
