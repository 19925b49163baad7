import numpy as np
import pandas as pd
import pytest
import scipy.stats

from hydra_jax.analysis.bootstrap import Bootstrap, Estimate, interval
from hydra_jax.analysis.findings import UNTOLD, findings
from hydra_jax.analysis.stats import bootstrap, erasure, selected, summary, tabulate
from hydra_jax.errors import UserError
from tests.helpers import effects as toy_effects


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_statistics_have_their_closed_forms(random):
    direct = random.normal(2, 1, (50, 4, 3)).astype(np.float32)
    table = summary(toy_effects.effects(direct, 0.7 * direct + 0.1), samples=10)
    means = direct.mean(axis=2)
    np.testing.assert_allclose(table["slope"], 0.7, rtol=1e-4)
    np.testing.assert_allclose(table["r2"], 1, rtol=1e-4)
    np.testing.assert_allclose(table["direct_effect"], means.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(table["compensation"], 0.7 * means.mean(axis=0) + 0.1, rtol=1e-5)
    np.testing.assert_allclose(table["restored_share"], 0.7 + 0.1 / means.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(table["share_direct_above_total"], (0.7 * means + 0.1 > 0).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(table["delta_unembed"], np.arange(200).reshape(50, 4).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(table["intercept"], 0.1, atol=1e-3)
    np.testing.assert_allclose(table["attn_slope"], 0.7, rtol=1e-4)
    np.testing.assert_allclose(table["mlp_slope"], 0, atol=1e-6)
    assert table[["layer", "site"]].to_numpy().tolist() == [[0, "attn"], [0, "mlp"], [1, "attn"], [1, "mlp"]]


@pytest.mark.slow
def test_intervals_of_a_mean_are_as_wide_as_theory_says(random):
    direct = random.normal(0, 2, (400, 2, 1)).astype(np.float32)
    table = summary(toy_effects.effects(direct, np.zeros_like(direct)), samples=2000)
    width = table["direct_effect_high"] - table["direct_effect_low"]
    expected = 2 * 1.96 * direct.std(axis=0)[:, 0] / 20
    np.testing.assert_allclose(width, expected, rtol=0.1)
    assert (table["direct_effect_low"] < table["direct_effect"]).all()
    assert (table["direct_effect"] < table["direct_effect_high"]).all()


@pytest.mark.slow
def test_intervals_know_of_the_replacements(random):
    """Prompts all alike: what is uncertain comes from their replacements alone."""
    one = random.normal(0, 1, 5).astype(np.float32)
    direct = np.broadcast_to(one, (30, 2, 5)).copy()
    table = summary(toy_effects.effects(direct, np.zeros_like(direct)), samples=2000)
    expected = 2 * 1.96 * one.std() / np.sqrt(30 * 5)
    np.testing.assert_allclose(table["direct_effect_high"] - table["direct_effect_low"], expected, rtol=0.15)


def test_intervals_equal_a_plain_bootstrap(random):
    direct = random.gamma(1.0, 2.0, (60, 2, 4)).astype(np.float32)
    effects = toy_effects.effects(direct, 0.5 * direct + random.normal(0, 1, direct.shape).astype(np.float32))
    table = summary(effects, samples=3000)
    compensation = effects["attn_compensation"].values
    shares = []
    for _ in range(3000):
        prompts = random.integers(0, 60, 60)
        draws = random.integers(0, 4, (60, 1, 4))
        x, y = (np.take_along_axis(a[prompts], draws, axis=2).mean(axis=(0, 2)) for a in (direct, compensation))
        shares.append(y / x)
    low, high = np.quantile(shares, [0.025, 0.975], axis=0)
    np.testing.assert_allclose(table["restored_share_low"], low, atol=0.03)
    np.testing.assert_allclose(table["restored_share_high"], high, atol=0.03)


@pytest.mark.slow
def test_nothing_is_restored_where_nothing_was_taken(random):
    direct = random.normal(0, 1, (40, 2, 3)).astype(np.float32)
    direct[:, 1] += 5
    table = summary(toy_effects.effects(direct, 0.5 * direct), samples=200)
    assert table["restored_share"].isna().tolist() == [True, False]
    assert table["restored_share_low"].isna().tolist() == [True, False]


def test_a_share_needs_a_direct_effect_clearly_above_zero(random):
    """Where the direct effect is clearly below zero, a share of it would be of a loss that was none."""
    direct = random.normal(0, 0.1, (40, 4, 3)).astype(np.float32) + np.array([-0.5, 0, 0.5, 5], np.float32)[:, None]
    table = summary(toy_effects.effects(direct, 0.5 * direct), samples=200)
    for end in ("", "_low", "_high"):
        assert table[f"restored_share{end}"].isna().tolist() == [True, True, False, False]
    np.testing.assert_allclose(table["restored_share"][2:], 0.5, rtol=1e-4)


@pytest.mark.parametrize("prompts", [1, 2, 3, 4, 30])
@pytest.mark.parametrize("varies", [True, False])
def test_few_prompts_and_constant_effects_have_no_regression(random, prompts, varies):
    """No warning either: they are errors here."""
    direct = np.full((prompts, 4, 2), 1234.5, np.float32)
    if varies:
        direct += random.normal(0, 1, direct.shape).astype(np.float32)
    effects = toy_effects.effects(direct, 0.3 * direct)
    effects["ablated_delta_unembed"][:] = 0.1
    resampled = bootstrap(effects, samples=100)
    table = tabulate(effects, resampled)
    regressed = [f"{part}{name}" for part in ("", "attn_") for name in ("slope", "r2")] + ["intercept"]
    known = prompts >= 4 and varies
    for name in regressed:
        assert table[name].notna().tolist() == [known] * 4, name
    assert table["total_r2"].isna().all()  # of a contribution that is the same in all prompts
    fits = np.concatenate([resampled.samples[name].ravel() for name in ("r2", "attn_r2", "total_r2")])
    assert ((fits >= 0) & (fits <= 1))[np.isfinite(fits)].all()
    assert np.isfinite(table[["direct_effect_low", "total_effect_high", "restored_share"]]).all(axis=None)
    found = findings(effects, resampled, None)
    assert not any("nan" in finding.measured for finding in found)


def test_a_fit_is_never_above_one(random):
    direct = (1000 + random.normal(0, 1e-3, (30, 4, 1))).astype(np.float32)
    resampled = bootstrap(toy_effects.effects(direct, direct), samples=200)
    fits = resampled.samples["r2"]
    assert np.nanmax(fits) <= 1
    assert np.nanmin(fits) >= 0


def of_texts(effects, ids):
    return effects.assign_coords(text_id=("prompt", np.array(ids, dtype=object)))


def test_texts_of_one_position_each_are_prompts(random):
    direct = random.normal(1, 1, (20, 2, 3)).astype(np.float32)
    effects = toy_effects.effects(direct, direct / 2)
    plain, alone = (
        bootstrap(effects, samples=30),
        bootstrap(of_texts(effects, [f"t{i}" for i in range(20)]), samples=30),
    )
    for name, samples in plain.samples.items():
        np.testing.assert_array_equal(samples, alone.samples[name])


def test_positions_of_a_text_are_drawn_together(random):
    sizes = [1, 2, 5, 3, 1, 4, 2, 6, 3, 3]
    texts = np.repeat(np.arange(10), sizes)
    direct = np.repeat(random.normal(2, 1, (len(texts), 2, 1)), 3, axis=2).astype(np.float32)
    effects = of_texts(toy_effects.effects(direct, direct / 2), [f"t{text}" for text in texts])
    resampled = bootstrap(effects, samples=200)
    counts = resampled.draws.prompts
    of_text = np.stack([counts[:, texts == text][:, 0] for text in range(10)], axis=1)
    np.testing.assert_array_equal(counts, of_text[:, texts])
    assert (of_text.sum(axis=1) == 10).all()
    assert len(set(counts.sum(axis=1))) > 1  # texts differ in length, and so do samples
    expected = [np.repeat(direct[:, :, 0], row, axis=0).mean(axis=0) for row in counts]
    np.testing.assert_allclose(resampled.samples["direct_effect"], expected, rtol=1e-4)
    np.testing.assert_allclose(resampled.draws.mean(direct[:, :, 0]), expected, rtol=1e-5)
    medians = [np.median(np.repeat(direct[:, :, 0], row, axis=0), axis=0) for row in counts]
    np.testing.assert_allclose(resampled.samples["direct_effect_median"], medians, rtol=1e-5)
    np.testing.assert_allclose(resampled.values["direct_effect"], direct.mean(axis=(0, 2)), rtol=1e-5)


@pytest.mark.slow
def test_intervals_are_as_wide_as_the_texts_are_few(random):
    """All positions of a text alike: 40 texts are 40 numbers, however often each is read."""
    direct = np.repeat(random.normal(0, 2, (40, 2, 1)), 25, axis=0).astype(np.float32)
    effects = of_texts(toy_effects.effects(direct, np.zeros_like(direct)), [f"t{i // 25}" for i in range(1000)])
    table = summary(effects, samples=2000)
    expected = 2 * 1.96 * direct[::25].std(axis=0)[:, 0] / np.sqrt(40)
    np.testing.assert_allclose(table["direct_effect_high"] - table["direct_effect_low"], expected, rtol=0.12)


def test_positions_of_one_text_are_drawn_one_by_one(random):
    direct = random.normal(1, 1, (20, 2, 3)).astype(np.float32)
    effects = toy_effects.effects(direct, direct / 2)
    plain, one = bootstrap(effects, samples=20), bootstrap(of_texts(effects, ["t"] * 20), samples=20)
    np.testing.assert_array_equal(plain.samples["slope"], one.samples["slope"])


def test_what_a_sweep_has_besides_has_means_and_intervals():
    effects = toy_effects.rich(prompts=30, positions=1)
    table = summary(effects, samples=50)
    assert table["name"].tolist() == list(toy_effects.PAIRS)
    for name in ("log_probability_drop", "kl", "target_rank", "top_changed", "free_total_effect"):
        expected = effects[name].mean(("prompt", "replacement"))
        np.testing.assert_allclose(table[name], expected, rtol=1e-4)
        assert (table[f"{name}_low"] <= table[name]).all()
        assert (table[name] <= table[f"{name}_high"]).all()
    np.testing.assert_allclose(table["frozen_gain"], 0.2, rtol=1e-4)
    np.testing.assert_allclose(table["frozen_gain_high"] - table["frozen_gain_low"], 0, atol=1e-5)
    for name in ("total_effect", "direct_effect"):
        expected = np.median(effects[name].mean("replacement"), axis=0)
        np.testing.assert_allclose(table[f"{name}_median"], expected, rtol=1e-5)
        assert (table[f"{name}_median_low"] <= table[f"{name}_median_high"]).all()
    assert "kl" not in summary(effects.drop_vars("kl"), samples=5)
    without = summary(effects.drop_vars(["kl", "free_total_effect"]), samples=50)
    np.testing.assert_allclose(without["slope_low"], table["slope_low"], rtol=1e-4)


def test_sets_alone_have_statistics_and_no_verdicts(random):
    effects = toy_effects.rich(prompts=25, ablated=("layer 0", "attn 1 + mlp 2"))
    table = summary(effects, samples=20)
    assert table[["name", "site", "head"]].to_numpy().tolist() == [
        ["layer 0", "set", -1],
        ["attn 1 + mlp 2", "set", -1],
    ]
    resampled = bootstrap(effects, samples=20)
    assert {finding.verdict for finding in findings(effects, resampled, 0.0)} == {UNTOLD}
    assert set(erasure(effects, resampled)["ablated"]) == {""}


def test_stores_without_names_are_named_by_their_labels(random):
    effects = toy_effects.effects(random.normal(1, 1, (5, 4, 2)).astype(np.float32), np.zeros((5, 4, 2), np.float32))
    table = summary(effects.drop_vars("ablated_name"), samples=5)
    assert table["name"].tolist() == ["attn 0", "mlp 0", "attn 1", "mlp 1"]
    headed = effects.drop_vars("ablated_name").isel(ablated=[0, 2])
    headed = headed.assign_coords(ablated_head=("ablated", np.array([3, -1])))
    assert summary(headed, samples=5)["name"].tolist() == ["attn 0.3", "attn 1"]


def test_the_strongest_prompts_of_each_component(random):
    direct = random.normal(1, 1, (50, 2, 3)).astype(np.float32)
    effects = toy_effects.effects(direct, 0.25 * direct)
    resampled = bootstrap(effects, samples=40)
    table = selected(effects, resampled, 0.1)
    means = direct.mean(axis=2)
    top = np.sort(means, axis=0)[-5:]
    assert table["kept"].tolist() == [5, 5]
    np.testing.assert_allclose(table["direct_effect"], top.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(table["total_effect"], 0.75 * top.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(table["restored_share"], 0.25, rtol=1e-4)
    drawn = [np.sort(np.repeat(means, row, axis=0), axis=0)[-5:].mean(axis=0) for row in resampled.draws.prompts]
    low, high = interval(np.array(drawn))
    np.testing.assert_allclose(table["direct_effect_low"], low, rtol=1e-5)
    np.testing.assert_allclose(table["direct_effect_high"], high, rtol=1e-5)
    beside = summary(effects, samples=40, select=0.1)
    np.testing.assert_allclose(beside["selected_direct_effect"], table["direct_effect"])
    assert selected(effects, resampled, 1.0)["kept"].tolist() == [50, 50]
    assert selected(effects, resampled, 0.001)["kept"].tolist() == [1, 1]
    for share in (0, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"select: is .* share of the prompts"):
            selected(effects, resampled, share)


@pytest.mark.slow
def test_a_seed_gives_the_same_intervals_again(random):
    direct = random.normal(1, 1, (20, 2, 3)).astype(np.float32)
    effects = toy_effects.effects(direct, direct / 2)
    first, again, other = (summary(effects, samples=50, seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert not np.allclose(first["direct_effect_low"], other["direct_effect_low"])


@pytest.mark.slow
def test_regressions_equal_scipys(random):
    direct = random.normal(1, 2, (80, 2, 3)).astype(np.float32)
    noise = random.normal(0, 1, direct.shape).astype(np.float32)
    effects = toy_effects.effects(direct, 0.4 * direct + noise, norm=0.2 * direct - noise / 2)
    table = summary(effects, samples=5)
    means = effects.mean("replacement")
    for part, regressed in (("attn", "attn_compensation"), ("norm", "norm_compensation")):
        for ablated in range(2):
            fit = scipy.stats.linregress(means["direct_effect"][:, ablated], means[regressed][:, ablated])
            np.testing.assert_allclose(table[f"{part}_slope"][ablated], fit.slope, rtol=1e-3)
            np.testing.assert_allclose(table[f"{part}_r2"][ablated], fit.rvalue**2, rtol=1e-3)
    fit = scipy.stats.linregress(means["ablated_delta_unembed"][:, 1], means["total_effect"][:, 1])
    np.testing.assert_allclose(table["total_r2"][1], fit.rvalue**2, rtol=1e-3, atol=1e-6)


def test_coupling_counts_who_moves(random):
    effects = toy_effects.effects(np.full((6, 4, 1), 2.0, np.float32), np.zeros((6, 4, 1), np.float32))
    effects["compensation"][:] = 0
    effects["compensation"][:, 0, 1:] = np.array([0.5, -0.5, 0.1])  # two above a tenth of 2.0, one below
    effects["compensation"][:, 1, 3] = 3
    table = summary(effects, samples=5)
    assert table["responders"].tolist() == [2, 1, 0, 0]
    np.testing.assert_allclose(table["participation_ratio"], [1.1**2 / 0.51, 1, 0, 0], rtol=1e-5)


def test_unfinished_prompts_are_left_out(random):
    effects = toy_effects.effects(random.normal(1, 1, (9, 2, 2)).astype(np.float32), np.zeros((9, 2, 2), np.float32))
    part = effects.copy(deep=True)
    part["finished"][4:] = False
    part["direct_effect"][4:] = np.nan
    pd.testing.assert_frame_equal(summary(part, samples=5), summary(effects.isel(prompt=slice(4)), samples=5))
    part["finished"][:] = False
    with pytest.raises(UserError, match="none of its prompts is finished"):
        summary(part)


def test_planted_slopes_fits_and_coupling_are_recovered(random):
    """Compensation is a planted line of the direct effect plus noise that makes a planted R^2."""
    prompts, slopes, fits, movers = 4000, [0.7, 0.3, -0.4, 0.9], [0.9, 0.5, 0.2, 0.99], [1, 3, 2, 0]
    x = random.normal(1, 1, (prompts, 4, 1))
    noise = [abs(slope) * np.sqrt(1 / fit - 1) for slope, fit in zip(slopes, fits, strict=True)]
    y = x * np.array(slopes)[None, :, None] + random.normal(0, 1, x.shape) * np.array(noise)[None, :, None]
    effects = toy_effects.effects(x.astype(np.float32), y.astype(np.float32))
    for ablated, count in enumerate(movers):
        effects["compensation"][:, ablated, 4 - count :] = effects["direct_effect"][:, ablated].values
    table = summary(effects, samples=200)
    np.testing.assert_allclose(table["slope"], slopes, atol=0.03)
    np.testing.assert_allclose(table["r2"], fits, atol=0.03)
    np.testing.assert_allclose(table["responders"], movers)
    np.testing.assert_allclose(table["participation_ratio"], movers, atol=1e-4)
    for name, truth in (("slope", slopes), ("r2", fits)):
        assert (table[f"{name}_low"] < truth).all()
        assert (truth < table[f"{name}_high"]).all()


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say(random):
    times, prompts, draws, slope, noise, inner = 400, 120, 3, 0.6, 0.5, 0.3
    spread = 1 + inner**2 / draws
    truth = {
        "direct_effect": 1.0,
        "compensation": slope + 0.1,
        "restored_share": slope + 0.1,
        "slope": slope,
        "r2": slope**2 * spread / (slope**2 * spread + noise**2),
    }
    covered = dict.fromkeys(truth, 0)
    # A simulation an ablated component: they are all alike and independent, and share the drawn prompts only.
    for start in range(0, times, 40):
        direct = random.normal(1, 1, (prompts, 40, 1)) + random.normal(0, inner, (prompts, 40, draws))
        compensation = slope * direct + 0.1 + random.normal(0, noise, (prompts, 40, 1))
        table = summary(
            toy_effects.effects(direct.astype(np.float32), compensation.astype(np.float32)), 400, seed=start
        )
        for name, value in truth.items():
            covered[name] += ((table[f"{name}_low"] <= value) & (value <= table[f"{name}_high"])).sum()
    shares = {name: count / times for name, count in covered.items()}
    assert all(0.92 <= share <= 0.98 for share in shares.values()), shares


def test_medians_of_resamples_are_medians(random):
    values = random.normal(0, 1, (31, 5)).astype(np.float32)
    chosen = random.integers(0, 31, (20, 31))
    counts = np.stack([np.bincount(row, minlength=31) for row in chosen])
    np.testing.assert_allclose(Bootstrap(counts).median(values), np.median(values[chosen], axis=1))
    np.testing.assert_allclose(Bootstrap(np.ones((1, 30))).median(values[:30])[0], np.median(values[:30], axis=0))


@pytest.mark.slow
def test_weights_give_every_statistic_the_same_prompts(random):
    """A mean over the bootstrap's own prompts is the bootstrap's mean, where replacements are all alike."""
    direct = np.broadcast_to(random.normal(1, 1, (30, 2, 1)), (30, 2, 4)).astype(np.float32)
    effects = toy_effects.effects(direct, direct / 2)
    resampled = bootstrap(effects, samples=23)
    value, samples = resampled.mean(direct[:, :, 0])
    np.testing.assert_allclose(samples, resampled.samples["direct_effect"], rtol=1e-4)
    np.testing.assert_allclose(value, resampled.values["direct_effect"], rtol=1e-5)
    assert samples.shape == (23, 2)


def test_erasure_is_the_mean_contribution_clean_and_ablated(random):
    direct = random.normal(0, 0.1, (50, 6, 2)).astype(np.float32)
    direct[:, 2] += 3  # attention 1 is the strongest
    effects = toy_effects.effects(direct, np.zeros_like(direct))
    effects["delta_unembed"][:, 5] = -1 + random.normal(0, 0.1, 50)
    effects["compensation"][:, 2, 5] = 0.25
    table = erasure(effects, bootstrap(effects, samples=50), ablations=1)
    clean, ablated = (table[(table["layer"] == 2) & (table["ablated"] == run)].iloc[0] for run in ("", "attn 1"))
    assert clean["delta_unembed"] == pytest.approx(effects["delta_unembed"][:, 5].mean().item(), abs=1e-5)
    assert clean["delta_unembed_low"] < clean["delta_unembed"] < clean["delta_unembed_high"] < 0
    assert ablated["change"] == pytest.approx(0.25, abs=1e-5)
    assert ablated["delta_unembed"] == pytest.approx(clean["delta_unembed"] + 0.25, abs=1e-5)
    assert set(table[table["ablated"] == "attn 1"]["layer"]) == {1, 2}  # MLP 0 comes before it
    assert (table[table["ablated"] == ""]["change"] == 0).all()


def test_an_interval_is_of_percentiles():
    low, high = interval(np.arange(101.0)[:, None], level=0.8)
    assert (low[0], high[0]) == (pytest.approx(10), pytest.approx(90))


def test_draws_give_means_of_what_they_draw(random):
    draws = Bootstrap.draw_all(7, 3, 5, random).with_seeds(2, random)
    array = random.normal(0, 1, (7, 4, 3)).astype(np.float32)
    drawn = draws.mean_over_replacements(array)
    for prompt, sample in ((0, 0), (6, 5)):
        times = draws.replacements[prompt, sample]
        np.testing.assert_allclose(
            drawn[prompt, sample], np.repeat(array[prompt], times, axis=1).mean(axis=1), rtol=1e-5
        )
    means = draws.mean_of_drawn(drawn)
    for sample, times in enumerate(draws.prompts):
        np.testing.assert_allclose(means[sample], np.repeat(drawn[:, sample], times, axis=0).mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(means[0], array.mean(axis=(0, 2)), atol=1e-6)  # the first sample is all of it
    two = np.stack([array[:, :, 0], array[:, :, 1]])
    over_seeds = draws.mean_over_seeds(two)
    np.testing.assert_allclose(over_seeds[0], two.mean(axis=(0, 1)), rtol=1e-4)
    for sample, times in enumerate(draws.seeds):
        np.testing.assert_allclose(
            over_seeds[sample], draws.mean(np.repeat(two, times, axis=0).mean(axis=0))[sample], atol=1e-5
        )


def test_a_sample_without_a_seed_that_is_there_takes_all_that_are():
    draws = Bootstrap(np.ones((2, 3)), seeds=np.array([[0, 0, 2], [1, 1, 0]]))
    np.testing.assert_array_equal(draws.seed_weights([0, 1]), 0.5)
    np.testing.assert_array_equal(draws.seed_weights([0, 2]), [[0, 1], [1, 0]])


def test_an_estimate_as_text():
    assert Estimate(0.304, 0.25, 0.357).text() == "0.30 (0.25 to 0.36)"
    assert Estimate(0.304, -0.25, 0.357).text("{:+.0%}") == "+30% (-25% to +36%)"
    assert Estimate(0.304, float("nan"), float("nan")).text() == "0.30"
