"""Measure the rate of ablations on this machine, or one of the other things below; print a table and write JSON.

    python -m launch.benchmark
    python -m launch.benchmark --shape=llama-7b --config.dtype=bfloat16
    python -m launch.benchmark --shape=llama-7b --config.dtype=bfloat16 --sweep=1209 --sites=attn
    python -m launch.benchmark --shape=llama-7b --config.dtype=bfloat16 --sweep=1209 --stream=8 --config.rows=4096
    python -m launch.benchmark --sweep=102 --sites=attn --pairs --metrics=log_probability,kl
    python -m launch.benchmark --devices=1,2
    python -m launch.benchmark --peers
    python -m launch.benchmark --training=tiny
    python -m launch.benchmark --loading

--sweep makes a whole sweep of so many prompts, of the first of config.lengths, and says where its time goes. --stream
makes it with layers that come out of this host's memory one after another, too, on devices of so many GB; random
weights are made layer by layer then. Blocks of fewer rows leave room for more prompts, for which layers are read once.
--pairs makes it with every pair of its components, too, and --metrics with readings of the whole distribution.
--devices measures how rates grow with devices, and counts what passes between them; config.mesh.model of them share
the model.
--peers wants a machine that does nothing else: by default PyTorch's threads spin while they wait for one another, which
made peers ten times slower on two busy cores. With OMP_WAIT_POLICY=PASSIVE in the environment they sleep instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_flags

from configs import train
from hydra_jax import runtime
from hydra_jax.errors import UserError
from hydra_jax.models.shapes import SHAPES, shape

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from hydra_jax.benchmarks.sweep import Swept
    from hydra_jax.models.config import ModelConfig
    from hydra_jax.models.transformer import Params

CONFIG = config_flags.DEFINE_config_file("config", None, "what to measure: configs/benchmark.py:MODEL")
SHAPE = flags.DEFINE_string(
    "shape", None, f"random weights of a published shape, or a config.json: one of {', '.join(SHAPES)}"
)
SWEEP = flags.DEFINE_integer("sweep", None, "measure a whole sweep instead, of so many prompts", lower_bound=2)
STREAM = flags.DEFINE_float(
    "stream", None, "make that sweep with layers from host memory, too, on devices of so many GB", lower_bound=1e-3
)
SITES = flags.DEFINE_string("sites", "attn,mlp", "of that sweep, as --config.ablation.sites of launch.sweep")
PAIRS = flags.DEFINE_bool("pairs", False, "make that sweep with every pair of components, too")
METRICS = flags.DEFINE_string("metrics", "", "make that sweep with metrics, too, as --config.readout.metrics")
TRACE = flags.DEFINE_string("trace", None, "directory for a profile of that sweep, for Perfetto or TensorBoard")
DEVICES = flags.DEFINE_list("devices", None, "measure scaling over so many devices instead, as in 1,2,4")
LOADING = flags.DEFINE_bool("loading", False, "measure the memory of loading instead: 3 GB on disk, 5 of memory")
TRAINING = flags.DEFINE_enum("training", None, list(train.PRESETS), "measure a preset's step of training instead")
PEERS = flags.DEFINE_bool("peers", False, "compare with TransformerLens and PyTorch forward hooks instead, on the CPU")
OUTPUT = flags.DEFINE_string("output", None, "where to write figures: runs/{benchmark,sweep,devices,...}.json")


def main() -> None:
    asked: dict[str, tuple[Callable[[], None], Any]] = {
        "--loading": (measure_loading, LOADING.value),
        "--training": (measure_training, TRAINING.value),
        "--peers": (measure_peers, PEERS.value),
        "--sweep": (functools.partial(measure_sweep, SWEEP.value or 0), SWEEP.value),
        "--devices": (functools.partial(measure_devices, DEVICES.value or []), DEVICES.value),
    }
    chosen = [name for name, (_, value) in asked.items() if value]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)}: are different things to measure; ask for one at a time")
    for name, value in (("--stream", STREAM.value), ("--pairs", PAIRS.value), ("--metrics", METRICS.value)):
        if value and not SWEEP.value:
            raise UserError(f"{name}: is of a sweep; give --sweep, a number of prompts, beside it")
    (asked[chosen[0]][0] if chosen else measure_kernels)()


def measure_kernels() -> None:
    from hydra_jax.benchmarks import kernels
    from hydra_jax.engine.memory import default_rows

    config = CONFIG.value
    params, on = model_params(), start()
    rows = []
    for length in config.lengths:
        print(f"measuring {length} tokens ...", flush=True)
        rows.append(kernels.measure(params, length, config.rows or default_rows(), config.draws, config.step))
    print(f"\n{kernels.table(rows)}\n")
    print("kernel: rows through layers; ratio: to GEMM")
    print("forwards/s: interventions by batched whole forward passes; speed-up over them")
    write("benchmark", {"machine": on, "config": config.to_dict(), "figures": as_dicts(rows)})


def measure_sweep(prompts: int) -> None:
    import jax

    from hydra_jax.benchmarks import sweep
    from hydra_jax.config import AblationConfig, MeshConfig
    from hydra_jax.engine import mesh

    config, on = CONFIG.value, start()
    devices, length = mesh.make(MeshConfig(**config.mesh)), config.lengths[0]
    ablation = AblationConfig(sites=SITES.value, replacements=config.draws, edges=False)
    measured = functools.partial(sweep.measure, prompts=prompts, length=length, ablation=ablation, rows=config.rows)
    print(f"sweeping {prompts:,} prompts three times ...", flush=True)
    with jax.profiler.trace(TRACE.value) if TRACE.value else contextlib.nullcontext():
        if STREAM.value:
            figures = measure_streaming(measured, devices, STREAM.value)
        else:
            params = mesh.lay(devices, model_params())
            swept = measured(params)
            print(f"\n{swept}\n", flush=True)
            figures = dataclasses.asdict(swept)
            if PAIRS.value:
                pairs = measured(params, ablation=dataclasses.replace(ablation, interactions=True))
                print(f"{pairs}\n\n{sweep.cost_of_pairs(swept, pairs)}\n", flush=True)
                figures = {"single": figures, "pairs": dataclasses.asdict(pairs)}
            if METRICS.value:
                read = measured(params, metrics=METRICS.value)
                print(f"{read}\n\n{sweep.cost_of_metrics(swept, read, params)}\n", flush=True)
                figures = {**figures, "metrics": dataclasses.asdict(read)}
    write("sweep", {"machine": on, "config": config.to_dict(), "figures": figures})


def measure_streaming(measured: Callable[..., Swept], devices: Mesh, limit: float) -> dict[str, Any]:
    from hydra_jax.benchmarks.host import HostModel
    from hydra_jax.benchmarks.sweep import cost_of_streaming
    from hydra_jax.engine import memory, mesh

    sizes, share = random_sizes(), devices.shape[mesh.MODEL]
    host = HostModel.random(sizes, devices) if sizes else HostModel.copy(mesh.lay(devices, model_params()))
    memory.streams(host.beside.config, share, limit * 1e9)  # an error where not even two layers fit
    # Before the other, so that the most memory in use is its own.
    streamed = measured(host.beside, layers=host.streamed(), limit=limit)
    print(f"\nstreamed, {limit:g} GB a device\n{streamed}", flush=True)
    too_large = memory.streams(host.beside.config, share, memory.free_bytes(devices.local_devices[0]))
    if too_large:
        print(f"\nresident: left out, as {too_large.partition(':')[0]}\n")
        return {"streamed": dataclasses.asdict(streamed), "resident": None}
    resident = measured(host.resident())
    print(f"\nresident\n{resident}\n\n{cost_of_streaming(resident, streamed)}\n")
    return {"streamed": dataclasses.asdict(streamed), "resident": dataclasses.asdict(resident)}


def measure_devices(asked: list[str]) -> None:
    import jax

    from hydra_jax.benchmarks import devices
    from hydra_jax.engine.memory import default_rows

    config = CONFIG.value
    counts = [int(count) if count.isdecimal() else 0 for count in asked]
    if not all(counts):
        raise UserError(f"--devices: {','.join(asked)} are not numbers of devices; give e.g. 1,2,4")
    filling = max(1, (config.rows or default_rows()) // config.draws)
    strong = config.strong or filling * max(counts)
    if jax.default_backend() == "cpu" and counts != [jax.device_count()]:
        print(f"measuring {','.join(asked)} CPU devices, each with a core of its own ...", flush=True)
        scaling = [devices.apart([*sys.argv[1:], f"--config.strong={strong}"], count) for count in counts]
    else:
        params, length = model_params(), config.lengths[0]

        def scaled(count: int, prompts: int) -> dict[str, Any]:
            model = min(config.mesh.model, count)
            measured = devices.measure(params, count, model, prompts, length, config.draws, config.step, config.rows)
            return dataclasses.asdict(measured)

        scaling = [{"strong": scaled(count, strong), "weak": scaled(count, filling * count)} for count in counts]
    print(f"\n{devices.table(scaling)}\n")
    print("on data, on model: places in the compiled programs of a walk where anything passes along that axis")
    write("devices", {"figures": scaling})


def measure_peers() -> None:
    from hydra_jax.benchmarks import peers
    from hydra_jax.engine.memory import default_rows

    config = CONFIG.value
    params, on = model_params(), start()
    peers.check_comparable(params.config)
    present, missing = peers.installed(params, max(config.peer_lengths))
    print("\n".join(missing), flush=True)
    rows = []
    for length in config.peer_lengths:
        print(f"measuring {length} tokens ...", flush=True)
        rows += peers.measure(params, present, length, config.rows or default_rows(), config.draws, config.step)
    print(f"\n{peers.table(rows)}\n")
    print(
        "interventions/s: ours with clean runs, the peer's one a forward pass, and of a prompt's replacements at once;"
    )
    print("difference: of total effects, in logits")
    write("peers", {"machine": on, "config": config.to_dict(), "figures": as_dicts(rows)})


def start() -> dict[str, Any]:
    """Say what is measured and where; a description of the machine."""
    from hydra_jax.benchmarks import kernels

    config, on = CONFIG.value, kernels.machine()
    what = SHAPE.value or config.model
    print(f"{what}, {config.dtype}, {on['devices']} x {on['device']} ({on['backend']})", flush=True)
    return on


def model_params() -> Params:
    import jax

    from hydra_jax import load
    from hydra_jax.models.transformer import init_params

    config, sizes = CONFIG.value, random_sizes()
    if sizes:
        return jax.jit(init_params, static_argnums=0)(sizes, jax.random.key(0))
    return load(config.model, dtype=config.dtype, precision=config.precision).params


def random_sizes() -> ModelConfig | None:
    """The sizes of a model of random weights, or None where one is to be loaded."""
    from hydra_jax.weights.directory import read_stated

    config = CONFIG.value
    switches = {"dtype": config.dtype, "precision": config.precision}
    asked = SHAPE.value or config.model
    if SHAPE.value and Path(asked).is_file():
        return read_stated(Path(asked)).config(**switches)
    if SHAPE.value or asked in SHAPES:
        return dataclasses.replace(shape(asked, config.layers), **switches)
    return None


def measure_training() -> None:
    from hydra_jax.benchmarks import kernels
    from hydra_jax.benchmarks import training as steps
    from hydra_jax.training.config import train_config

    on, rows = kernels.machine(), []
    print(f"{TRAINING.value}, {on['devices']} x {on['device']} ({on['backend']})", flush=True)
    for arm in train.ARMS:
        print(f"measuring {arm} ...", flush=True)
        rows.append(steps.measure(train_config(train.get_config(f"{arm},{TRAINING.value}"))))
    print(f"\n{steps.table(rows)}\n")
    print("ratio: of a step's matrix products to bare ones")
    write("training", {"machine": on, "figures": as_dicts(rows)})


def measure_loading() -> None:
    from hydra_jax.benchmarks import loading

    print(
        f"loading Llama checkpoints of {loading.LAYERS[0]} and {loading.LAYERS[1]} layers in bfloat16 ...", flush=True
    )
    rows = list(loading.measure())
    fitted = loading.line(rows[0], rows[1])
    print(f"\n{loading.table(rows, fitted)}\n")
    write("loading", {"line": dataclasses.asdict(fitted), "figures": as_dicts(rows)})


def as_dicts(rows: Sequence[Any]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(row) for row in rows]


def write(what: str, figures: dict[str, Any]) -> None:
    output = Path(OUTPUT.value or f"runs/{what}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    runtime.main(main, "benchmark.py")
