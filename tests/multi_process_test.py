"""Runs of several processes, all on this machine."""

import json

import jax
import numpy as np
import pytest

from hydra_jax.training import workdir
from hydra_jax.training.loop import train
from hydra_jax.training.step import initial
from hydra_jax.weights import checkpoints as trained_weights
from tests.helpers import commands
from tests.helpers import training as toy_training
from tests.helpers.commands import finish, free_port
from tests.helpers.speed import few

CONFIG = toy_training.config(dropout=dict(attn=0.1))
SETTINGS = {
    "steps": CONFIG.steps,
    "batch": CONFIG.batch,
    "accumulate": CONFIG.accumulate,
    "evaluate_every": CONFIG.evaluate_every,
    "log_every": CONFIG.log_every,
    **{f"model.{key}": value for key, value in vars(CONFIG.model).items()},
    **{f"checkpoint.{key}": value for key, value in vars(CONFIG.checkpoint).items()},
    **{f"data.{key}": getattr(CONFIG.data, key) for key in ("people", "unseen_people", "variants", "vocab_size")},
    "arm": "some",
    "dropout.attn": 0.1,
}


def start(*arguments, **options):
    settings = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    return commands.start("launch.train", *settings, *arguments, devices=2, **options)


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(tmp_path):
    """Two processes of two devices each, against one of four; and one process goes on from what two have saved."""
    both, alone = tmp_path / "both", tmp_path / "alone"
    where = f"--coordinator=127.0.0.1:{free_port()}"
    said = [tmp_path / f"said-{number}" for number in range(2)]
    started = [
        start(f"--workdir={both}", where, "--processes=2", f"--process={number}", said=said[number])
        for number in range(2)
    ]
    for process in map(finish, started):
        assert process.returncode == 0, process.err
    assert "trained:" in said[0].read_text()
    assert not said[1].read_text()  # one writes, one speaks
    train(CONFIG, alone, progress=False)
    lines = [[json.loads(line) for line in (path / workdir.METRICS).read_text().splitlines()] for path in (both, alone)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    np.testing.assert_allclose(*([line["loss"] for line in each[1:]] for each in lines), rtol=1e-5)
    vocab_size = workdir.read_run(alone)[1]["vocab_size"]
    like = initial(CONFIG, vocab_size).weights
    weights = [trained_weights.weights(path, like)[0] for path in (both, alone)]
    # Sums over devices are of another order, and Adam divides small gradients by their own size.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), *weights)
    assert trained_weights.steps(both) == trained_weights.steps(alone)
    train(CONFIG, both, progress=False)


@pytest.mark.slow
def test_a_command_for_one_process_is_not_run_by_several(tmp_path):
    done = finish(commands.start("launch.report", f"--workdir={tmp_path}/run", SLURM_STEP_NUM_TASKS="2"))
    assert done.returncode == 1
    assert done.err.startswith("error: this command runs as one process, 2 were started")


@pytest.mark.parametrize(
    ("arguments", "variables", "named"),
    few(
        [
            (["--processes=2"], {}, "--coordinator, --process: is missing"),
            (["--coordinator=127.0.0.1:1", "--processes=2", "--process=2"], {}, "--process: is 2, of --processes=2"),
            ([], {"SLURM_STEP_NUM_TASKS": "2"}, "the 2 processes did not find each other"),
            ([], {"OMPI_COMM_WORLD_SIZE": "two"}, "OMPI_COMM_WORLD_SIZE: is 'two'"),
            ([], {"JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETION_INDEX: is set"),
            ([], {"TPU_WORKER_HOSTNAMES": "a,b"}, "the 2 processes did not find each other"),
            (["--coordinator=auto"], {}, "--coordinator: the processes did not find each other"),
        ],
        ([], {"JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETION_INDEX: is set"),
    ),
)
def test_a_misconfigured_cluster_is_no_run_by_itself(tmp_path, arguments, variables, named):
    process = finish(start(f"--workdir={tmp_path}/run", *arguments, **variables))
    assert process.returncode == 1
    (line,) = [line for line in process.err.splitlines() if line.strip()]
    assert line.startswith("error: ")
    assert named in line
    assert not (tmp_path / "run").exists()
