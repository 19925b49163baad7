"""A comparison of arms as text, as files, and as a section of the report's page."""

from __future__ import annotations

import base64
import functools
import html
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from hydra_jax.analysis.results import Results
from hydra_jax.comparison import figures as drawn
from hydra_jax.comparison.arms import MATTERS, MEASURES, OF_DIRECT, REFERENCE
from hydra_jax.comparison.run import Comparison
from hydra_jax.errors import UserError, reason
from hydra_jax.report import figures
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
"""What is drawn, and what is said of it to those who do not see it."""

LEARNT = 0.8
REPAIRS = {"restored_share": "the restored share", "slope": "the slope"}
"""What says that there is repair, where it is above zero."""

SHARES = (*OF_DIRECT, "responding")
ABOUT = (
    "Models that differ in dropout and seed alone: the same initial parameters, data and steps. In each, measures are"
    f" of the ablated layers together whose mean direct effect is at least {MATTERS:.0%} of the largest. Intervals"
    " (95 %) resample seeds, prompts and replacements, the same in all models. Of few seeds they are too narrow: an arm"
    " is said to differ only where a paired t-test over seeds says so as well, and of some twenty measures one may by"
    " chance."
)


def write(workdir: Path, found: Comparison, first: Results) -> list[Path]:
    """Write tables, figures, the section and the page of one of the sweeps; returns the paths, the page last.

    Args:
      workdir: where.
      found: the comparison.
      first: a sweep of it, which the page shows with the comparison.
    """
    tables = dict(zip(TABLES, (found.table, found.recall, found.by_layer), strict=True))
    paths = report.write_tables(workdir, tables)
    for figure in FIGURES:
        paths += figures.save(workdir, figure.__name__, functools.partial(figure, found))
    paths.append(workdir / ABOUT_IT)
    about = json.dumps({"last": found.last, "prompts": found.prompts}) + "\n"
    files.write_text(paths[-1], about)
    return paths + report.write(workdir, first, comparison=section(workdir, found))


def read(workdir: Path) -> Comparison:
    """A comparison from the files that `write` left; without the directories of its sweeps.

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


def text(found: Comparison) -> str:
    """The measures at the last step, a table an ablated site: a line a measure, a column an arm."""
    tables = [
        f"{SITE_NAMES[site]} ablated\n"
        + pd.DataFrame(
            {arm: [_shown(name, rows.loc[[(arm, name)]].iloc[0]) for name in MEASURES] for arm in found.arms},
            list(MEASURES.values()),
        ).to_string()
        for site, rows in _by_site(found)
    ]
    return (
        f"{found.prompts} prompts that all models answer right, step {found.last}; in brackets 95 % intervals over"
        f" seeds, prompts and replacements;\n* clearly differs from {REFERENCE}\n\n" + "\n\n".join(tables)
    )


def paragraphs(found: Comparison) -> list[str]:
    """What the comparison says in words."""
    return list(filter(None, [*answer(found.final, found.arms), timing(found)]))


def _by_site(found: Comparison) -> list[tuple[str, pd.DataFrame]]:
    """Of each ablated site, the rows at the last step by arm and measure."""
    groups = found.final.groupby("ablated", sort=False)
    return [(str(site), rows.set_index(["arm", "measure"])) for site, rows in groups]


def answer(table: pd.DataFrame, arms: Sequence[str]) -> list[str]:
    """Whether self-repair needs dropout, of `arms.compared` at one step: a sentence or two an ablated site."""
    paragraphs = []
    for site, rows in table[table["measure"] == "restored_share"].groupby("ablated", sort=False):
        chosen = rows.set_index("arm")
        parts = []
        for arm in arms:
            row = chosen.loc[arm]
            what = (
                "cannot be told, as the direct effect is not clearly above 0"
                if np.isnan(row["value"])
                else f"{row['value']:.0%} ({row['low']:.0%} to {row['high']:.0%})"
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


def timing(found: Comparison) -> str:
    """When recall is learnt and when repair appears, in a sentence an arm; nothing of a single step."""
    if found.table["step"].nunique() < 2:
        return ""
    sentences = []
    for arm in found.arms:
        recall = found.recall[found.recall["arm"] == arm].groupby("step")["recall_trained"].mean()
        learnt = _since("answered right", recall.index[recall >= LEARNT], found)
        parts = [f"{LEARNT:.0%} of the trained prompts are {learnt}"]
        for site in found.table["ablated"].unique():
            for name, what in REPAIRS.items():
                rows = found.table[
                    (found.table["arm"] == arm) & (found.table["ablated"] == site) & (found.table["measure"] == name)
                ].sort_values("step")
                clear = rows["low"] > 0
                since = rows.loc[clear[::-1].cummin()[::-1], "step"]  # to the last
                parts.append(f"{what} of ablated {SITE_NAMES[site]} is {_since('clearly above zero', since, found)}")
        sentences.append(f"{arm}: {'; '.join(parts)}.")
    return " ".join(sentences)


def _since(what: str, steps: pd.Index | pd.Series, found: Comparison) -> str:
    """From which of some steps on it is so."""
    return f"{what} from step {steps.min()} on" if len(steps) else f"not {what} at step {found.last}"


def section(workdir: Path, found: Comparison) -> str:
    """A section of HTML. Arms' names come from configs: they are escaped."""
    head = "".join(f'<th scope="col">{html.escape(arm)}</th>' for arm in ("", *found.arms))
    lines = []
    for site, rows in _by_site(found):
        lines.append(f'<tr><th colspan="{1 + len(found.arms)}" scope="rowgroup">{SITE_NAMES[site]} ablated</th></tr>')
        for name, meaning in MEASURES.items():
            cells = "".join(
                f"<td>{html.escape(_shown(name, rows.loc[[(arm, name)]].iloc[0]))}</td>" for arm in found.arms
            )
            lines.append(f'<tr><th scope="row">{html.escape(meaning)}</th>{cells}</tr>')
    said = "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in paragraphs(found))
    pictures = "".join(
        f'<img alt="{html.escape(alt)}" style="max-width:100%" src="data:image/png;base64,'
        f'{base64.b64encode((workdir / f"{figure.__name__}.png").read_bytes()).decode()}">'
        for figure, alt in FIGURES.items()
    )
    return (
        '<section aria-labelledby="arms-title"><h2 id="arms-title">Matched models, with dropout and without</h2>'
        f'{said}<p class="note">{html.escape(ABOUT)} {found.prompts} prompts, step'
        f" {found.last}; * clearly differs from {html.escape(REFERENCE)}.</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        f"{pictures}</section>"
    )


def _shown(measure: str, row: pd.Series) -> str:
    """Of a row of `_by_site`, the value with its interval."""
    form = "{:.0%}" if measure in SHARES else "{:.1f}" if measure == "layers" else "{:.2f}"
    differs = "*" if row.get("verdict") in ("higher", "lower") else ""
    low, high = form.format(row["low"]), form.format(row["high"])
    return "" if pd.isna(row["value"]) else f"{form.format(row['value'])} ({low} to {high}){differs}"
