"""`python -m launch.train` and `launch.compare` as processes: refusals, signals and kills."""

import os
import random
import signal
import time

import jax
import numpy as np
import pytest

from hydra_jax.training import workdir
from hydra_jax.training.step import initial
from hydra_jax.weights import checkpoints as trained_weights
from tests.helpers import checkpoints, commands
from tests.helpers.commands import ROOT, finish
from tests.helpers.speed import few

KILLS = int(os.environ.get("HYDRA_JAX_KILLS", "4"))
"""Random moments at which a run is killed; a start of the command takes seconds."""

TINY = {
    "steps": max(80, 20 * KILLS),
    "batch": 4,
    "accumulate": 1,
    **{f"model.{key}": value for key, value in dict(layers=1, width=8, heads=2, kv_heads=2, mlp_width=8).items()},
    **{f"data.{key}": value for key, value in dict(people=4, unseen_people=1, variants=2, vocab_size=300).items()},
    "arm": "some",
    "dropout.attn": 0.1,
    "checkpoint.every": 2,
    "checkpoint.keep_every": 10,
    "evaluate_every": 20,
    "log_every": 5,
}

WORKDIR = "--workdir={path}/here"
REFUSED = {
    "arm unknown": (["--config={root}/configs/train.py:nonsense", WORKDIR], "nonsense"),
    "setting unknown": ([WORKDIR, "--config.nonsense=1"], "nonsense"),
    "vocabulary too small": ([WORKDIR, "--config.data.vocab_size=100"], "config.data.vocab_size: is 100"),
    "text not there": ([WORKDIR, "--config.data.kind=text", "--config.data.path={path}/none.txt"], "none.txt"),
    "context too short": ([WORKDIR, "--config.model.context=8"], "config.model.context: is 8"),
    "workdir a file": (["--workdir={path}/file"], "{path}/file"),
    "no workdir": ([], "workdir"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs")
    (path / "file").write_text("")
    return path


def start(inputs, *arguments, command="launch.train", changes=None):
    """A command with `{path}` and `{root}` filled in; of training, with the settings of TINY or other `changes`."""
    chosen = TINY if changes is None else changes
    settings = [f"--config.{name}={value}" for name, value in chosen.items()] if command == "launch.train" else []
    arguments = [argument.format(path=inputs, root=ROOT) for argument in arguments]
    first = [argument for argument in arguments if argument.startswith("--config=")]
    rest = [argument for argument in arguments if argument not in first]
    return commands.start(command, *first, *settings, *rest)


def weights_of(path):
    like = initial(workdir.read_run(path)[0], workdir.read_run(path)[1]["vocab_size"])
    return trained_weights.weights(path, like.weights)


@pytest.fixture(scope="module")
def undisturbed(inputs):
    done = finish(start(inputs, "--workdir={path}/undisturbed"))
    assert done.returncode == 0, done.err
    assert "trained:" in done.out
    assert "tokens/s" in done.err
    assert (inputs / "undisturbed" / "training.png").stat().st_size > 10_000
    return inputs / "undisturbed"


def assert_same(path, other):
    (weights, digest, step), (expected, expected_digest, last) = weights_of(path), weights_of(other)
    assert (digest, step) == (expected_digest, last) == (digest, TINY["steps"])
    jax.tree.map(np.testing.assert_array_equal, weights, expected)
    times = {"tokens_per_second"}
    lines = [workdir.read_metrics(each).drop(columns=times).to_csv() for each in (path, other)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("case", few(REFUSED, "setting unknown"))
def test_refused_in_one_line(inputs, case):
    arguments, named = REFUSED[case]
    process = finish(start(inputs, *arguments))
    assert process.returncode == 1
    assert "Traceback" not in process.err + process.out
    (line,) = [line for line in process.err.splitlines() if line.strip()]
    assert line.startswith("error: ")
    assert named.format(path=inputs) in line
    assert not (inputs / "here").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_and_gone_on_with(inputs, undisturbed, number, status):
    path = inputs / f"stopped-{status}"
    process = start(inputs, f"--workdir={path}")
    while not (len(trained_weights.steps(path)) > 1) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    finish(process)
    assert "Traceback" not in process.err
    # It may have been done before the signal came.
    assert process.returncode == status, process.err
    saved = trained_weights.steps(path)[-1]
    assert f"stopped; step {saved} is saved" in process.err
    assert finish(start(inputs, f"--workdir={path}")).returncode == 0
    assert_same(path, undisturbed)


@pytest.mark.slow
def test_killed_at_random_moments(inputs, undisturbed):
    path, moments = inputs / "killed", random.Random(0)
    for kill in range(KILLS):
        process, before = start(inputs, f"--workdir={path}"), trained_weights.steps(path)
        # Once it works: while it writes its first checkpoint of this start, or steps after it.
        while trained_weights.steps(path) == before and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        assert finish(process).returncode == -signal.SIGKILL, f"done before kill {kill}"
    assert finish(start(inputs, f"--workdir={path}")).returncode == 0
    assert_same(path, undisturbed)
    assert not list((path / trained_weights.NAME).glob("*tmp*"))


@pytest.mark.slow
def test_compare_refuses_in_one_line(inputs, undisturbed):
    checkpoints.text_file(inputs / "no_run", "")
    for arguments, named in (
        (["--workdirs={path}/none", WORKDIR], "none/train.json: is not there"),
        ([f"--workdirs={undisturbed}", WORKDIR, "--steps=a"], "--steps: 'a' is not numbers"),
        ([f"--workdirs={undisturbed}", WORKDIR], "prompts right at step"),
    ):
        process = finish(start(inputs, *arguments, command="launch.compare"))
        assert process.returncode == 1, process.err
        (line,) = [line for line in process.err.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
        assert line.startswith("error: ")
        assert named in line
        assert not (inputs / "here").exists()


@pytest.mark.slow
def test_small_trains_on_a_cpu(inputs):
    # Its model and types; fewer people and sequences, so that 20 steps take seconds.
    path = inputs / "small"
    fewer = dict(steps=20, batch=1, evaluate_every=20, log_every=1) | {"data.people": 20, "data.variants": 4}
    fewer |= {"optimizer.warmup": 5, "checkpoint.every": 20, "checkpoint.keep_every": 20}
    arguments = ["--config={root}/configs/train.py:dropout,small", f"--workdir={path}"]
    done = finish(start(inputs, *arguments, changes=fewer))
    assert done.returncode == 0, done.err
    config, _ = workdir.read_run(path)
    assert (config.model.layers, config.model.width, config.dtype) == (12, 512, "bfloat16")
    losses = workdir.read_metrics(path)["loss"].dropna()
    assert len(losses) == 20
    assert losses.iloc[-3:].mean() < losses.iloc[:3].mean()
