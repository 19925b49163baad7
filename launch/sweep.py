"""Sweep a model: the effects of ablating each layer, as a result store, a table and figures.

    python -m launch.sweep --config=configs/sweep.py:smollm2-135m --workdir=DIR

Stopped, by Ctrl-C or otherwise, the same command goes on where it was.
"""

import json
from pathlib import Path

import pandas as pd
from absl import flags
from ml_collections import config_flags

from hydra_jax import figures, runtime, stats, store
from hydra_jax.config import sweep_config
from hydra_jax.edits import Component
from hydra_jax.errors import UserError
from hydra_jax.run import run

CONFIG = config_flags.DEFINE_config_file("config", None, "what to sweep: configs/sweep.py:MODEL; see the file itself")
WORKDIR = flags.DEFINE_string("workdir", None, "directory for the results", required=True)
STRONGEST = 12


def main() -> None:
    config, workdir = sweep_config(CONFIG.value), Path(WORKDIR.value)
    if not WORKDIR.value:
        raise UserError("--workdir: is empty; give a directory for the results")
    effects = run(config, workdir)
    with store.directory(workdir):
        print_kept(pd.read_csv(workdir / "prompts.csv", keep_default_na=False))
    print(f"bootstrap intervals from {config.bootstrap:,} resamples ...", flush=True)
    summary = stats.summary(effects, config.bootstrap, config.seed)
    with store.directory(workdir):
        store.write_whole(workdir / "summary.csv", lambda part: summary.to_csv(part, index=False, float_format="%.6g"))
        paths = figures.draw(workdir, effects, summary)
    print_summary(summary, json.loads(effects.attrs["protocol"])["ablation"]["kind"])
    print(f"\nresults in {workdir}: {store.NAME} (xarray.open_zarr), summary.csv, prompts.csv")
    print(f"figures: {', '.join(path.name for path in paths)}")


def print_kept(prompts: pd.DataFrame) -> None:
    """How many prompts of each relation were examined, answered right and kept."""
    counts = prompts.groupby("relation").agg(
        examined=("kept", "size"), correct=("correct", "sum"), kept=("kept", "sum")
    )
    if len(counts) > 1:
        print(counts.sort_values("kept", ascending=False).to_string())
    print(
        f"{len(prompts):,} prompts examined, {counts['correct'].sum():,} answered right, {counts['kept'].sum():,} swept"
    )


def print_summary(summary: pd.DataFrame, kind: str) -> None:
    """The ablations with the strongest direct effect, and how much of it came back."""
    strongest = summary.nlargest(STRONGEST, "direct_effect").sort_index()
    shown = pd.DataFrame(
        {
            "ablated": [str(Component.named(row.layer, row.site, row.head)) for row in strongest.itertuples()],
            "direct effect": interval(strongest, "direct_effect"),
            "total effect": interval(strongest, "total_effect"),
            "restored": interval(strongest, "restored_share", "{:.0%}"),
            "by attention": strongest["attn_compensation"].map("{:+.2f}".format),
            "by MLPs": strongest["mlp_compensation"].map("{:+.2f}".format),
            "by final norm": strongest["norm_compensation"].map("{:+.2f}".format),
        }
    )
    print(f"\nthe {len(shown)} of {len(summary)} components with the largest direct effect under {kind} ablation:")
    print(
        "means over prompts in logits (95% interval); restored = 1 - total / direct, left out where direct may be 0\n"
    )
    print(shown.to_string(index=False))


def interval(table: pd.DataFrame, name: str, form: str = "{:.2f}") -> pd.Series:
    """A column with its interval, as text; empty where there is no value."""

    def text(value: float, low: float, high: float) -> str:
        return "" if pd.isna(value) else f"{form.format(value)} ({form.format(low)} to {form.format(high)})"

    columns = (table[column] for column in (name, f"{name}_low", f"{name}_high"))
    return pd.Series([text(*row) for row in zip(*columns, strict=True)], index=table.index)


if __name__ == "__main__":
    runtime.main(main, "sweep.py", "stopped; the same command goes on from what is finished")
