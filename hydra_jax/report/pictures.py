"""The figures that the page holds as pictures: those of what only some sweeps ask for."""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

from hydra_jax.analysis import cascades
from hydra_jax.analysis.results import Results
from hydra_jax.report import figures
from hydra_jax.report.figures.style import styled


class Picture(NamedTuple):
    """A figure as a section of the page.

    Attributes:
      name: of the figure, as its files are called.
      title: its heading.
      caption: how to read it.
      alt: its numbers in a sentence, for who cannot see it.
      png: base64.
    """

    name: str
    title: str
    caption: str
    alt: str
    png: str


TEXTS = {
    "sets": (
        "Ablated by themselves and together",
        "Direct and total effect of each ablation, several components at once among them, and the share of the direct"
        " effect that is restored. Whiskers are 95 % intervals.",
    ),
    "interactions": (
        "Two ablations at once",
        "Left: the total effect of both together less each one's alone. Red: each was hiding what the other is worth,"
        " as a component and its repairer do; blue: they cost the same loss twice. Right: the change of a component's"
        " contribution when the other alone is ablated; red, it wakes up.",
    ),
    "cascade": (
        "Cascades",
        "The strongest attention is cut, then whoever repairs most, and so on. Left and middle: what is left of the"
        " answer after each cut; right: who moved then, red repairs.",
    ),
    "frozen_against_free": (
        "With repairers frozen, and free",
        "The total effect of each ablation with some components held at what they do in the clean run, beside that with"
        " everything free. Above the diagonal, what is frozen would have repaired.",
    ),
    "head_responders": (
        "Heads that respond",
        "Mean change of every head's contribution under each of the strongest ablations: red repairs, blue erodes.",
    ),
    "positions": (
        "Effects along the text",
        "Direct and total effect of the strongest ablations, by the last token read or, of many texts, by tenths of"
        " their length.",
    ),
}
"""Titles and captions."""


def pictures(results: Results) -> list[Picture]:
    """Draw the figures of what only some sweeps ask for, in the order of the page."""
    drawn = figures.figures_of(results)
    made = []
    for name in figures.OPTIONAL:
        if name not in drawn:
            continue
        buffer = io.BytesIO()
        styled(drawn[name])().savefig(buffer, format="png", dpi=130)
        png = base64.b64encode(buffer.getvalue()).decode()
        made.append(Picture(name, *TEXTS[name], _alt(name, results), png))
    return made


def _alt(name: str, results: Results) -> str:
    """Return what a figure shows in a sentence."""
    rows = results.summary.to_dict("records")
    match name:
        case "sets":
            best = max(rows, key=lambda row: row["total_effect"])
            return (
                f"Bars of {len(rows)} ablations; {best['name']} has the largest total effect,"
                f" {best['total_effect']:.2f} logits, and a direct effect of {best['direct_effect']:.2f}."
            )
        case "interactions" if results.interactions is not None:
            row = results.interactions.iloc[0]
            return (
                f"Matrices of {len(results.interactions)} pairs; the largest interaction is that of {row['first']} and"
                f" {row['second']}, {row['interaction']:+.2f} logits."
            )
        case "cascade" if results.cascade is not None:
            first, last = results.cascade.iloc[0], results.cascade.iloc[-1]
            survived = cascades.survival(results.effects, results.resampled.draws)["mean"]
            return (
                f"Curves: after {int(last['cuts'])} cuts the mean logit has gone from {first['logit']:.2f} to"
                f" {last['logit']:.2f}; answers survive {survived.text()} cuts on average."
            )
        case "frozen_against_free":
            best = max(rows, key=lambda row: abs(row["frozen_gain"]))
            return (
                f"Bars and points; the freeze changes most what {best['name']} costs: from"
                f" {best['free_total_effect']:.2f} to {best['total_effect']:.2f} logits."
            )
        case _:
            best = max(rows, key=lambda row: row["direct_effect"])
            return f"{TEXTS[name][0]}: the strongest ablation is {best['name']}."
