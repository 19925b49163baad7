import concurrent.futures
import errno
import io
import shutil
import signal
import time

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from hydra_jax.errors import UserError
from hydra_jax.store import effects as store
from hydra_jax.store import files, variables
from tests.helpers import checkpoints, commands
from tests.helpers import effects as toy_effects
from tests.helpers.commands import ROOT, finish

PROMPTS, REPLACEMENTS = 24, 3
FIGURES = {
    f"{name}.{form}"
    for name in (
        *("effects_by_layer", "direct_against_total", "single_prompts", "compensation_by_layer", "regression"),
        *("compensation", "erasure", "causal_motifs"),
    )
    for form in ("png", "pdf")
}
TABLES = {f"{name}.{form}" for name in ("summary", "erasure", "findings") for form in ("csv", "parquet")}
RESULTS = {"effects.zarr", "examples.zarr", "prompts.csv", "report.html"} | FIGURES | TABLES

FULL_DISK, INTERRUPTIBLE = ["--file-bytes=600"], ["--interruptible"]

WORKDIR = "--workdir={inputs}/{case}/here"
REFUSED = {
    "unknown key": ([WORKDIR, "--config.nonsense=1"], "nonsense"),
    "unknown value": ([WORKDIR, "--config.ablation.kind=resampel"], "config.ablation.kind: 'resampel'"),
    "wrong type": ([WORKDIR, "--config.seed=abc"], "config.seed"),
    "layer not there": ([WORKDIR, "--config.ablation.layers=0-2"], "config.ablation.layers: '0-2'"),
    "unknown flag": ([WORKDIR, "--nonsense=1"], "nonsense"),
    "stray argument": ([WORKDIR, "nonsense"], "nonsense"),
    "no workdir": ([], "workdir"),
    "empty prompt": ([WORKDIR, "--prompt= "], "--prompt"),
    "empty workdir": (["--workdir="], "workdir"),
    "workdir a file": (["--workdir={inputs}/file"], "{inputs}/file"),
    "workdir below a file": (["--workdir={inputs}/file/deeper"], "{inputs}/file/deeper"),
    "workdir too long": (["--workdir={inputs}/" + "x" * 300], "{inputs}/xxx"),
    "config file missing": ([WORKDIR, "--config={inputs}/missing.py"], "missing.py"),
    "config file broken": ([WORKDIR, "--config={inputs}/broken.py"], "broken.py"),
    "model cut": ([WORKDIR, "--config.model={inputs}/cut.gguf"], "{inputs}/cut.gguf"),
    "prompt too long": ([WORKDIR, "--config.prompts.path={inputs}/long.jsonl"], "'long'"),
    "none to be right about": ([WORKDIR, "--config.prompts.correct_only=True"], "correct_only"),
    "too few prompts": ([WORKDIR, f"--config.ablation.replacements={PROMPTS}"], f"{PROMPTS + 1}"),
}
STATUSES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
STOPS = list(STATUSES)
FULL = ["new/deeper", "there"]


def start(inputs, *arguments, disturbed=()):
    """`python -m launch.sweep` on the tiny model, `disturbed` as by `commands.start`."""
    defaults = [
        f"--config={ROOT}/configs/sweep.py:{inputs}/tiny.gguf",
        f"--config.prompts.path={inputs}/prompts.jsonl",
        "--config.prompts.correct_only=False",
        f"--config.ablation.replacements={REPLACEMENTS}",
        "--config.bootstrap=20",
    ]
    if any(argument.startswith("--config=") for argument in arguments):
        defaults = []
    # Where files are cut short, compiled programs are too: not those of other tests.
    variables = {"JAX_COMPILATION_CACHE_DIR": f"{inputs}/compiled"} if disturbed == FULL_DISK else {}
    return commands.start("launch.sweep", *defaults, *arguments, disturbed=disturbed, **variables)


def sweep(*arguments, **options):
    return finish(start(*arguments, **options))


def sweep_and_stop(inputs, workdir, stop):
    """A sweep stopped after its first chunk, and the same command again; what was finished in between."""
    arguments = [inputs, f"--workdir={workdir}", f"--config.rows={REPLACEMENTS}"]
    stopped = start(*arguments, disturbed=INTERRUPTIBLE)
    while not finished_chunks(workdir) and stopped.poll() is None:
        time.sleep(0.005)
    stopped.send_signal(stop)
    finish(stopped)
    return stopped, finished_chunks(workdir), sweep(*arguments)


