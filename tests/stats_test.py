import numpy as np
import pandas as pd
import pytest
import scipy.stats

from hydra_jax import store
from hydra_jax.edits import all_components
from hydra_jax.errors import UserError
from hydra_jax.stats import summary


def effects_of(direct, compensation, norm=0.0):
    """A dataset of [P, A, R] effects that keep the identity, all of the compensation by attention."""
    prompts, ablated, draws = direct.shape
    numbers = np.arange(prompts)
    names = ("prompt_id", "text", "relation", "answer_text", "target_text")
    columns = {name: numbers.astype(str) for name in names} | {"target_id": numbers, "length": numbers}
    clean = {name: np.ones(prompts, np.float32) for name in ("clean_logit", "clean_probability", "final_scale")}
    clean["delta_unembed"] = np.arange(prompts * ablated, dtype=np.float32).reshape(prompts, ablated)
    clean["ablated_delta_unembed"] = clean["delta_unembed"]
    source = np.zeros((prompts, draws), int)
    dataset = store.frame(columns, all_components(ablated // 2), ablated // 2, clean, source, edges=True).copy(
        deep=True
    )
    dataset["direct_effect"][:] = direct
    dataset["attn_compensation"][:] = compensation
    dataset["mlp_compensation"][:] = 0
    dataset["norm_compensation"][:] = norm
    dataset["compensation"][:] = dataset["direct_edge"][:] = 0
    dataset["finished"][:] = True
    dataset["total_effect"][:] = direct - compensation - norm
    return dataset


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_statistics_have_their_closed_forms(random):
    direct = random.normal(2, 1, (50, 4, 3)).astype(np.float32)
    table = summary(effects_of(direct, 0.7 * direct + 0.1), samples=10)
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


def test_intervals_of_a_mean_are_as_wide_as_theory_says(random):
    direct = random.normal(0, 2, (400, 2, 1)).astype(np.float32)
    table = summary(effects_of(direct, np.zeros_like(direct)), samples=2000)
    width = table["direct_effect_high"] - table["direct_effect_low"]
    expected = 2 * 1.96 * direct.std(axis=0)[:, 0] / 20
    np.testing.assert_allclose(width, expected, rtol=0.1)
    assert (table["direct_effect_low"] < table["direct_effect"]).all()
    assert (table["direct_effect"] < table["direct_effect_high"]).all()


def test_intervals_know_of_the_replacements(random):
    """Prompts all alike: what is uncertain comes from their replacements alone."""
    one = random.normal(0, 1, 5).astype(np.float32)
    direct = np.broadcast_to(one, (30, 2, 5)).copy()
    table = summary(effects_of(direct, np.zeros_like(direct)), samples=2000)
    expected = 2 * 1.96 * one.std() / np.sqrt(30 * 5)
    np.testing.assert_allclose(table["direct_effect_high"] - table["direct_effect_low"], expected, rtol=0.15)


def test_intervals_equal_a_plain_bootstrap(random):
    direct = random.gamma(1.0, 2.0, (60, 2, 4)).astype(np.float32)
    effects = effects_of(direct, 0.5 * direct + random.normal(0, 1, direct.shape).astype(np.float32))
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


def test_nothing_is_restored_where_nothing_was_taken(random):
    direct = random.normal(0, 1, (40, 2, 3)).astype(np.float32)
    direct[:, 1] += 5
    table = summary(effects_of(direct, 0.5 * direct), samples=200)
    assert table["restored_share"].isna().tolist() == [True, False]
    assert table["restored_share_low"].isna().tolist() == [True, False]


def test_a_seed_gives_the_same_intervals_again(random):
    direct = random.normal(1, 1, (20, 2, 3)).astype(np.float32)
    effects = effects_of(direct, direct / 2)
    first, again, other = (summary(effects, samples=50, seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert not np.allclose(first["direct_effect_low"], other["direct_effect_low"])


def test_regressions_equal_scipys(random):
    direct = random.normal(1, 2, (80, 2, 3)).astype(np.float32)
    noise = random.normal(0, 1, direct.shape).astype(np.float32)
    effects = effects_of(direct, 0.4 * direct + noise, norm=0.2 * direct - noise / 2)
    table = summary(effects, samples=5)
    means = effects.mean("replacement")
    for part, of in (("attn", "attn_compensation"), ("norm", "norm_compensation")):
        for ablated in range(2):
            fit = scipy.stats.linregress(means["direct_effect"][:, ablated], means[of][:, ablated])
            np.testing.assert_allclose(table[f"{part}_slope"][ablated], fit.slope, rtol=1e-3)
            np.testing.assert_allclose(table[f"{part}_r2"][ablated], fit.rvalue**2, rtol=1e-3)
    fit = scipy.stats.linregress(means["ablated_delta_unembed"][:, 1], means["total_effect"][:, 1])
    np.testing.assert_allclose(table["total_r2"][1], fit.rvalue**2, rtol=1e-3, atol=1e-6)


def test_coupling_counts_who_moves(random):
    effects = effects_of(np.full((6, 4, 1), 2.0, np.float32), np.zeros((6, 4, 1), np.float32))
    effects["compensation"][:] = 0
    effects["compensation"][:, 0, 1:] = np.array([0.5, -0.5, 0.1])  # two above a tenth of 2.0, one below
    effects["compensation"][:, 1, 3] = 3
    table = summary(effects, samples=5)
    assert table["responders"].tolist() == [2, 1, 0, 0]
    np.testing.assert_allclose(table["participation_ratio"], [1.1**2 / 0.51, 1, 0, 0], rtol=1e-5)


def test_unfinished_prompts_are_left_out(random):
    effects = effects_of(random.normal(1, 1, (9, 2, 2)).astype(np.float32), np.zeros((9, 2, 2), np.float32))
    part = effects.copy(deep=True)
    part["finished"][4:] = False
    part["direct_effect"][4:] = np.nan
    pd.testing.assert_frame_equal(summary(part, samples=5), summary(effects.isel(prompt=slice(4)), samples=5))
    part["finished"][:] = False
    with pytest.raises(UserError, match="none of its prompts is finished"):
        summary(part)
