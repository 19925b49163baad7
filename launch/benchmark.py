"""Measure the kernels on this machine or beside other libraries, a step of training, or the memory of loading.

Prints a table and writes JSON.

python -m launch.benchmark
python -m launch.benchmark --config=configs/benchmark.py:random-1b --config.dtype=bfloat16
python -m launch.benchmark --peers
python -m launch.benchmark --training=tiny
python -m launch.benchmark --loading

--peers wants a machine that does nothing else: by default PyTorch's threads spin while they wait for one another, which
made peers ten times slower on two busy cores. With OMP_WAIT_POLICY=PASSIVE in the environment they sleep instead.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from configs import train
from hydra_jax import benchmark, load, loading, peers, runtime
from hydra_jax.memory import default_rows
from hydra_jax.models.transformer import Params, init_params
from hydra_jax.training import benchmark as steps
from hydra_jax.training.config import train_config

CONFIG = config_flags.DEFINE_config_file("config", None, "what to measure: configs/benchmark.py:MODEL; see the file")
LOADING = flags.DEFINE_bool("loading", False, "measure the memory of loading instead: 3 GB on disk, 5 of memory")
TRAINING = flags.DEFINE_enum("training", None, list(train.PRESETS), "measure a preset's step of training instead")
PEERS = flags.DEFINE_bool("peers", False, "compare with TransformerLens and PyTorch forward hooks instead, on the CPU")
OUTPUT = flags.DEFINE_string("output", None, "where to write figures: runs/{benchmark,training,loading,peers}.json")


def main() -> None:
    if LOADING.value:
        measure_loading()
    elif TRAINING.value:
        measure_training()
    elif PEERS.value:
        measure_peers()
    else:
        measure_kernels()


def measure_kernels() -> None:
    config = CONFIG.value
    params = model_params()
    on = benchmark.machine()
    print(f"{config.model}, {config.dtype}, {on['devices']} x {on['device']} ({on['backend']})", flush=True)
    rows = []
    for length in config.lengths:
        print(f"measuring {length} tokens ...", flush=True)
        rows.append(benchmark.measure(params, length, config.rows or default_rows(), config.draws, config.step))
    print(f"\n{benchmark.table(rows)}\n")
    print("ratio: kernel to GEMM; forwards/s: interventions by batched whole forward passes; speed-up over them")
    write("runs/benchmark.json", {"machine": on, "config": config.to_dict(), "figures": as_dicts(rows)})


def measure_peers() -> None:
    config, on = CONFIG.value, benchmark.machine()
    params = model_params()
    peers.check_comparable(params.config)
    found, missing = peers.installed(params, max(config.peer_lengths))
    print("\n".join([f"{config.model}, {on['device']}", *missing]), flush=True)
    rows = []
    for length in config.peer_lengths:
        print(f"measuring {length} tokens ...", flush=True)
        rows += peers.measure(params, found, length, config.rows or default_rows(), config.draws, config.step)
    print(f"\n{peers.table(rows)}\n")
    print("hydra_jax: interventions/s with clean runs; ratio: to the peer's; difference: of total effects, in logits")
    write("runs/peers.json", {"machine": on, "config": config.to_dict(), "figures": as_dicts(rows)})


def model_params() -> Params:
    config = CONFIG.value
    switches = {"dtype": config.dtype, "precision": config.precision}
    if config.model not in benchmark.SHAPES:
        return load(config.model, **switches).params
    shape = dataclasses.replace(benchmark.shape(config.model, config.layers), **switches)
    return jax.jit(init_params, static_argnums=0)(shape, jax.random.key(0))


def measure_training() -> None:
    on, rows = benchmark.machine(), []
    print(f"{TRAINING.value}, {on['devices']} x {on['device']} ({on['backend']})", flush=True)
    for arm in train.ARMS:
        print(f"measuring {arm} ...", flush=True)
        rows.append(steps.measure(train_config(train.get_config(f"{arm},{TRAINING.value}"))))
    print(f"\n{steps.table(rows)}\n")
    print("ratio: of a step's matrix products to bare ones")
    write("runs/training.json", {"machine": on, "figures": as_dicts(rows)})


def measure_loading() -> None:
    print(
        f"loading Llama checkpoints of {loading.LAYERS[0]} and {loading.LAYERS[1]} layers in bfloat16 ...", flush=True
    )
    rows = list(loading.measure())
    fitted = loading.line(rows[0], rows[1])
    print(f"\n{loading.table(rows, fitted)}\n")
    write("runs/loading.json", {"line": dataclasses.asdict(fitted), "figures": as_dicts(rows)})


def as_dicts(rows: Sequence[Any]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(row) for row in rows]


def write(default: str, figures: dict[str, Any]) -> None:
    output = Path(OUTPUT.value or default)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    runtime.main(main, "benchmark.py")
