"""A sweep's results as text, which commands print."""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd

from hydra_jax.analysis import names
from hydra_jax.analysis.bootstrap import Estimate
from hydra_jax.analysis.results import Results
from hydra_jax.errors import UserError

STRONGEST = 12
WIDTH = 110


def kept(prompts: pd.DataFrame) -> str:
    """Count the prompts of each relation that were examined, answered right and kept; `prompts` as in prompts.csv."""
    counts = prompts.groupby("relation").agg(
        examined=("kept", "size"), correct=("correct", "sum"), kept=("kept", "sum")
    )
    table = counts.sort_values("kept", ascending=False).to_string() + "\n" if len(counts) > 1 else ""
    return (
        f"{table}{len(prompts):,} prompts examined, {counts['correct'].sum():,} answered right,"
        f" {counts['kept'].sum():,} swept"
    )


def strongest(results: Results) -> str:
    """The ablations with the strongest direct effect, and the share of it that was restored."""
    summary = results.summary
    chosen = summary.nlargest(STRONGEST, "direct_effect").sort_index()
    shown = pd.DataFrame(
        {
            "ablated": chosen["name"],
            "direct effect": interval(chosen, "direct_effect"),
            "total effect": interval(chosen, "total_effect"),
            **({"nothing frozen": interval(chosen, "free_total_effect")} if "free_total_effect" in chosen else {}),
            "restored": interval(chosen, "restored_share", "{:.0%}"),
            "by attention": chosen["attn_compensation"].map("{:+.2f}".format),
            "by MLPs": chosen["mlp_compensation"].map("{:+.2f}".format),
            "by final norm": chosen["norm_compensation"].map("{:+.2f}".format),
        }
    )
    return (
        f"the {len(shown)} of {len(summary)} components with the largest direct effect under {results.kind} ablation:\n"
        "means over prompts in logits (95% interval); restored = 1 - total / direct, left out where direct is not"
        " clearly above 0\n\n" + shown.to_string(index=False)
    )


def one_prompt(results: Results) -> str:
    """The one prompt of a sweep: components downstream of the strongest attention layer, before and after its ablation.

    Raises:
      UserError: if the sweep has no examples.
    """
    if results.examples is None or not results.examples.sizes["example"]:
        raise UserError("examples.zarr: is not there; run the sweep again, it goes on from what is finished")
    example = results.examples.isel(example=0)
    ablated = names.ablation(names.example_name(example))
    first, single = ablated.components[0], ablated.single
    what = "components" if single is None else "attention layer" if single.head < 0 else "attention head"
    before, after = example["delta_unembed"].values, example["ablated_unembed"].mean("replacement").values
    table = pd.DataFrame({"component": results.component_names, "before": before, "after": after})
    table["change"] = table["after"] - table["before"]
    direct, total, norm = (
        float(example[name].mean()) for name in ("direct_effect", "total_effect", "norm_compensation")
    )
    text = textwrap.shorten(example["text"].item(), WIDTH, placeholder=" ...")
    foil = example["foil_text"].item() if "foil_text" in example.coords else ""
    read = example["target_text"].item() + (f" less{foil}" if foil else "")
    return (
        f"{text} ->{read} (p = {example['clean_probability'].item():.2f})\n"
        f"{results.kind} ablation of {ablated}, the {what} of the largest direct"
        f" effect, mean over {example.sizes['replacement']} replacements; contributions in logits:\n\n"
        + table.iloc[first.index :].to_string(index=False, float_format="{:+.3f}".format)
        + f"\n\ndirect effect {direct:.3f}, total effect {total:.3f}; the final norm restores {norm:+.3f};"
        f" components before {first} do not change"
    )


def pairs(results: Results) -> str:
    """The pairs of ablations that are most more, or less, than their sum."""
    assert results.interactions is not None
    chosen = results.interactions.head(STRONGEST)
    shown = pd.DataFrame(
        {
            "both": chosen["first"] + " + " + chosen["second"],
            "interaction": interval(chosen, "interaction", "{:+.2f}"),
            "together": chosen["joint_effect"].map("{:.2f}".format),
            "the first": chosen["first_effect"].map("{:.2f}".format),
            "the second": chosen["second_effect"].map("{:.2f}".format),
            "the second after the first": chosen["effect_after"].map("{:.2f}".format),
        }
    )
    return (
        f"the {len(shown)} of {len(results.interactions)} pairs with the largest interaction: the total effect of both"
        " together,\nin logits, less that of each alone (95% interval)\n\n" + shown.to_string(index=False)
    )


def cuts(results: Results) -> str:
    """The remains of the answer after each cut of a cascade."""
    assert results.cascade is not None
    table = results.cascade
    shown = pd.DataFrame(
        {
            "cuts": table["cuts"],
            "prompts cut": table["prompts"],
            "logit": interval(table, "logit"),
            "probability": interval(table, "probability"),
            "answer survives": interval(table, "survives", "{:.0%}"),
        }
    )
    return (
        "the strongest attention cut, then what repaired it most, and so on; a prompt in which nothing repairs any\n"
        "more stays as it is (means over prompts, 95% interval)\n\n" + shown.to_string(index=False)
    )


def findings(results: Results) -> str:
    """The findings and their verdicts, one paragraph each."""
    paragraphs = [
        f"{number}. {finding.title}: {finding.verdict}\n"
        + textwrap.fill(finding.measured, WIDTH, initial_indent="   ", subsequent_indent="   ")
        for number, finding in enumerate(results.findings, 1)
    ]
    return "\n".join(paragraphs)


def interval(table: pd.DataFrame, name: str, form: str = "{:.2f}") -> pd.Series:
    """Return a column with its interval, as text; empty where there is no finite value."""
    texts = [
        Estimate.in_row(row, name).text(form) if np.isfinite(row[name]) else "" for row in table.to_dict("records")
    ]
    return pd.Series(texts, index=table.index)
