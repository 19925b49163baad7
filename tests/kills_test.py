"""Sweeps that are killed at random moments, by one process and by two, and started again until they are done."""

import os
import random
import signal
import time

import numpy as np
import pytest

from hydra_jax import store
from tests import builders, commands
from tests.commands import finish, free_port

KILLS = int(os.environ.get("HYDRA_JAX_KILLS", "2"))
PROMPTS = 20


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    builders.gguf_file(directory / "tiny.gguf")
    records = [{"id": f"p{i}", "prompt": f"the {i} of {'x' * (i % 9)} in"} for i in range(PROMPTS)]
    builders.json_lines(directory / "prompts.jsonl", records)
    return directory


def start(inputs, workdir, processes):
    settings = [
        f"--config.model={inputs}/tiny.gguf",
        f"--config.prompts.path={inputs}/prompts.jsonl",
        "--config.prompts.correct_only=False",
        "--config.ablation.replacements=3",
        "--config.rows=3",  # a chunk a prompt
        "--config.bootstrap=5",
        f"--workdir={workdir}",
    ]
    where = [[]]
    if processes > 1:
        shared = f"--coordinator=127.0.0.1:{free_port()}", f"--processes={processes}"
        where = [[*shared, f"--process={number}"] for number in range(processes)]
    kept = commands.kept(inputs / "compiled")
    return [commands.start("launch.sweep", *settings, *each, **kept) for each in where]


def written(workdir):
    """When each chunk's flag was written, which comes last."""
    chunks = (workdir / store.NAME / "finished" / "c").glob("[0-9]*")
    return {path.name: path.stat().st_mtime_ns for path in chunks}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sweep_that_is_killed_again_and_again_is_the_undisturbed_one(inputs, tmp_path, processes):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    began = time.monotonic()
    for process in map(finish, start(inputs, undisturbed, processes)):
        assert process.returncode == 0, process.err
    whole = time.monotonic() - began

    draw, known, interrupted = random.Random(processes), {}, 0
    for _ in range(KILLS):
        running = start(inputs, killed, processes)
        until = time.monotonic() + draw.uniform(0, whole)
        while time.monotonic() < until and running[0].poll() is None:
            time.sleep(0.01)
        interrupted += 0 < len(written(killed)) < PROMPTS
        draw.choice(running).kill()
        for process in running:  # a launcher ends what is left; by itself it would end once it misses the other
            process.kill()
            finish(process)
        now = written(killed)
        assert known.items() <= now.items()  # what was finished is not computed again
        known = now
    for process in map(finish, start(inputs, killed, processes)):
        assert process.returncode == 0, process.err
    assert known.items() <= written(killed).items()
    assert KILLS < 10 or interrupted

    for read in (store.open_effects, store.open_examples):
        found, expected = read(killed), read(undisturbed)
        for name in expected.variables:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert {path.name for path in killed.iterdir()} == {path.name for path in undisturbed.iterdir()}


def test_a_process_that_is_told_to_stop_says_so_to_its_scheduler(inputs, tmp_path):
    """SIGTERM to both of two: each drops its chunk and exits as a preempted one."""
    running = start(inputs, tmp_path, 2)
    while not written(tmp_path) and running[0].poll() is None:
        time.sleep(0.01)
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process in map(finish, running):
        assert process.returncode == 143, process.err
        assert "Traceback" not in process.err
    assert "stopped; the same command goes on" in running[0].err
    assert 0 < len(written(tmp_path)) < PROMPTS


def test_a_lost_process_ends_the_other_and_costs_no_finished_chunk(inputs, tmp_path):
    running = start(inputs, tmp_path, 2)
    while not written(tmp_path) and running[0].poll() is None:
        time.sleep(0.01)
    running[1].kill()
    done = finish(running[0])
    finish(running[1])
    assert done.returncode not in (0, None)
    before = written(tmp_path)
    for process in map(finish, start(inputs, tmp_path, 2)):
        assert process.returncode == 0, process.err
    assert before.items() <= written(tmp_path).items()
