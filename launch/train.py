"""Train a model with dropout or without, on biographies of invented people or on text files.

    python -m launch.train --config=configs/train.py:no_dropout --workdir=DIR
    python -m launch.train --config=configs/train.py:dropout --workdir=DIR --config.seed=1

On several hosts the same command is run on each, by SLURM or Open MPI, or with --coordinator, --processes and
--process; the batch is spread over all devices.

Stopped, by Ctrl-C, SIGTERM or otherwise, the same command goes on from the last checkpoint. The directory
is a model like any other: python -m launch.sweep --config.model=DIR --config.prompts.path=DIR/prompts.jsonl.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from hydra_jax import runtime
from hydra_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "what to train: configs/train.py:ARM,PRESET")
WORKDIR = flags.DEFINE_string("workdir", None, "directory for the run", required=True)
flags.adopt_module_key_flags(runtime)  # those of several processes, for --help


def main() -> None:
    import jax

    from hydra_jax.report import figures
    from hydra_jax.report.figures.training import training_curves
    from hydra_jax.store import files
    from hydra_jax.training.config import train_config
    from hydra_jax.training.loop import Stopped, train
    from hydra_jax.training.workdir import PROMPTS, read_metrics

    if not WORKDIR.value:
        raise UserError("--workdir: is empty; give a directory for the run")
    config, workdir = train_config(CONFIG.value), Path(WORKDIR.value)
    try:
        train(config, workdir, progress=jax.process_index() == 0)
    except Stopped as stopped:
        print(f"\nstopped; step {stopped.step} is saved, the same command goes on from it", file=sys.stderr)
        sys.exit(128 + stopped.signal)
    if jax.process_index():
        return
    with files.directory(workdir):
        figures.save(workdir, "training", lambda: training_curves(config, read_metrics(workdir)))
    print(f"trained: {workdir} (figure: training.png; lines of metrics.jsonl)")
    prompts = workdir / PROMPTS
    asked = f" --config.prompts.path={prompts}" if prompts.is_file() else ""
    print(f"sweep it: python -m launch.sweep --config.model={workdir}{asked} --workdir=DIR")


if __name__ == "__main__":
    runtime.main(main, "train.py", "stopped; the same command goes on from the last checkpoint", several=True)
