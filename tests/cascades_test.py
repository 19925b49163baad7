"""Cascades against counts done by hand."""

import numpy as np
import pytest

from hydra_jax.analysis import cascades
from hydra_jax.analysis.stats import bootstrap
from hydra_jax.errors import UserError
from tests.helpers import effects as toy_effects

# By prompt, the cuts that were made: component, logit, probability, rank in each of two replacements.
PLAN = [
    [(2, 0.6, 0.5, (0, 0)), (5, 0.2, 0.3, (0, 0)), (7, -0.2, 0.1, (3, 4))],
    [(2, 0.4, 0.4, (1, 2)), (3, 0.0, 0.2, (0, 0))],
    [(4, 0.8, 0.9, (0, 0))],
    [(2, 0.2, 0.1, (0, 1)), (5, 0.1, 0.1, (0, 0)), (6, 0.1, 0.1, (0, 0))],
]


@pytest.fixture
def effects():
    dataset = toy_effects.rich(prompts=4, replacements=2, cuts=3, positions=1)
    dataset["cut_component"][:] = -1
    for name in ("cut_logit", "cut_probability", "cut_rank", "cut_compensation"):
        dataset[name][:] = np.nan
    for prompt, cuts in enumerate(PLAN):
        for step, (component, logit, probability, ranks) in enumerate(cuts):
            dataset["cut_component"][prompt, step] = component
            dataset["cut_logit"][prompt, step] = logit + np.array([-0.1, 0.1])
            dataset["cut_probability"][prompt, step] = probability
            dataset["cut_rank"][prompt, step] = np.array(ranks)
            dataset["cut_compensation"][prompt, step] = 0
            dataset["cut_compensation"][prompt, step, 6] = prompt + 1
    return dataset


def test_the_table_is_of_the_last_cut_that_each_prompt_had(effects):
    table = cascades.cascade(effects, samples=50)
    assert table["cuts"].tolist() == [0, 1, 2, 3]
    assert table["prompts"].tolist() == [4, 4, 3, 2]
    logits = np.array([[1, 1, 1, 1], [0.6, 0.4, 0.8, 0.2], [0.2, 0, 0.8, 0.1], [-0.2, 0, 0.8, 0.1]])
    np.testing.assert_allclose(table["logit"], logits.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(table["logit_median"], np.median(logits, axis=1), atol=1e-6)
    np.testing.assert_allclose(table["logit_lower_quartile"], np.quantile(logits, 0.25, axis=1), atol=1e-6)
    np.testing.assert_allclose(table["probability"], [1, 1.9 / 4, 1.5 / 4, 1.3 / 4], atol=1e-6)
    # A prompt whose rank is 0 in one of two replacements alone does not survive: half is not more than half.
    np.testing.assert_allclose(table["survives"], [1, 2 / 4, 4 / 4, 3 / 4])
    assert (table["logit_low"] <= table["logit"] + 1e-9).all()
    assert (table["logit"] <= table["logit_high"] + 1e-9).all()


def test_intervals_are_of_the_sweeps_own_draws(effects):
    draws = bootstrap(effects, samples=80).draws
    table = cascades.cascade(effects, draws)
    logit = np.array([0.6, 0.4, 0.8, 0.2])
    drawn = [np.repeat(logit, row).mean() for row in draws.prompts]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (table["logit_low"][1], table["logit_high"][1]) == (
        pytest.approx(low, abs=1e-6),
        pytest.approx(high, abs=1e-6),
    )


def test_cuts_survived_in_a_row(effects):
    assert cascades.survived(effects).tolist() == [2, 0, 1, 0]
    survival = cascades.survival(effects, samples=50)
    assert survival["mean"].value == pytest.approx(3 / 4)
    assert survival["median"].value == pytest.approx(0.5)
    assert survival["mean"].low <= 3 / 4 <= survival["mean"].high


def test_who_was_cut_and_who_repaired(effects):
    steps = cascades.cascade_steps(effects)
    cut = {(row.step, row.component): (row.times_cut, row.share_cut) for row in steps.itertuples() if row.times_cut}
    assert cut == {
        (1, "attn 1"): (3, 0.75),
        (1, "attn 2"): (1, 0.25),
        (2, "mlp 2"): (2, pytest.approx(2 / 3)),
        (2, "mlp 1"): (1, pytest.approx(1 / 3)),
        (3, "mlp 3"): (1, 0.5),
        (3, "attn 3"): (1, 0.5),
    }
    repair = {row.step: row.repair for row in steps.itertuples() if row.component == "attn 3"}
    assert repair == {1: pytest.approx(10 / 4), 2: pytest.approx(7 / 3), 3: pytest.approx(5 / 2)}


def test_replacements_without_a_value_are_left_out(effects):
    effects["cut_logit"][0, 0, 0] = np.nan
    effects["cut_rank"][0, 0, 0] = np.nan
    table = cascades.cascade(effects, samples=20)
    assert table["logit"][1] == pytest.approx((0.7 + 0.4 + 0.8 + 0.2) / 4)
    assert cascades.survived(effects)[0] == 2


def test_survival_of_the_clean_run_is_told_only_where_it_is_known(effects):
    read = {"source": "made up", "sha256": "0", "kind": "records", "correct_only": False, "limit": 0}
    answers = toy_effects.rich(prompts=6, protocol={"readout": {"target": "answer"}})
    assert np.isnan(cascades.cascade(answers, samples=5)["survives"][0])
    right = {"readout": {"target": "answer"}, "prompts": read | {"correct_only": True}}
    assert cascades.cascade(toy_effects.rich(prompts=6, protocol=right), samples=5)["survives"][0] == 1


def test_a_sweep_without_cascades_is_refused_in_one_line(effects):
    with pytest.raises(UserError, match=r"cascade: the sweep made none; sweep with --config\.ablation\.cascade"):
        cascades.cascade(effects.drop_vars("cut_rank"))
    effects["cut_component"][:] = -1
    with pytest.raises(UserError, match="no prompt was cut"):
        cascades.survived(effects)
