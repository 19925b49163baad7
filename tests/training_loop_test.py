"""Runs in their directories: resumed, refused, damaged. Whole commands are in train_command_test."""

import dataclasses
import json
import shutil
import signal

import jax
import numpy as np
import pytest

from hydra_jax.engine import mesh
from hydra_jax.errors import UserError
from hydra_jax.training import checkpoint, loop, workdir
from hydra_jax.training.loop import Stopped, train
from hydra_jax.training.step import initial
from hydra_jax.weights import checkpoints as trained_weights
from hydra_jax.weights import source
from hydra_jax.weights.load import load
from tests.helpers import checkpoints
from tests.helpers import training as toy_training

CONFIG = toy_training.config(dropout=dict(attn=0.1, depth=0.1))
"""With dropout, so that its keys have to be gone on with, too."""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """An undisturbed run."""
    path = tmp_path_factory.mktemp("runs") / "done"
    train(CONFIG, path, progress=False)
    return path


def final(path, config=CONFIG):
    _, stated = workdir.read_run(path)
    weights, _, step = trained_weights.weights(path, initial(config, stated["vocab_size"]).weights)
    assert step == config.steps
    return weights


def assert_same(path, other):
    jax.tree.map(np.testing.assert_array_equal, final(path), final(other))
    times = {"tokens_per_second"}
    lines = [workdir.read_metrics(directory).drop(columns=times).to_csv() for directory in (path, other)]
    assert lines[0] == lines[1]


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Have a signal come in during a step."""
    batch, count = loop._Run._batch, iter(range(1, 100))

    def interrupted(self):
        if next(count) == step:
            signal.raise_signal(number)
        return batch(self)

    monkeypatch.setattr(loop._Run, "_batch", interrupted)


class TestWorkdir:
    def test_what_is_in_it(self, done):
        assert trained_weights.steps(done) == [0, 4, 6]  # every fourth, and the last two: 4 and 6
        lines = [json.loads(line) for line in (done / workdir.METRICS).read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(7))
        assert [line["step"] for line in lines if "recall_trained" in line] == [0, 3, 6]
        assert lines[1]["loss"] > lines[6]["loss"] > 0
        prompts = [json.loads(line) for line in (done / workdir.PROMPTS).read_text().splitlines()]
        assert len(prompts) == 4 * (2 * CONFIG.data.people + CONFIG.data.unseen_people)
        assert workdir.read_run(done)[0] == CONFIG

    @pytest.mark.slow
    def test_is_a_model_at_every_step(self, done):
        last, first = load(str(done)), load(str(done), step=0)
        assert last.dropout == 0.1
        assert last.weights_hash != first.weights_hash
        jax.tree.map(np.testing.assert_array_equal, last.params.weights, final(done))
        text = json.loads((done / workdir.PROMPTS).read_text().splitlines()[0])["prompt"]
        assert last.tokenizer.decode(last.tokenizer.encode(text).ids) == text
        assert load(str(done), dtype="bfloat16").params.weights["embedding"].dtype == "bfloat16"

    def test_as_a_model_whose_layers_are_streamed(self, done):
        whole, limit = load(str(done)), 1.1 * mesh.bytes_a_device(load(str(done)).config, 1)
        streamed = source.open(str(done)).load(limit=limit, say=lambda line: None)
        assert streamed.streamed
        assert streamed.weights_hash == whole.weights_hash
        for one, other in zip(whole.layers, streamed.layers, strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, other)
        rest = {name: leaf for name, leaf in whole.params.weights.items() if name != "layers"}
        jax.tree.map(np.testing.assert_array_equal, rest, streamed.params.weights)

    def test_a_step_that_is_not_kept(self, done):
        with pytest.raises(UserError, match=r"no checkpoint of step 5; there are 0, 4, 6"):
            load(str(done), step=5)

    def test_a_step_of_another_kind_of_model(self, tmp_path):
        directory = checkpoints.hugging_face_directory(tmp_path / "model")
        with pytest.raises(UserError, match="is not a directory of a training run"):
            load(str(directory), step=5)


class TestResume:
    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_stopped_by_a_signal(self, done, tmp_path, monkeypatch, number):
        with monkeypatch.context() as patch:
            stop_at(patch, 3, number)
            with pytest.raises(Stopped) as stopped:
                train(CONFIG, tmp_path / "run", progress=False)
        assert (stopped.value.signal, stopped.value.step) == (number, 3)
        assert trained_weights.steps(tmp_path / "run")[-1] == 3
        train(CONFIG, tmp_path / "run", progress=False)
        assert_same(tmp_path / "run", done)

    @pytest.mark.slow
    def test_before_the_first_step(self, done, tmp_path, monkeypatch):
        for saved in (False, True):
            path = tmp_path / str(saved)
            with monkeypatch.context() as patch:
                save = loop._Run._save

                def broken(self, state, saved=saved, save=save):
                    if saved:
                        save(self, state)
                    raise RuntimeError("gone")

                patch.setattr(loop._Run, "_save", broken)
                with pytest.raises(RuntimeError, match="gone"):
                    train(CONFIG, path, progress=False)
            train(CONFIG, path, progress=False)
            assert_same(path, done)

    @pytest.mark.slow
    def test_after_what_was_not_saved(self, done, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            count = iter(range(1, 100))
            batch = loop._Run._batch

            def broken(self):
                if next(count) == 4:
                    raise RuntimeError("gone")
                return batch(self)

            patch.setattr(loop._Run, "_batch", broken)
            with pytest.raises(RuntimeError, match="gone"):
                train(CONFIG, tmp_path / "run", progress=False)
        path = tmp_path / "run" / workdir.METRICS
        assert json.loads(path.read_text().splitlines()[-1])["step"] == 3
        with path.open("a") as file:
            file.write('{"step": 4, "lo')  # as a kill leaves it
        (tmp_path / "run" / trained_weights.NAME / "4.orbax-checkpoint-tmp-1").mkdir()
        train(CONFIG, tmp_path / "run", progress=False)
        assert_same(tmp_path / "run", done)
        assert not list((tmp_path / "run" / trained_weights.NAME).glob("*tmp*"))

    def test_a_finished_run_stays_as_it_is(self, done, tmp_path):
        copy = shutil.copytree(done, tmp_path / "copy")
        before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        train(CONFIG, copy, progress=False)
        assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


class TestRefusals:
    def test_another_configuration(self, done):
        before = trained_weights.steps(done)
        with pytest.raises(
            UserError, match=r"another configuration \(batch was 4, is 8; dropout.attn was 0.1, is 0.2\)"
        ):
            train(
                dataclasses.replace(CONFIG, batch=8, dropout=dataclasses.replace(CONFIG.dropout, attn=0.2)), done, False
            )
        assert trained_weights.steps(done) == before

    def test_a_model_from_elsewhere(self, tmp_path):
        directory = checkpoints.hugging_face_directory(tmp_path / "model")
        before = {path.name: path.read_bytes() for path in directory.iterdir()}
        with pytest.raises(UserError, match="holds another model"):
            train(CONFIG, directory, progress=False)
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == before

    @pytest.mark.slow
    def test_other_text(self, tmp_path):
        text = checkpoints.text_file(tmp_path / "a.txt", "".join(f"some text {n} " for n in range(900)))
        config = toy_training.config(data=dict(kind="text", path=str(text)), steps=2)
        train(config, tmp_path / "run", progress=False)
        metrics = workdir.read_metrics(tmp_path / "run")
        assert metrics["unseen_loss"].notna().sum() == 2
        checkpoints.text_file(text, "".join(f"other text {n} " for n in range(900)))
        with pytest.raises(UserError, match="was begun on other text"):
            train(config, tmp_path / "run", progress=False)

    def test_a_batch_that_does_not_divide_over_devices(self, tmp_path):
        with pytest.raises(UserError, match=r"config\.batch: 6 in 1 parts does not divide over 4 devices"):
            train(toy_training.config(batch=6), tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()

    @pytest.mark.slow
    def test_a_loss_that_is_not_a_number(self, tmp_path):
        config = toy_training.config(optimizer=dict(learning_rate=1e30, warmup=1))
        with pytest.raises(UserError, match=r"by step \d the loss or its gradient is not a number; .* saved is \d"):
            train(config, tmp_path / "run", progress=False)
        for step in trained_weights.steps(tmp_path / "run"):
            weights, _, _ = trained_weights.weights(tmp_path / "run", initial(config, 300).weights, step)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights))

    @pytest.mark.slow
    def test_a_damaged_checkpoint_is_not_gone_on_from(self, done, tmp_path):
        copy = shutil.copytree(done, tmp_path / "copy")
        damage(copy / trained_weights.NAME / "6" / "optimizer", "flipped")
        with pytest.raises(UserError, match=r"checkpoints/6: is damaged .*; delete it to go on from"):
            train(CONFIG, copy, progress=False)
        assert trained_weights.steps(copy) == [0, 4, 6]
        shutil.rmtree(copy / trained_weights.NAME / "6")
        train(CONFIG, copy, progress=False)
        assert_same(copy, done)


@pytest.fixture(scope="module")
def like(done):
    return initial(CONFIG, workdir.read_run(done)[1]["vocab_size"])


class TestDamage:
    @pytest.mark.parametrize("part", ["weights", "optimizer", "position"])
    @pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
    def test_is_found(self, done, tmp_path, like, part, how):
        copy = shutil.copytree(done, tmp_path / "copy")
        with checkpoint.Checkpoints(copy, CONFIG.checkpoint) as saved:
            saved.restore(like)
            damage(copy / trained_weights.NAME / "6" / part, how)
            with pytest.raises(UserError, match=r"checkpoints/6: is damaged .*; delete it to go on from") as complaint:
                saved.restore(like)
            assert "\n" not in str(complaint.value)
            saved.restore(like, step=4)

    def test_is_found_where_a_position_is_another_ones(self, done, tmp_path, like):
        copy = shutil.copytree(done, tmp_path / "copy")
        directory = copy / trained_weights.NAME
        with checkpoint.Checkpoints(copy, CONFIG.checkpoint) as saved:
            saved.restore(like)
            shutil.rmtree(directory / "6" / "position")
            shutil.copytree(directory / "4" / "position", directory / "6" / "position")
            with pytest.raises(UserError, match=r"checkpoints/6: is damaged \(position/.* is not as it was written"):
                saved.restore(like)

    def test_a_checkpoint_without_sums_is_read(self, done, tmp_path, like):
        # As where a run is killed between the two; the next save notes them.
        copy = shutil.copytree(done, tmp_path / "copy")
        (copy / trained_weights.SUMS).unlink()
        with checkpoint.Checkpoints(copy, CONFIG.checkpoint) as saved:
            saved.restore(like)
        assert (copy / trained_weights.SUMS).read_text() == (done / trained_weights.SUMS).read_text()

    def test_sums_that_cannot_be_read(self, done, tmp_path, like):
        copy = shutil.copytree(done, tmp_path / "copy")
        (copy / trained_weights.SUMS).write_text("{")
        with pytest.raises(UserError, match=r"checkpoints\.json: cannot be read .*; delete it"):
            trained_weights.weights(copy, like.weights)


def damage(part, how):
    """To the largest file of a part of a checkpoint, or all of it."""
    if how == "gone":
        shutil.rmtree(part)
        return
    largest = max((path for path in part.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content, middle = largest.read_bytes(), largest.stat().st_size // 2
    flipped = content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]
    largest.write_bytes(flipped if how == "flipped" else content[:middle])
