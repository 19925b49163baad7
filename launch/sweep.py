"""Sweep a model: the effects of ablating each layer, as a result store, tables, figures and a page.

    python -m launch.sweep --config=configs/sweep.py:smollm2-135m --workdir=DIR

One prompt by itself, with replacements from the built-in facts:

    python -m launch.sweep --prompt="The Eiffel Tower is located in the city of" --workdir=DIR

Stopped, by Ctrl-C or otherwise, the same command goes on where it was.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from hydra_jax import runtime
from hydra_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "what to sweep: configs/sweep.py:MODEL")
PROMPT = flags.DEFINE_string("prompt", None, "one prompt to sweep by itself: short for --config.prompts.text")
REPORT = flags.DEFINE_bool("report", True, "end with tables, figures and the page; launch.report makes them later")
WORKDIR = flags.DEFINE_string("workdir", None, "directory for the results", required=True)
flags.adopt_module_key_flags(runtime)  # those of several processes, for --help


def main() -> None:
    import pandas as pd

    from hydra_jax.analysis import results
    from hydra_jax.config import sweep_config
    from hydra_jax.engine.cluster import Cluster
    from hydra_jax.report import page as report
    from hydra_jax.report import tables
    from hydra_jax.store import effects as store
    from hydra_jax.store import files
    from hydra_jax.sweep.run import run

    if PROMPT.value is not None:
        if not PROMPT.value.strip():
            raise UserError("--prompt: is empty; give a text whose next token is to be explained")
        CONFIG.value.prompts.text = PROMPT.value
    config, workdir = sweep_config(CONFIG.value), Path(WORKDIR.value)
    if not WORKDIR.value:
        raise UserError("--workdir: is empty; give a directory for the results")
    run(config, workdir)
    if not Cluster.joined().first:
        return
    runtime.part()
    if not REPORT.value:
        print(f"results in {workdir}: {store.NAME} (xarray.open_zarr); python -m launch.report --workdir={workdir}")
        return
    finished = results.load(workdir, config.bootstrap, config.seed)
    if not config.prompts.text:
        print(tables.kept(pd.read_csv(workdir / "prompts.csv", keep_default_na=False)))
    print(f"tables and figures, intervals from {config.bootstrap:,} resamples ...", flush=True)
    with files.directory(workdir):
        paths = report.write(workdir, finished, progress=True)
    if config.prompts.text:
        print(f"\n{tables.one_prompt(finished)}")
    else:
        print(f"\n{tables.strongest(finished)}\n\nthe paper's findings in this model:\n\n{tables.findings(finished)}")
    for asked, table in ((finished.interactions, tables.pairs), (finished.cascade, tables.cuts)):
        if asked is not None:
            print(f"\n{table(finished)}")
    print(f"\nresults in {workdir}: {store.NAME} (xarray.open_zarr), tables, figures")
    print(f"the page to open: {paths[-1]}")


if __name__ == "__main__":
    runtime.main(main, "sweep.py", "stopped; the same command goes on from what is finished", several=True)
