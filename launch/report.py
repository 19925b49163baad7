"""Report on a finished sweep: findings with verdicts, tables, figures, and report.html, a page that opens offline.

    python -m launch.report --workdir=DIR

With sweeps of other kinds, or of heads, of the same model and prompts beside it:

    python -m launch.report --workdir=DIR --also=DIR/zero,DIR/mean,DIR/heads

With what launch.compare found of matched models, in a section of the page:

    python -m launch.report --workdir=DIR --comparison=DIR

With each component judged by the 2 % of prompts in which its direct effect is largest, in selected.csv:

    python -m launch.report --workdir=DIR --select=0.02
"""

from pathlib import Path

from absl import flags

from hydra_jax import runtime
from hydra_jax.limits import MOST_BOOTSTRAP, MOST_SEED

WORKDIR = flags.DEFINE_string("workdir", None, "directory of the sweep; the report goes into it", required=True)
ALSO = flags.DEFINE_list("also", [], "directories of sweeps of other kinds, or of heads, on the same prompts")
SELECT = flags.DEFINE_float(
    "select",
    None,
    "share of the prompts, e.g. 0.02: a table of each component in those of its largest direct effects",
    0,
    1,
)
COMPARISON = flags.DEFINE_string("comparison", None, "directory of a launch.compare, whose section joins the page")
BOOTSTRAP = flags.DEFINE_integer("bootstrap", 1000, "resamples behind each interval", 1, MOST_BOOTSTRAP)
SEED = flags.DEFINE_integer("seed", 0, "of the resamples", 0, MOST_SEED)


def main() -> None:
    from hydra_jax.analysis import results
    from hydra_jax.comparison import report as report_arms
    from hydra_jax.report import page as report
    from hydra_jax.report import tables
    from hydra_jax.store import files

    workdir = Path(WORKDIR.value)
    every = [
        results.load(Path(str(directory)), BOOTSTRAP.value, SEED.value, SELECT.value)
        for directory in (workdir, *filter(None, ALSO.value))
    ]
    print(f"{every[0].caption}; intervals from {BOOTSTRAP.value:,} resamples", flush=True)
    beside = results.beside(every[0], every[1:])
    compared = Path(COMPARISON.value) if COMPARISON.value else None
    with files.directory(workdir):
        section = report_arms.section(compared, report_arms.read(compared)) if compared else ""
        paths = report.write(workdir, every[0], *beside, progress=True, comparison=section)
    print(f"\n{tables.findings(every[0])}\n\n{len(paths)} files, the page to open: {paths[-1]}")


if __name__ == "__main__":
    runtime.main(main)
