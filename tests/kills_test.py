"""Sweeps that are killed at random moments, by one process and by two, and started again until they are done."""

import os
import random
import signal
import time

import numpy as np
import pytest

from hydra_jax.store import effects as store
from tests.helpers import sweeps
from tests.helpers.commands import finish

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("HYDRA_JAX_KILLS", "2"))
PROMPTS = 20 if KILLS < 10 else 120  # of many kills, some are to come between chunks


A_CHUNK_A_PROMPT = f"--config.rows={sweeps.REPLACEMENTS}"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return sweeps.inputs(tmp_path_factory.mktemp("inputs"), PROMPTS)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sweep_that_is_killed_again_and_again_is_the_undisturbed_one(inputs, tmp_path, processes):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    began = time.monotonic()
    sweeps.done(inputs, undisturbed, A_CHUNK_A_PROMPT, processes=processes)
    whole = time.monotonic() - began

    draw, known, interrupted = random.Random(processes), {}, 0
    for kill in range(KILLS):
        running = sweeps.start(inputs, killed, A_CHUNK_A_PROMPT, processes=processes)
        until = time.monotonic() + draw.uniform(0, whole)
        while time.monotonic() < until and running[0].poll() is None:
            time.sleep(0.01)
            if kill % 2 == 0 and len(sweeps.written(killed)) == len(known):
                until = time.monotonic() + draw.uniform(0, 1)  # every other kill comes between chunks
        interrupted += 0 < len(sweeps.written(killed)) < PROMPTS
        draw.choice(running).kill()
        for process in running:  # a launcher ends what is left; by itself it would end once it misses the other
            process.kill()
            finish(process)
        now = sweeps.written(killed)
        assert known.items() <= now.items()  # what was finished is not computed again
        known = now
    sweeps.done(inputs, killed, A_CHUNK_A_PROMPT, processes=processes)
    assert known.items() <= sweeps.written(killed).items()
    assert KILLS < 10 or interrupted

    for read in (store.open_effects, store.open_examples):
        found, expected = read(killed), read(undisturbed)
        for name in expected.variables:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert {path.name for path in killed.iterdir()} == {path.name for path in undisturbed.iterdir()}


def test_a_process_that_is_told_to_stop_says_so_to_its_scheduler(inputs, tmp_path):
    """SIGTERM to both of two: each drops its chunk and exits as a preempted one."""
    running = sweeps.start(inputs, tmp_path, A_CHUNK_A_PROMPT, processes=2)
    while not sweeps.written(tmp_path) and running[0].poll() is None:
        time.sleep(0.01)
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process in map(finish, running):
        assert process.returncode == 143, process.err
        assert "Traceback" not in process.err
    assert "stopped; the same command goes on" in running[0].err
    assert 0 < len(sweeps.written(tmp_path)) < PROMPTS


def test_a_lost_process_ends_the_other_and_costs_no_finished_chunk(inputs, tmp_path):
    running = sweeps.start(inputs, tmp_path, A_CHUNK_A_PROMPT, processes=2)
    while not sweeps.written(tmp_path) and running[0].poll() is None:
        time.sleep(0.01)
    running[1].kill()
    done = finish(running[0])
    finish(running[1])
    assert done.returncode not in (0, None)
    before = sweeps.written(tmp_path)
    sweeps.done(inputs, tmp_path, A_CHUNK_A_PROMPT, processes=2)
    assert before.items() <= sweeps.written(tmp_path).items()
