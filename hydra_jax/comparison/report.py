"""A comparison of arms as text, as files, and as a section of the report's page."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from hydra_jax.analysis.bootstrap import Estimate
from hydra_jax.analysis.results import Results
from hydra_jax.comparison import figures as drawn
from hydra_jax.comparison.arms import MATTERS, MEASURES, OF_DIRECT, REFERENCE
from hydra_jax.comparison.run import Comparison
from hydra_jax.errors import UserError, reason
from hydra_jax.report import figures, templates
from hydra_jax.report import page as report
from hydra_jax.report.figures.style import SITE_NAMES
from hydra_jax.store import files

ABOUT_IT = "comparison.json"
TABLES = ("comparison", "recall", "by_layer")
FIGURES = {
    drawn.comparison: "Measures of self-repair by arm",
    drawn.emergence: "Recall and repair by step of training",
    drawn.by_layer: "Effects by ablated layer and arm",
}
"""The figures, and their descriptions for readers who cannot see them."""

LEARNT = 0.8
"""The share of the trained prompts from which facts count as learnt."""

REPAIRS = {"restored_share": "the restored share", "slope": "the slope"}
"""The measures that show repair where they are above zero."""

SHARES = (*OF_DIRECT, "responding")
ABOUT = (
    "Models that differ in dropout and seed alone: the same initial parameters, data and steps. In each model,"
    f" measures are taken over all ablated layers whose mean direct effect is at least {MATTERS:.0%} of the largest."
    " Intervals (95 %) resample seeds, prompts and replacements, the same in all models. With few seeds they are too"
    " narrow: an arm is said to differ only where a paired t-test over seeds says so as well, and of some twenty"
    " measures one may differ by chance."
)


def write(workdir: Path, comparison: Comparison, first: Results) -> list[Path]:
    """Write tables, figures and the page of one of the sweeps with the comparison as a section.

    Args:
      workdir: the directory they go into.
      comparison: the comparison.
      first: a sweep of it, which the page shows with the comparison.

    Returns:
      The paths that were written, the page last.
    """
    tables = dict(zip(TABLES, (comparison.table, comparison.recall, comparison.by_layer), strict=True))
    paths = report.write_tables(workdir, tables)
    for figure in FIGURES:
        paths += figures.save(workdir, figure.__name__, functools.partial(figure, comparison))
    paths.append(workdir / ABOUT_IT)
    about = json.dumps({"last": comparison.last, "prompts": comparison.prompts}) + "\n"
    files.write_text(paths[-1], about)
    return paths + report.write(workdir, first, comparison=section(workdir, comparison))


def read(workdir: Path) -> Comparison:
    """Read a comparison, but for the directories of its sweeps, from the files that `write` left.

    Raises:
      UserError: if they are not there or cannot be read.
    """
    if not (workdir / ABOUT_IT).is_file():
        raise UserError(f"{workdir}: holds no comparison; run `python -m launch.compare --workdir={workdir}` first")
    try:
        table, recall, by_layer = (pd.read_parquet(workdir / f"{name}.parquet") for name in TABLES)
        about = json.loads((workdir / ABOUT_IT).read_text("utf-8"))
        return Comparison(table, recall, int(about["last"]), by_layer, int(about["prompts"]), {})
    except Exception as error:  # pyarrow's are of many kinds
        raise UserError(f"{workdir}: cannot be read ({reason(error)}); compare into another --workdir") from error


def text(comparison: Comparison) -> str:
    """The measures at the last step, one table per ablated site: a line per measure, a column per arm."""
    tables = [
        f"{SITE_NAMES[site]} ablated\n"
        + pd.DataFrame(
            {arm: [_cell(name, rows.loc[[(arm, name)]].iloc[0]) for name in MEASURES] for arm in comparison.arms},
            list(MEASURES.values()),
        ).to_string()
        for site, rows in _by_site(comparison)
    ]
    return (
        f"{comparison.prompts} prompts that all models answer right, step {comparison.last}; in brackets 95 % intervals"
        f" over seeds, prompts and replacements;\n* clearly differs from {REFERENCE}\n\n" + "\n\n".join(tables)
    )


def paragraphs(comparison: Comparison) -> list[str]:
    """Sum up the comparison in words."""
    return list(filter(None, [*answer(comparison.final, comparison.arms), timing(comparison)]))


def _by_site(comparison: Comparison) -> list[tuple[str, pd.DataFrame]]:
    """The rows at the last step by arm and measure, for each ablated site."""
    groups = comparison.final.groupby("ablated", sort=False)
    return [(str(site), rows.set_index(["arm", "measure"])) for site, rows in groups]


def answer(table: pd.DataFrame, arms: Sequence[str]) -> list[str]:
    """Say whether self-repair needs dropout, from `arms.compared` at one step: one paragraph per ablated site."""
    paragraphs = []
    for site, rows in table[table["measure"] == "restored_share"].groupby("ablated", sort=False):
        chosen = rows.set_index("arm")
        parts = []
        for arm in arms:
            row = chosen.loc[arm]
            what = (
                "cannot be told, as the direct effect is not clearly above 0"
                if np.isnan(row["value"])
                else _estimate(row).text("{:.0%}")
            )
            if arm != REFERENCE and not np.isnan(row.get("difference", np.nan)):
                difference = " to ".join(f"{row[f'difference_{end}']:+.0%}" for end in ("low", "high"))
                what += f", {row['verdict']} ({row['difference']:+.0%}, {difference})"
            parts.append(f"{arm} {what}")
        paragraphs.append(
            f"Of what the ablation of {SITE_NAMES[str(site)]} takes away directly, the rest of the model restores"
            f" (below zero: takes away more): {'; '.join(parts)}."
        )
    return paragraphs


def timing(comparison: Comparison) -> str:
    """Say when recall is learnt and when repair appears, one sentence per arm; nothing where there is but one step."""
    if comparison.table["step"].nunique() < 2:
        return ""
    sentences = []
    for arm in comparison.arms:
        recall = comparison.recall[comparison.recall["arm"] == arm].groupby("step")["recall_trained"].mean()
        learnt = _since("answered right", recall.index[recall >= LEARNT], comparison)
        parts = [f"{LEARNT:.0%} of the trained prompts are {learnt}"]
        for site in comparison.table["ablated"].unique():
            for name, what in REPAIRS.items():
                rows = comparison.table[
                    (comparison.table["arm"] == arm)
                    & (comparison.table["ablated"] == site)
                    & (comparison.table["measure"] == name)
                ].sort_values("step")
                clear = rows["low"] > 0
                since = rows.loc[clear[::-1].cummin()[::-1], "step"]  # to the last
                parts.append(
                    f"{what} of ablated {SITE_NAMES[site]} is {_since('clearly above zero', since, comparison)}"
                )
        sentences.append(f"{arm}: {'; '.join(parts)}.")
    return " ".join(sentences)


def _since(what: str, steps: pd.Index | pd.Series, comparison: Comparison) -> str:
    """Say from which step on something is so, given the steps at which it is."""
    return f"{what} from step {steps.min()} on" if len(steps) else f"not {what} at step {comparison.last}"


def section(workdir: Path, comparison: Comparison) -> Markup:
    """Return a comparison as a section of the report's page, with the figures that stand in `workdir`."""
    sites = {
        SITE_NAMES[site]: {
            meaning: [_cell(name, rows.loc[[(arm, name)]].iloc[0]) for arm in comparison.arms]
            for name, meaning in MEASURES.items()
        }
        for site, rows in _by_site(comparison)
    }
    pictures = {
        alt: base64.b64encode((workdir / f"{figure.__name__}.png").read_bytes()).decode()
        for figure, alt in FIGURES.items()
    }
    return templates.render(
        "comparison.html",
        paragraphs=paragraphs(comparison),
        about=ABOUT,
        prompts=comparison.prompts,
        step=comparison.last,
        reference=REFERENCE,
        arms=comparison.arms,
        sites=sites,
        pictures=pictures,
    )


def _cell(measure: str, row: pd.Series) -> str:
    """A row of `_by_site` as text: the value with its interval, and whether it differs."""
    if pd.isna(row["value"]):
        return ""
    form = "{:.0%}" if measure in SHARES else "{:.1f}" if measure == "layers" else "{:.2f}"
    differs = "*" if row.get("verdict") in ("higher", "lower") else ""
    return _estimate(row).text(form) + differs


def _estimate(row: Any) -> Estimate:
    """The value and interval in a row of `arms.compared`."""
    return Estimate(row["value"], row["low"], row["high"])
