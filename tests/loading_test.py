import json
import sys
import tempfile

import pytest

from hydra_jax.benchmarks import loading
from hydra_jax.errors import UserError
from hydra_jax.weights.load import load
from tests.helpers import models as toy_models

SHAPE = toy_models.config(dtype="bfloat16")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_written_checkpoint_is_a_model_of_its_size(tmp_path):
    size = loading.write_checkpoint(tmp_path, SHAPE)
    assert size == loading.checkpoint_bytes(SHAPE)
    assert len(list(tmp_path.glob("*.safetensors"))) == SHAPE.layers + 1
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size < on_disk < size + 10_000
    assert load(str(tmp_path), dtype="bfloat16").config == SHAPE


def program(name, *arguments):
    return [sys.executable, "-m", f"tests.programs.{name}", *map(str, arguments)]


@pytest.mark.parametrize("kept", [True, False])
def test_what_a_process_holds_is_seen(tmp_path, monkeypatch, kept):
    """Also what it holds no longer in the end."""
    polled = loading._anonymous

    def peak(size):
        ready, measured = (tmp_path / f"{name}-{size}" for name in ("ready", "measured"))

        def anonymous(pid):
            there, taken = ready.exists(), polled(pid)
            if there:
                measured.touch()
            return taken

        monkeypatch.setattr(loading, "_anonymous", anonymous)
        return loading.peak_anonymous(program("hold_memory", size, ready, measured, *["--drop"][kept:]))

    assert 95e6 < peak(100_000_000) - peak(1) < 110e6


def test_a_process_that_fails_is_reported_in_one_line():
    with pytest.raises(UserError, match=r"ended with 3 \(no room\)$"):
        loading.peak_anonymous(program("fail", 3, "x", "no room"))


@pytest.mark.slow
def test_checkpoints_are_loaded_one_by_one_and_removed(temporary):
    rows = list(loading.measure(SHAPE, (1, 2)))
    assert [row.layers for row in rows] == [1, 2]
    assert rows[0].checkpoint_bytes < rows[1].checkpoint_bytes
    for row in rows:
        assert row.ratio == row.peak_bytes / row.checkpoint_bytes
        assert row.peak_bytes > 50e6  # Python and JAX
    assert not list(temporary.iterdir())


def test_a_full_disk_leaves_nothing(temporary, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loading.safetensors.numpy, "save_file", full)
    with pytest.raises(UserError, match=r"No space left on device; free 0\.0 GB"):
        next(loading.measure(SHAPE, (1,)))
    assert not list(temporary.iterdir())


def test_a_line_goes_through_both_checkpoints():
    small, large = (loading.Loaded(n, n * 10**9, 2 * 10**8 + n * 11 * 10**8, 0, 1) for n in (1, 3))
    fitted = loading.line(small, large)
    assert fitted.slope == pytest.approx(1.1)
    assert fitted.offset_bytes == pytest.approx(2e8)
    assert fitted.whole_bytes == pytest.approx(13.48e9, rel=1e-3)  # Llama 7B, as published
    assert fitted.whole_ratio == pytest.approx(1.1 + 0.2 / 13.48, rel=1e-3)
    assert "slope: 1.100" in loading.table([small, large], fitted)


def test_the_shape_is_that_of_the_settings(tmp_path):
    loading.write_checkpoint(tmp_path, SHAPE)
    stated = json.loads((tmp_path / "config.json").read_text())
    assert stated["num_hidden_layers"] == SHAPE.layers
    assert stated["torch_dtype"] == "bfloat16"
