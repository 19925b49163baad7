"""Damaged and senseless inputs: each leads to the right result or to one line that says what is wrong.

HYDRA_JAX_FUZZ=N tries N inputs; `-k "gguf-17-"` tries one of them again.
"""

import contextlib
import faulthandler
import gzip
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from ml_collections import config_dict

import hydra_jax
from configs import sweep as sweep_file
from hydra_jax.analysis import results
from hydra_jax.config import sweep_config
from hydra_jax.core.edits import Kind
from hydra_jax.errors import UserError
from hydra_jax.report import page as report
from hydra_jax.store import effects as store
from hydra_jax.store import variables
from hydra_jax.sweep.run import run
from hydra_jax.text import prompts
from tests.helpers import checkpoints, corruption

pytestmark = pytest.mark.slow  # the model and the sweep that are spoilt take longest

INPUTS = int(os.environ.get("HYDRA_JAX_FUZZ", "200"))
SECONDS = 60
"""Of this process's computing in which an input is dealt with, compiling included."""
LONGEST = 900
"""Seconds after which it hangs, however busy the machine is."""
MOST_GROWTH = 768 << 20
"""Bytes by which resident memory may grow on the way: programs, and what the largest file allowed needs."""
LONGEST = 12_000
"""Characters of a message: more than the longest name given."""
PROGRAMS = 100
"""Inputs after which compiled programs are forgotten."""

TEXTS = ["the", "in the of", "the the in of the", "a b c d", "of in", "12345 in the"]
RECORDS = {
    "plain.jsonl": [{"id": f"p{i}", "prompt": text, "answer": "of", "relation": "é"} for i, text in enumerate(TEXTS)],
    "known.json": [
        {"known_id": i, "prompt": text, "attribute": "the", "relation_id": "P1"} for i, text in enumerate(TEXTS)
    ],
    "counterfact.json": [
        {
            "case_id": i,
            "requested_rewrite": {
                "prompt": "{} " + text,
                "subject": "A",
                "target_true": {"str": "of"},
                "relation_id": "P",
            },
        }
        for i, text in enumerate(TEXTS)
    ],
    "flat.jsonl.gz": [{"case_id": i, "prompt": text, "ground_truth": "of"} for i, text in enumerate(TEXTS)],
}
BOMB = b"".join([gzip.compress(bytes(1 << 26))] * 32)
"""2 GiB of zeros."""


class Inputs:
    """What is spoiled: a tiny model in every form, prompt files, and sweeps of the model, finished and half of one."""

    def __init__(self, directory):
        self.gguf = checkpoints.gguf_file(directory / "tiny.gguf")
        self.single = checkpoints.hugging_face_directory(directory / "single")
        self.sharded = checkpoints.hugging_face_directory(directory / "sharded", shards=2)
        self.prompts = directory / "prompts"
        self.prompts.mkdir()
        for name, records in RECORDS.items():
            lines = ".jsonl" in name
            text = "".join(json.dumps(r) + "\n" for r in records) if lines else json.dumps(records, indent=1)
            checkpoints.text_file(self.prompts / name, text)
        checkpoints.text_file(self.prompts / "words.txt", " ".join(f"word{i} é\n" for i in range(400)))
        self.tree = sweep_file.get_config(str(self.gguf)).to_dict()
        self.tree["prompts"] |= dict(path=str(self.prompts / "plain.jsonl"), correct_only=False)
        self.tree["ablation"] |= dict(replacements=2, edges=False)
        self.tree |= dict(rows=4, bootstrap=20)
        self.config = sweep_config(self.tree)
        self.finished, self.half = directory / "finished", directory / "half"
        run(self.config, self.finished, progress=False)
        self.effects = store.load_effects(self.finished).load()
        self.model = hydra_jax.load(str(self.gguf))
        shutil.copytree(self.finished, self.half)
        halve(self.half)


