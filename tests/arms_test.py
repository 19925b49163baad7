"""Comparisons of arms with planted effects."""

import numpy as np
import pytest

from hydra_jax.analysis.bootstrap import Bootstrap
from hydra_jax.comparison import arms
from hydra_jax.comparison import report as comparison_report
from hydra_jax.comparison.arms import Key
from tests.helpers import effects as toy_effects

PROMPTS, LAYERS, DRAWS = 60, 4, 5


def draw(samples, prompts=PROMPTS, replacements=DRAWS):
    return Bootstrap.draw_all(prompts, replacements, samples, np.random.default_rng(0))


def sweep(restored, seed, mlp=0.0, prompts=PROMPTS):
    """A sweep in which `restored` of attention 1's direct effect comes back by attention, and `mlp` of it by MLPs."""
    random = np.random.default_rng(seed)
    direct = np.zeros((prompts, 2 * LAYERS, DRAWS), np.float32)
    direct[:, 2] = 2 + random.normal(size=(prompts, 1)) + 0.1 * random.normal(size=(prompts, DRAWS))
    direct[:, 0] = 0.01  # too little to matter
    effects = toy_effects.effects(
        direct, restored * direct + 0.05 * random.normal(size=direct.shape).astype(np.float32)
    )
    effects["mlp_compensation"][:, 2] = mlp * direct[:, 2]
    effects["compensation"][:, 2, 4] = restored * direct[:, 2].mean(axis=1)
    effects["compensation"][:, 2, 7] = mlp * direct[:, 2].mean(axis=1)
    effects["compensation"][:, 2, 5] = 1e-6
    effects["delta_unembed"][:] = 0
    effects["delta_unembed"][:, 7] = -0.5
    return effects


def compared(restored_by_arm, seeds=3, samples=200, spread=0.0):
    draws = draw(samples)
    random = np.random.default_rng(1)
    measured = {
        Key(arm, seed, 10): arms.measures(sweep(restored + spread * random.normal(), seed), draws)
        for arm, restored in restored_by_arm.items()
        for seed in range(seeds)
    }
    table = arms.compared(arms.by_arm(measured, draws, 0), measured)
    return table[table["ablated"] == "attn"].set_index(["arm", "measure"])


class TestMeasures:
    def test_are_what_was_planted(self):
        measured = arms.measures(sweep(0.4, 0, 0.2), draw(3))
        assert set(measured) == {(site, name) for site in ("attn", "mlp") for name in arms.MEASURES}
        attention = {name: values[0] for (site, name), values in measured.items() if site == "attn"}
        np.testing.assert_allclose(
            [attention[name] for name in ("restored_share", "attn_share", "mlp_share", "norm_share", "slope")],
            [0.6, 0.4, 0.2, 0.0, 0.6],
            atol=0.02,
        )
        assert attention["r2"] > 0.95
        # Of the last third of four layers, MLP 3 alone: -0.5 clean; and components 4 and 7 of the three that move.
        np.testing.assert_allclose(attention["erasure"], -0.5, rtol=1e-5)
        np.testing.assert_allclose(attention["erasure_change"], 0.2, rtol=1e-4)
        np.testing.assert_allclose(attention["responding"], 2 / 3, rtol=1e-5)

    def test_resamples_of_few_prompts_spread_more(self):
        few, many = (
            arms.measures(sweep(0.4, 0, prompts=prompts), draw(300, prompts))["attn", "restored_share"][1:].std()
            for prompts in (8, 200)
        )
        assert few > 2 * many > 0

    def test_the_first_sample_is_everything_once(self):
        draws = draw(5, prompts=7, replacements=3)
        np.testing.assert_allclose(draws.prompt_weights[0], 1 / 7)
        np.testing.assert_allclose(draws.replacement_weights[:, 0], 1 / 3)
        np.testing.assert_allclose(draws.prompt_weights.sum(axis=1), 1, rtol=1e-6)
        np.testing.assert_allclose(draws.replacement_weights.sum(axis=2), 1, rtol=1e-6)


class TestArms:
    def test_a_planted_difference_is_found(self):
        table = compared({"no_dropout": 0.3, "dropout": 0.6})
        row = table.loc["dropout", "restored_share"]
        assert row["difference_low"] < 0.3 < row["difference_high"]
        assert row["verdict"] == "higher"
        assert table.loc["dropout", "slope"]["verdict"] == "higher"
        assert np.isnan(table.loc["no_dropout", "slope"]["difference"])

    def test_none_is_not(self):
        row = compared({"no_dropout": 0.5, "dropout": 0.5}, spread=0.05).loc["dropout", "restored_share"]
        assert row["verdict"] == "no clear difference"

    def test_chance_is_seldom_taken_for_a_difference(self):
        random, wrong = np.random.default_rng(0), 0
        for _ in range(300):
            pairs = random.normal(size=3)
            # What a bootstrap over three seeds comes to: its ends are the seeds' own extremes.
            wrong += arms.verdict(pairs.min(), pairs.max(), list(pairs)) != "no clear difference"
        assert wrong / 300 < 0.09

    def test_one_seed_says_nothing_of_an_arm(self):
        assert arms.verdict(0.5, 0.6, [0.55]) == "cannot be told"

    def test_seeds_that_differ_widen_the_interval(self):
        alike, apart = (compared({"no_dropout": 0.5}, spread=s).loc["no_dropout", "slope"] for s in (0.0, 0.2))
        assert apart["high"] - apart["low"] > 3 * (alike["high"] - alike["low"])
        assert apart["seeds"].count(";") == 2

    def test_nothing_is_said_of_a_share_of_nothing(self):
        draws = draw(50)
        effects = sweep(0.5, 0)
        effects["direct_effect"][:, 2] -= effects["direct_effect"][:, 2].mean() - 0.02
        measured = {Key("no_dropout", 0, 0): arms.measures(effects, draws)}
        table = arms.compared(arms.by_arm(measured, draws, 0), measured).set_index(["ablated", "measure"])
        assert np.isnan(table.loc[("attn", "restored_share"), "value"])
        assert np.isfinite(table.loc[("attn", "slope"), "value"])

    def test_arms_without_the_same_seeds(self):
        draws = draw(50)
        measured = {
            Key(arm, seed, 0): arms.measures(sweep(0.5, seed), draws)
            for arm, seed in (("no_dropout", 0), ("no_dropout", 1), ("dropout", 2))
        }
        table = arms.compared(arms.by_arm(measured, draws, 0), measured)
        assert np.isfinite(table.loc[table["ablated"] == "attn", ["value", "low", "high"]].values).all()


@pytest.mark.parametrize(
    ("planted", "says"),
    [
        ({"no_dropout": 0.5, "dropout": 0.8}, ["no_dropout 50%", "dropout 80%", "higher (+3"]),
        ({"no_dropout": 0.5, "dropout": 0.2}, ["no_dropout 50%", "lower (-3"]),
        ({"no_dropout": -0.5, "dropout": -0.5}, ["no_dropout -50%", "no clear difference"]),
        ({"dropout": 0.5}, ["attention", "dropout 50% ("]),
    ],
)
def test_the_answer(planted, says):
    (answer,) = comparison_report.answer(compared(planted).reset_index(), list(planted))
    for words in says:
        assert words in answer
