"""Trained models compared, from runs to the page. They know nothing: which prompts all of them know is made up."""

import dataclasses
import shutil

import numpy as np
import pandas as pd
import pytest

from hydra_jax.analysis import results
from hydra_jax.comparison import report as comparison_report
from hydra_jax.comparison import run as comparison
from hydra_jax.errors import UserError
from hydra_jax.text.prompts import read
from hydra_jax.training import workdir
from hydra_jax.training.loop import train
from hydra_jax.weights import checkpoints as trained_weights
from hydra_jax.weights import trained
from tests.helpers import training as toy_training

CONFIG = toy_training.config(steps=4, data=dict(people=8))
RUNS = {"no_dropout": {}, "dropout": dict(attn=0.2, mlp=0.2)}
STEPS, LIMIT, REPLACEMENTS = [0, 4], 10, 3


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    for arm, rates in RUNS.items():
        arm_config = dataclasses.replace(CONFIG, arm=arm, dropout=dataclasses.replace(CONFIG.dropout, **rates))
        train(arm_config, directory / arm, progress=False)
    return [directory / arm for arm in RUNS]


@pytest.fixture
def known(monkeypatch):
    def some(runs, step, limit, progress):
        prompts = [p for p in read(str(runs[0].workdir / workdir.PROMPTS)) if p.id.startswith("trained/")]
        return prompts[:limit]

    monkeypatch.setattr(comparison, "common_prompts", some)


@pytest.mark.slow
class TestRuns:
    def test_are_read(self, workdirs):
        runs = comparison.read_runs(workdirs)
        assert [run.config.arm for run in runs] == list(RUNS)
        assert comparison.common_steps(runs) == [0, 2, 4]
        assert comparison.common_steps(runs, [4, 0]) == [0, 4]

    def test_are_found_by_patterns(self, workdirs):
        directory = workdirs[0].parent
        assert comparison.find([f"{directory}/*"]) == sorted(workdirs)
        assert comparison.find([str(workdirs[0]), f"{directory}/d*"]) == workdirs
        for nothing in ("", f"{directory}/x*"):
            with pytest.raises(UserError, match="--workdirs: there is nothing at"):
                comparison.find([nothing])

    def test_share_what_they_begin_with(self, workdirs):
        weights = [trained_weights.weights(path, checkpoint_like(path), 0)[1] for path in workdirs]
        assert weights[0] == weights[1]
        assert len({(path / trained.TOKENIZER).read_text() for path in workdirs}) == 1

    def test_step_that_is_not_there(self, workdirs):
        with pytest.raises(UserError, match=r"--steps: the runs have not step 3 in common; there are 0, 2, 4"):
            comparison.common_steps(comparison.read_runs(workdirs), [3])

    def test_of_an_arm_with_other_dropout(self, workdirs, tmp_path):
        copy = shutil.copytree(workdirs[1], tmp_path / "copy")
        text = (copy / trained.RUN).read_text()
        (copy / trained.RUN).write_text(
            text.replace('"mlp": 0.2', '"mlp": 0.3').replace('"seed": 0,\n    "steps"', '"seed": 1,\n    "steps"')
        )
        with pytest.raises(UserError, match="has other dropout than"):
            comparison.read_runs([workdirs[1], copy])

    def test_that_are_not_finished(self, workdirs, tmp_path):
        copy = shutil.copytree(workdirs[1], tmp_path / "copy")
        shutil.rmtree(copy / trained_weights.NAME / "4")
        with pytest.raises(UserError, match="has trained 2 of 4 steps"):
            comparison.read_runs([workdirs[0], copy])
        assert comparison.common_steps(comparison.read_runs([workdirs[0], copy], unfinished=True)) == [0, 2]

    def test_the_same_twice(self, workdirs):
        with pytest.raises(UserError, match="give each run once"):
            comparison.read_runs([workdirs[0], workdirs[0]])

    def test_of_another_config(self, workdirs, tmp_path):
        copy = shutil.copytree(workdirs[1], tmp_path / "copy")
        text = (copy / trained.RUN).read_text()
        (copy / trained.RUN).write_text(text.replace('"batch": 4', '"batch": 8'))
        with pytest.raises(UserError, match=r"does not match .* \(batch was 4, is 8\)"):
            comparison.read_runs([workdirs[0], copy])

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"config": {"nonsense": 1}, "vocab_size": 3, "corpus": ""}'])
    def test_damaged(self, workdirs, tmp_path, content):
        copy = shutil.copytree(workdirs[1], tmp_path / "copy")
        (copy / trained.RUN).write_text(content)
        with pytest.raises(UserError, match=r"train\.json: ") as complaint:
            comparison.read_runs([copy])
        assert "\n" not in str(complaint.value)

    def test_no_run(self, tmp_path):
        with pytest.raises(UserError, match=r"train\.json: is not there"):
            comparison.read_runs([tmp_path])

    @pytest.mark.slow
    def test_that_know_too_little(self, workdirs):
        with pytest.raises(UserError, match=r"all of the runs answer \d+ of 32 prompts right at step 4, .* needs 20"):
            comparison.common_prompts(comparison.read_runs(workdirs), 4, 10, False)


