"""Compare training runs that differ in dropout (and seed) alone: does self-repair need it?

    python -m launch.compare --workdirs=runs/no_dropout,runs/dropout --workdir=DIR
    python -m launch.compare --workdirs='runs/arms/*' --workdir=DIR

Every layer of every model is ablated on the prompts that all of them answer right, at every step of
training that all have a checkpoint of. Into DIR go comparison.csv (and .parquet), figures, the sweeps, and
report.html. Stopped, the same command goes on where it was.
"""

import textwrap
from pathlib import Path

from absl import flags

from hydra_jax import runtime
from hydra_jax.errors import UserError
from hydra_jax.limits import MOST_BOOTSTRAP, MOST_SEED

WORKDIRS = flags.DEFINE_list(
    "workdirs", None, "directories of training runs, or patterns of them: arms and seeds", required=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "directory for the comparison", required=True)
STEPS = flags.DEFINE_list("steps", [], "of training, the last is where arms are compared; all that the runs share")
LIMIT = flags.DEFINE_integer("prompts", 128, "prompts of a sweep; 0 for all that every model knows", lower_bound=0)
FROM_LAYER = flags.DEFINE_integer("from_layer", 0, "leave ablated layers before it out of the measures", lower_bound=0)
REPLACEMENTS = flags.DEFINE_integer("replacements", 15, "replacements of an ablation", lower_bound=1)
BOOTSTRAP = flags.DEFINE_integer("bootstrap", 1000, "resamples behind each interval", 1, MOST_BOOTSTRAP)
SEED = flags.DEFINE_integer("seed", 0, "of replacements and resamples", 0, MOST_SEED)


def main() -> None:
    from hydra_jax.analysis import results
    from hydra_jax.comparison import report as report_arms
    from hydra_jax.comparison import run as compare
    from hydra_jax.report import tables
    from hydra_jax.store import files

    try:
        steps = [int(step) for step in STEPS.value]
    except ValueError:
        raise UserError(f"--steps: {','.join(STEPS.value)!r} is not numbers; give e.g. 200,400,1000") from None
    if not WORKDIR.value:
        raise UserError("--workdir: is empty; give a directory for the comparison")
    workdir = Path(WORKDIR.value)
    runs = compare.read_runs(compare.find(WORKDIRS.value), unfinished=bool(steps))
    layers = runs[0].config.model.layers
    if FROM_LAYER.value >= layers:
        raise UserError(f"--from_layer: is {FROM_LAYER.value}, the models have layers 0-{layers - 1}; name one of them")
    with files.directory(workdir):
        comparison = compare.compare(
            runs,
            workdir,
            compare.common_steps(runs, steps),
            limit=LIMIT.value,
            replacements=REPLACEMENTS.value,
            samples=BOOTSTRAP.value,
            seed=SEED.value,
            from_layer=FROM_LAYER.value,
        )
        print("tables, figures and the page ...", flush=True)
        first = results.load(next(iter(comparison.sweeps.values())), BOOTSTRAP.value, SEED.value)
        paths = report_arms.write(workdir, comparison, first)
    said = "\n".join(textwrap.fill(paragraph, tables.WIDTH) for paragraph in report_arms.paragraphs(comparison))
    print(f"\n{report_arms.text(comparison)}\n\n{said}\n\n{len(paths)} files, the page to open: {paths[-1]}")


if __name__ == "__main__":
    runtime.main(main, on_interrupt="stopped; the same command goes on from what is finished")
