"""A comparison of arms as text, as files, and as a section of the report's page."""

from __future__ import annotations

import base64
import functools
import html
from pathlib import Path

import pandas as pd

from hydra_jax import figures, report, store
from hydra_jax.arms import MATTERS, MEASURES, REFERENCE
from hydra_jax.compare import Comparison
from hydra_jax.errors import UserError
from hydra_jax.figures import arms as drawn
from hydra_jax.results import Results

SECTION = "comparison.html"
"""The section by itself, which `launch.report --comparison` takes up into a page."""

SHARES = ("restored_share", "attn_share", "mlp_share", "norm_share", "erasure_change", "responding")
ABOUT = (
    "Models that differ in dropout and seed alone: the same initial parameters, data and steps. In each, every"
    f" attention layer is ablated whose mean direct effect is at least {MATTERS:.0%} of the largest; measures are of"
    " these together. Intervals (95 %) resample seeds, prompts and replacements, the same in all models; of few seeds"
    " they are too narrow rather than too wide."
)


def write(workdir: Path, found: Comparison, first: Results) -> list[Path]:
    """Write tables, figures, the section and the page of one of the sweeps; returns the paths, the page last.

    Args:
      workdir: where.
      found: the comparison.
      first: a sweep of it, which the page shows with the comparison.
    """
    paths = []
    for name, table in {"comparison": found.table, "recall": found.recall, "by_layer": found.by_layer}.items():
        for form, save in (
            ("csv", functools.partial(table.to_csv, index=False, float_format="%.6g")),
            ("parquet", functools.partial(table.to_parquet, index=False)),
        ):
            paths.append(workdir / f"{name}.{form}")
            store.write_whole(paths[-1], save)
    paths += figures.save(workdir, "comparison", lambda: drawn.comparison(found))
    paths += figures.save(workdir, "by_layer", lambda: drawn.by_layer(found))
    paths += figures.save(workdir, "emergence", lambda: drawn.emergence(found))
    paths.append(workdir / SECTION)
    whole = section(workdir, found)
    store.write_whole(paths[-1], functools.partial(Path.write_text, data=whole, encoding="utf-8"))
    return paths + report.write(workdir, first, comparison=whole)


def read_section(workdir: Path) -> str:
    """The section that a comparison in `workdir` left.

    Raises:
      UserError: if there is none.
    """
    path = workdir / SECTION
    if not path.is_file():
        raise UserError(f"{path}: is not there; run `python -m launch.compare --workdir={workdir}` first")
    return path.read_text("utf-8")


def text(found: Comparison) -> str:
    """The measures at the last step, a line a measure, a column an arm."""
    table = found.final.assign(shown=[_shown(row) for row in found.final.to_dict("records")])
    wide = table.pivot_table(index="measure", columns="arm", values="shown", aggfunc="first")
    wide = wide.loc[list(MEASURES), found.arms].rename(index=MEASURES)
    wide.index.name = wide.columns.name = None
    return (
        f"{found.prompts} prompts that all models answer right, step {found.last}; in brackets 95 % intervals over"
        f" seeds, prompts and replacements;\n* clearly differs from {REFERENCE}\n\n{wide.to_string()}"
    )


def section(workdir: Path, found: Comparison) -> str:
    """A section of HTML. Arms' names come from configs: they are escaped."""
    head = "".join(f'<th scope="col">{html.escape(arm)}</th>' for arm in ("", *found.arms))
    rows = []
    for name, meaning in MEASURES.items():
        chosen = found.final[found.final["measure"] == name].set_index("arm")
        cells = "".join(f"<td>{html.escape(_shown(chosen.loc[arm].to_dict()))}</td>" for arm in found.arms)
        rows.append(f'<tr><th scope="row">{html.escape(meaning)}</th>{cells}</tr>')
    pictures = "".join(
        f'<img alt="{html.escape(alt)}" style="max-width:100%" src="data:image/png;base64,'
        f'{base64.b64encode((workdir / f"{name}.png").read_bytes()).decode()}">'
        for name, alt in {
            "comparison": "Measures of self-repair by arm",
            "emergence": "Recall and repair by step of training",
            "by_layer": "Effects by ablated layer and arm",
        }.items()
    )
    return (
        '<section aria-labelledby="arms-title"><h2 id="arms-title">Matched models, with dropout and without</h2>'
        f'<p>{html.escape(found.answer)}</p><p class="note">{html.escape(ABOUT)} {found.prompts} prompts, step'
        f" {found.last}; * clearly differs from {html.escape(REFERENCE)}.</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        f"{pictures}</section>"
    )


def _shown(row: dict) -> str:
    form = "{:.0%}" if row["measure"] in SHARES else "{:.2f}"
    differs = "*" if row.get("verdict") in ("higher", "lower") else ""
    low, high = form.format(row["low"]), form.format(row["high"])
    return "" if pd.isna(row["value"]) else f"{form.format(row['value'])} ({low} to {high}){differs}"
