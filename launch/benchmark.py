"""Measure the kernels on this machine, print a table and write it as JSON.

python -m launch.benchmark
python -m launch.benchmark --config=configs/benchmark.py:random-1b --config.dtype=bfloat16
"""

import dataclasses
import json
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from hydra_jax import benchmark, load, runtime
from hydra_jax.models.transformer import init_params
from hydra_jax.plan import default_rows

CONFIG = config_flags.DEFINE_config_file("config", None, "what to measure: configs/benchmark.py:MODEL; see the file")
OUTPUT = flags.DEFINE_string("output", "runs/benchmark.json", "where to write the figures")


def main() -> None:
    config = CONFIG.value
    switches = {"dtype": config.dtype, "precision": config.precision}
    if config.model in benchmark.SHAPES:
        shape = dataclasses.replace(benchmark.SHAPES[config.model], **switches)
        params = jax.jit(init_params, static_argnums=0)(shape, jax.random.key(0))
    else:
        params = load(config.model, **switches).params
    on = benchmark.machine()
    print(f"{config.model}, {config.dtype}, {on['devices']} x {on['device']} ({on['backend']})", flush=True)
    rows = []
    for length in config.lengths:
        print(f"measuring {length} tokens ...", flush=True)
        rows.append(benchmark.measure(params, length, config.rows or default_rows(), config.draws, config.step))
    print(f"\n{benchmark.table(rows)}\n")
    print("ratio: kernel to GEMM; forwards/s: interventions by batched whole forward passes; speed-up over them")
    output = Path(OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    figures = {"machine": on, "config": config.to_dict(), "figures": [dataclasses.asdict(row) for row in rows]}
    output.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    runtime.main(main, "benchmark.py")