def finished_chunks(workdir):
    chunks = (workdir / store.NAME / "finished" / "c").glob("*")
    return {path: path.stat().st_mtime_ns for path in chunks if path.name.isdecimal()}


def complaint(process):
    """The one line on standard error, progress bars aside."""
    assert process.returncode == 1
    assert "Traceback" not in process.err + process.out
    (line,) = [line for line in process.err.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert line.startswith("error: ")
    return line


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    checkpoints.gguf_file(directory / "tiny.gguf")
    records = [{"id": f"p{i}", "prompt": f"the {i} of the {'x' * (i % 7)} in"} for i in range(PROMPTS)]
    checkpoints.json_lines(directory / "prompts.jsonl", records)
    checkpoints.json_lines(
        directory / "long.jsonl", [*records, {"id": "long", "prompt": "x" * (checkpoints.CONTEXT + 1)}]
    )
    (directory / "cut.gguf").write_bytes((directory / "tiny.gguf").read_bytes()[:3000])
    (directory / "broken.py").write_text("def get_config(:\n")
    (directory / "file").write_text("in the way")
    (directory / "there").mkdir()
    return directory


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """Every run that needs no other's results, two at a time: a process spends most of its life importing."""
    workdir = tmp_path_factory.mktemp("runs")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        made = {"good": pool.submit(sweep, inputs, f"--workdir={workdir}/good")}
        for stop in STOPS:
            made[stop] = pool.submit(sweep_and_stop, inputs, workdir / stop.name, stop)
        for place in FULL:
            made[place] = pool.submit(sweep, inputs, f"--workdir={inputs}/{place}", disturbed=FULL_DISK)
        for name, (arguments, _) in REFUSED.items():
            made[name] = pool.submit(sweep, inputs, *(a.format(inputs=inputs, case=name) for a in arguments))
        yield workdir, {name: future.result for name, future in made.items()}
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def good(runs):
    workdir, result = runs
    process = result["good"]()
    assert process.returncode == 0, process.err
    return workdir / "good"


@pytest.fixture
def finished(good, tmp_path):
    return shutil.copytree(good, tmp_path / "workdir")


@pytest.mark.slow
def test_a_sweep_leaves_its_results_and_nothing_else(good):
    assert {path.name for path in good.iterdir()} == RESULTS
    effects = store.open_effects(good)
    assert effects["finished"].all()
    assert np.isfinite(effects["total_effect"]).all()
    summary, prompts = pd.read_csv(good / "summary.csv"), pd.read_csv(good / "prompts.csv")
    assert len(summary) == effects.sizes["ablated"] == 2 * checkpoints.LAYERS
    assert set(prompts["prompt_id"]) == set(effects["prompt_id"].values) == {f"p{i}" for i in range(PROMPTS)}
    examples = store.open_examples(good)
    assert dict(examples.sizes) == {"example": 4, "replacement": REPLACEMENTS, "component": 2 * checkpoints.LAYERS}
    assert len(set(examples["prompt_id"].values)) == 4


@pytest.mark.slow
def test_a_finished_sweep_is_not_computed_again(inputs, finished):
    before = contents(finished)
    process = sweep(inputs, f"--workdir={finished}")
    assert process.returncode == 0, process.err
    after = contents(finished)
    assert before.keys() == after.keys()
    assert {p for p in after if after[p] != before[p]} <= {finished / name for name in FIGURES | TABLES}


@pytest.mark.slow
def test_one_prompt_is_swept_by_itself(inputs, tmp_path):
    text = "The Eiffel Tower is located in the city of"
    process = sweep(inputs, f"--prompt={text}", f"--workdir={tmp_path}")
    assert process.returncode == 0, process.err
    effects, examples = store.open_effects(tmp_path), store.open_examples(tmp_path)
    assert effects["text"].values.tolist() == examples["text"].values.tolist() == [text]
    assert (effects["source"] == -1).all()
    assert np.ptp(effects["direct_effect"].values, axis=2).max() > 0  # replacements differ
    header = process.out.index("component")
    assert process.out[header:].split()[:4] == ["component", "before", "after", "change"]
    table = pd.read_csv(
        io.StringIO(process.out[header:].partition("\n\n")[0]), sep=r"\s{2,}|\s(?=[+-])", engine="python"
    )
    example = examples.isel(example=0)
    place = 2 * example["ablated_layer"].item()
    expected = example["ablated_unembed"].mean("replacement") - example["delta_unembed"]
    np.testing.assert_allclose(table["change"], expected[place:], atol=2e-3)
    assert text in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_another_protocol_in_the_same_workdir_is_refused(inputs, finished):
    before = contents(finished)
    line = complaint(sweep(inputs, f"--workdir={finished}", "--config.ablation.kind=mean"))
    assert str(finished) in line
    assert "ablation.kind" in line
    assert contents(finished) == before


@pytest.mark.slow
def test_a_disk_that_fills_up_late_keeps_what_is_whole(inputs, finished):
    before = contents(finished)
    line = complaint(sweep(inputs, f"--workdir={finished}", disturbed=FULL_DISK))
    assert str(finished) in line
    assert contents(finished) == before


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
def test_a_stopped_sweep_goes_on_to_the_same_results(runs, good, stop):
    workdir, result = runs
    stopped, chunks, resumed = result[stop]()
    assert stopped.returncode == STATUSES[stop], stopped.err
    assert "Traceback" not in stopped.err
    assert resumed.returncode == 0, resumed.err

    workdir /= stop.name
    assert {path.name for path in workdir.iterdir()} == RESULTS
    assert 0 < len(chunks) < PROMPTS
    assert finished_chunks(workdir).items() > chunks.items()
    effects, expected = store.open_effects(workdir), store.open_effects(good)
    assert list(effects["prompt_id"].values) == list(expected["prompt_id"].values)
    for name in variables.VARIABLES.keys() & set(effects.data_vars):
        np.testing.assert_allclose(effects[name], expected[name], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("place", FULL)
def test_a_full_disk_leaves_nothing_half_written(runs, inputs, place):
    ended = {each: runs[1][each]() for each in FULL}  # all of them, as what is left is looked at in both places
    assert f"{inputs}/{place}" in complaint(ended[place])
    assert not (inputs / "new").exists()
    assert list((inputs / "there").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_line(inputs, runs, case):
    assert REFUSED[case][1].format(inputs=inputs) in complaint(runs[1][case]())
    assert not (inputs / case).exists()
    assert (inputs / "file").read_text() == "in the way"


def test_a_store_is_not_there_without_the_files_beside_it(tmp_path):
    def fail(part):
        part.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    frame = toy_effects.effects(np.ones((2, 2, 1)), np.ones((2, 2, 1)))
    sizes = dict(frame.sizes)
    frame = frame.drop_vars(list(variables.VARIABLES), errors="ignore")
    with pytest.raises(OSError, match="No space left"):
        store.create(tmp_path, frame, 1, sizes, (), {"prompts.csv": fail})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def _interruptible():
    """Ctrl-C as at a terminal: of what a script starts in the background it is ignored, this process included."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupt_waits_until_a_chunk_is_written(monkeypatch, tmp_path):
    written = []

    def to_zarr(dataset, *_, **__):
        signal.raise_signal(signal.SIGINT)
        written.extend(dataset.variables)

    monkeypatch.setattr(xr.Dataset, "to_zarr", to_zarr)
    with pytest.raises(KeyboardInterrupt):
        store.write(tmp_path, slice(0, 1), {"total_effect": np.zeros((1, 1, 1))})
    assert written == ["total_effect", "finished"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_directory_is_worked_in_by_one_run_alone(tmp_path):
    with files.exclusive(tmp_path):
        with pytest.raises(UserError, match="another run is working in it"), files.exclusive(tmp_path):
            raise AssertionError
        (tmp_path / files.LOCK).touch()  # the first still has it
    assert list(tmp_path.iterdir()) == []
    (tmp_path / files.LOCK).touch()  # as a kill leaves it
    with files.exclusive(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_damaged_chunk_is_computed_again(inputs, tmp_path):
    arguments = [inputs, f"--workdir={tmp_path}/run", f"--config.rows={4 * REPLACEMENTS}"]
    assert sweep(*arguments).returncode == 0
    before = store.open_effects(tmp_path / "run").load()
    chunks = sorted((tmp_path / "run" / store.NAME / "total_effect" / "c").glob("*/*/*"))
    content = bytearray(chunks[1].read_bytes())
    content[len(content) // 2] ^= 0xFF
    chunks[1].write_bytes(content)
    times = {chunk: chunk.stat().st_mtime_ns for chunk in chunks}
    again = sweep(*arguments)
    assert again.returncode == 0, again.err
    xr.testing.assert_allclose(store.open_effects(tmp_path / "run").load(), before, atol=1e-5)
    assert [chunk for chunk in chunks if chunk.stat().st_mtime_ns != times[chunk]] == [chunks[1]]
