"""Stores that cannot be reported on, and their remedies, which lose nothing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from hydra_jax.analysis import results
from hydra_jax.errors import UserError
from hydra_jax.report import page as report
from hydra_jax.store import effects as store
from hydra_jax.store import variables
from tests.helpers import effects as toy_effects

ROOT = Path(__file__).parent.parent


@pytest.fixture
def stored(tmp_path):
    """A store that a report can be made of."""
    direct = np.random.default_rng(0).normal(1, 1, (6, 4, 2)).astype(np.float32)
    (tmp_path / "sweep").mkdir()
    toy_effects.stored(tmp_path / "sweep", toy_effects.effects(direct, direct), 3)
    return tmp_path / "sweep"


def spoil(path, how):
    """Make a store one that cannot be reported on."""
    zarr = path / store.NAME
    match how:
        case "not there":
            shutil.rmtree(zarr)
        case "a chunk missing":
            sorted(p for p in (zarr / "total_effect" / "c").rglob("*") if p.is_file())[0].unlink()
        case "a chunk damaged":
            chunk = sorted(p for p in (zarr / "compensation" / "c").rglob("*") if p.is_file())[0]
            chunk.write_bytes(chunk.read_bytes()[:10])
        case "a coordinate damaged":
            next(p for p in (zarr / "prompt_id" / "c").rglob("*") if p.is_file()).unlink()
        case "metadata damaged":
            (zarr / "zarr.json").write_text("{")
        case "an older format" | "another program":
            attributes = json.loads((zarr / "zarr.json").read_text())
            attributes["attributes"] = {"protocol": "{}", "format": 1} if how == "an older format" else {}
            (zarr / "zarr.json").write_text(json.dumps(attributes))
        case "nothing finished":
            xr.Dataset({"finished": ("prompt", np.zeros(6, bool))}).to_zarr(zarr, mode="r+", consolidated=False)
        case "a variable gone":
            shutil.rmtree(zarr / "direct_effect")


SPOILT = {
    "not there": "launch.sweep",
    "a chunk missing": "total_effect has holes; start the sweep again as it was",
    "a chunk damaged": "cannot be read .*; start the sweep again as it was",
    "a coordinate damaged": "'prompt_id' is damaged or missing; leave this one as it is and sweep into another",
    "metadata damaged": "cannot be read .*; leave this one as it is and sweep into another --workdir",
    "an older format": "format 1",
    "another program": "not a result store",
    "nothing finished": "none of its prompts is finished",
    "a variable gone": "'direct_effect' is damaged or missing; leave this one as it is",
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_store_that_cannot_be_reported_on_is_refused_in_one_line(stored, how):
    results.load(stored)
    spoil(stored, how)
    with pytest.raises(UserError, match=SPOILT[how]) as raised:
        results.load(stored)
    assert "\n" not in str(raised.value)
    assert str(stored) in str(raised.value)
    assert "delete" not in str(raised.value)


def test_damaged_chunks_alone_are_computed_again(stored):
    """The remedy of a damaged chunk: a sweep that goes on finds it, and no other."""
    sweep = store.load_effects(stored)
    for how in ("a chunk missing", "a chunk damaged"):
        spoil(stored, how)
        effects, chunks = store.open_effects(stored), store.chunks(stored)
        bad = [chunk for chunk in chunks if not store.sound(effects, chunk)]
        assert len(bad) == 1
        store.forget(stored, bad[0])
        assert not store.open_effects(stored)["finished"][bad[0]].any()
        names = [name for name in variables.VARIABLES if name in sweep]
        store.write(stored, bad[0], {name: sweep[name].values[bad[0]] for name in names})
        xr.testing.assert_identical(store.load_effects(stored), sweep)


def test_damaged_examples_are_written_again(stored):
    """The remedy of damaged examples: a sweep that goes on takes them for missing."""
    store.write_examples(stored, xr.Dataset({"x": ("example", np.arange(3.0))}))
    (next((stored / store.EXAMPLES / "x" / "c").iterdir())).unlink()
    with pytest.raises(UserError, match="'x' is damaged or missing; start the sweep again as it was"):
        results.load(stored)
    assert not store.has_examples(stored, "")
    (stored / store.EXAMPLES / "zarr.json").write_text("{")
    with pytest.raises(UserError, match="start the sweep again as it was"):
        results.load(stored)
    assert not store.has_examples(stored, "")


@pytest.mark.slow
def test_the_command_writes_the_page_or_one_line(stored):
    def run(*arguments):
        command = [sys.executable, "-m", "launch.report", f"--workdir={stored}", "--bootstrap=10", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run()
    assert done.returncode == 0, done.stderr
    assert (stored / report.PAGE).is_file()
    assert "The Hydra effect: cannot be told" in done.stdout
    before = {path.name for path in stored.iterdir()}
    spoil(stored, "another program")
    refused = run()
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert len(refused.stderr.strip().splitlines()) == 1
    assert {path.name for path in stored.iterdir()} == before