def halve(workdir):
    """Leave of a finished sweep what one that is killed after its first chunk leaves."""
    shutil.rmtree(workdir / store.EXAMPLES)
    for name in (*variables.VARIABLES, "finished"):
        for chunk in (workdir / store.NAME / name / "c").glob("[1-9]*"):
            shutil.rmtree(chunk) if chunk.is_dir() else chunk.unlink()
    path = workdir / store.NAME / "zarr.json"
    content = json.loads(path.read_text())
    del content["consolidated_metadata"]
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def download(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def memory(key):
    """A figure of this process's, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) << 10


@contextlib.contextmanager
def bounded():
    """Fail on what takes long, or much memory at any time."""

    def late(*_):
        pytest.fail(f"takes more than {SECONDS} s")

    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, to what there is now
    before = memory("VmHWM")
    old = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    faulthandler.dump_traceback_later(LONGEST, exit=True, file=sys.__stderr__)  # where no signal is looked at
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
        faulthandler.cancel_dump_traceback_later()
    grown = memory("VmHWM") - before
    assert grown < MOST_GROWTH, f"memory grew by {grown >> 20} MiB"


def refused(error):
    """Check what a refusal says; there is nothing more to check."""
    message = str(error)
    assert message.strip()
    assert len(message.splitlines()) == 1, message
    assert len(message) < LONGEST, message


def sweep_anew(tree, workdir):
    """A sweep into a new directory, which is whole or, if the sweep is refused, not there. None if it is."""
    try:
        effects = run(sweep_config(tree), workdir, progress=False)
    except UserError as error:
        refused(error)
        assert not workdir.exists()
        return None
    assert effects["finished"].values.all()
    assert {path.name for path in workdir.iterdir()} == {store.NAME, store.EXAMPLES, "prompts.csv"}
    return store.load_effects(workdir)


def assert_same(found, expected):
    """Equal values of the prompts that are found."""
    rows = [expected["prompt_id"].values.tolist().index(name) for name in found["prompt_id"].values]
    expected = expected.isel(prompt=rows)
    assert set(found.variables) == set(expected.variables)
    for name in expected.variables:
        values, wanted = found[name].values, expected[name].values
        if wanted.dtype.kind == "f":
            np.testing.assert_allclose(values, wanted, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(values, wanted, err_msg=name)


def config_input(random, inputs, path):
    """Settings of wrong kinds, sizes and names."""
    tree = inputs.tree | dict(ablation=inputs.tree["ablation"] | dict(kind=corruption.pick(random, DRAWN)))
    tree = corruption.settings(random, tree, int(random.integers(1, 4)))
    with contextlib.suppress(Exception):  # of ml_collections, which takes less than a mapping
        tree = config_dict.ConfigDict(tree)
    with bounded():
        if sweep_anew(tree, path / "run"):
            config = sweep_config(tree)
            read_back(path / "run", config.bootstrap, config.seed)


def prompts_input(random, inputs, path):
    """A file of prompts: what is read of it can be written and read again."""
    source = corruption.pick(random, sorted(inputs.prompts.iterdir()))
    spoiled, data = path / source.name, source.read_bytes()
    packed = source.suffix == ".gz" and random.random() < 0.5
    if packed:
        data = gzip.decompress(data)
    if source.name in RECORDS and random.random() < 0.4:
        trees = corruption.settings(random, RECORDS[source.name], int(random.integers(1, 3)))
        data = b"\n".join(map(corruption.text, trees)) if ".jsonl" in source.name else corruption.text(trees)
    else:
        data = corruption.content(random, data, int(random.integers(1, 4)))
    if source.suffix == ".gz" and random.random() < 0.1:
        packed, data = False, corruption.pick(random, (BOMB, BOMB[:-9], gzip.compress(data) + BOMB))
    spoiled.write_bytes(gzip.compress(data) if packed else data)
    kind = "text" if source.suffix == ".txt" else "records"
    with bounded():
        try:
            found = prompts.read(str(spoiled), kind, limit=5)
        except UserError as error:
            return refused(error)
    assert found
    assert len({prompt.id for prompt in found}) == len(found)
    assert all(prompt.text.strip() for prompt in found)
    (path / "again.jsonl").write_text(prompts.json_lines(found), "utf-8")
    assert prompts.read(str(path / "again.jsonl")) == found
    return None


def gguf_input(random, inputs, path):
    """A GGUF file: half of the time spoiled among its metadata, which is the smaller part."""
    data = inputs.gguf.read_bytes()
    start = 0 if random.random() < 0.5 else int(random.integers(len(data)))
    spoiled = path / "spoiled.gguf"
    spoiled.write_bytes(data[:start] + corruption.content(random, data[start : start + 400]) + data[start + 400 :])
    swept(spoiled, inputs, path)


def directory_input(random, inputs, path):
    """A Hugging Face directory."""
    source = corruption.pick(random, (inputs.single, inputs.sharded))
    spoiled = shutil.copytree(source, path / "spoiled")
    chosen = corruption.pick(random, sorted(spoiled.iterdir()))
    if chosen.suffix == ".safetensors" and random.random() < 0.5:  # in its header
        data = chosen.read_bytes()
        chosen.write_bytes(corruption.content(random, data[:1000]) + data[1000:])
    else:
        corruption.file(random, chosen, gone=True)
    swept(spoiled, inputs, path)


def swept(path, inputs, directory):
    """Load a model that may be spoiled, and sweep it where it is the tiny one in all but weights: that is compiled."""
    with bounded():
        try:
            loaded = hydra_jax.load(str(path))
        except UserError as error:
            refused(error)
        else:
            if loaded.config != inputs.model.config:
                return
        effects = sweep_anew(inputs.tree | dict(model=str(path)), directory / "run")
    if effects is not None:
        assert np.isfinite(effects["total_effect"]).all()
        if alike(loaded, inputs.model):
            rows = [effects["prompt_id"].values.tolist().index(name) for name in inputs.effects["prompt_id"].values]
            for name in variables.EFFECTS:
                np.testing.assert_allclose(effects[name].values[rows], inputs.effects[name].values, atol=1e-5)


def alike(one, other):
    """Whether two models have the same weights, and read the texts alike."""
    weights = jax.tree.map(np.array_equal, one.params.weights, other.params.weights)
    read = [[model.tokenizer.encode(text).ids for text in TEXTS] for model in (one, other)]
    return all(jax.tree.leaves(weights)) and read[0] == read[1]


def finished_input(random, inputs, path):
    """The store and the examples of a finished sweep."""
    spoil_store(random, inputs, inputs.finished, path)


def half_input(random, inputs, path):
    """The store of half a sweep."""
    spoil_store(random, inputs, inputs.half, path)


def spoil_store(random, inputs, workdir, path):
    workdir = shutil.copytree(workdir, path / "run")
    chosen = corruption.pick(random, sorted(path for path in workdir.rglob("*.zarr/**/*") if path.is_file()))
    corruption.file(random, chosen, gone=True)
    with bounded():
        found = [read_back(workdir)]
        try:
            run(inputs.config, workdir, progress=False)
        except UserError as error:
            refused(error)
        else:
            found.append(store.load_effects(workdir))
    for effects in found:
        if effects is not None:
            assert_same(effects, inputs.effects)
    assert {path.name for path in workdir.iterdir()} <= {store.NAME, store.EXAMPLES, "prompts.csv"}


def read_back(workdir, samples=10, seed=0):
    """The effects of a store that may be damaged, after a report of them was made; None if that is refused."""
    try:
        found = results.load(workdir, samples, seed)
        json.dumps(report.payload(found, (), None), allow_nan=False)
    except UserError as error:
        return refused(error)
    return found.effects


DRAWN = [kind.value for kind in Kind if kind.draws]
KINDS = {
    "config": config_input,
    "prompts": prompts_input,
    "gguf": gguf_input,
    "directory": directory_input,
    "finished": finished_input,
    "half": half_input,
}
CASES = list(itertools.islice(((kind, number) for number in itertools.count() for kind in KINDS), INPUTS))


@pytest.mark.parametrize(("kind", "number"), [pytest.param(*case, id="{}-{}-".format(*case)) for case in CASES])
def test_an_input_gives_the_right_result_or_one_line(inputs, tmp_path, kind, number):
    if number % PROGRAMS == PROGRAMS - 1:
        jax.clear_caches()
    try:
        KINDS[kind](corruption.generator(kind, number), inputs, tmp_path)
    finally:
        shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        dict(identity_tolerance=1e-300),
        dict(prompts=dict(text="the"), ablation=dict(replacements=5000)),
        dict(prompts=dict(path="a\nb")),
        dict(example="x\n" * 10_000),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_sweep_that_cannot_be_is_refused_and_leaves_nothing(inputs, tmp_path, changes):
    assert sweep_anew(inputs.tree | changes, tmp_path / "run") is None