def checkpoint_like(path):
    from hydra_jax.training.step import initial

    return initial(CONFIG, workdir.read_run(path)[1]["vocab_size"]).weights


@pytest.mark.slow
@pytest.mark.usefixtures("known")
def test_a_comparison(workdirs, tmp_path):
    runs = comparison.read_runs(workdirs)
    options = dict(limit=LIMIT, replacements=REPLACEMENTS, samples=20, progress=False)
    found = comparison.compare(runs, tmp_path, STEPS, **options)
    assert found.arms == ["no_dropout", "dropout"]
    assert (found.prompts, found.last) == (LIMIT, 4)
    # Before the first step the arms are one model, so nothing differs, whatever is drawn.
    start = found.table[(found.table["step"] == 0) & (found.table["arm"] == "dropout")]
    said = start.dropna(subset="difference")  # where there is a direct effect to be a share of
    assert {"slope", "erasure", "responding"} <= set(said["measure"])
    np.testing.assert_array_equal(said[["difference", "difference_low", "difference_high"]], 0)
    end = found.final[found.final["arm"] == "dropout"]
    assert (end["difference"] != 0).any()
    # The same again from what is there, and the same prompts and answers in all models.
    again = comparison.compare(runs, tmp_path, STEPS, **options)
    pd.testing.assert_frame_equal(again.table, found.table)
    sweeps = [results.load(path, 20) for path in found.sweeps.values()]
    for name in ("prompt_id", "target_id"):
        np.testing.assert_array_equal(*(sweep.effects.sortby("prompt_id")[name] for sweep in sweeps))
    answers = {p.id: p.answer for p in read(str(tmp_path / comparison.COMMON))}
    for identity, target in zip(
        sweeps[0].effects["prompt_id"].values, sweeps[0].effects["target_text"].values, strict=True
    ):
        assert answers[str(identity)].startswith(str(target).strip())

    paths = comparison_report.write(tmp_path, found, sweeps[0])
    assert all(path.stat().st_size for path in paths)
    page = paths[-1].read_text()
    assert "Matched models, with dropout and without" in page
    assert page.count("<img alt=") == 3
    read_again = comparison_report.read(tmp_path)
    assert comparison_report.section(tmp_path, read_again) == comparison_report.section(tmp_path, found)
    (tmp_path / "recall.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"cannot be read"):
        comparison_report.read(tmp_path)
    text = comparison_report.text(found)
    assert "no_dropout" in text
    assert "restored share" in text
    late = comparison.compare(runs, tmp_path, STEPS, **options, from_layer=1)
    assert (late.final.loc[late.final["measure"] == "layers", "value"] == 1).all()
    other = dict(options, limit=LIMIT - 1)
    with pytest.raises(UserError, match="holds a comparison on other prompts"):
        comparison.compare(runs, tmp_path, STEPS, **other)
