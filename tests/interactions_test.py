"""Pairs of ablations against sums done by hand."""

import itertools

import numpy as np
import pytest

from hydra_jax.analysis import interactions
from hydra_jax.analysis.stats import bootstrap
from hydra_jax.errors import UserError
from tests.helpers import effects as toy_effects

NAMES = ("attn 1", "mlp 2", "layer 3", "attn 1 + mlp 2", "attn 1 + layer 3", "mlp 2 + attn 3", "attn 3")


@pytest.fixture
def effects():
    """The pairs attn 1 with mlp 2 and with layer 3, and mlp 2 with attn 3; not mlp 2 with layer 3."""
    return toy_effects.rich(prompts=30, positions=1, ablated=NAMES)


def total(effects, name):
    return effects["total_effect"].values[:, NAMES.index(name)]


def test_pairs_are_unions_of_what_was_ablated(effects):
    named = [tuple(NAMES[index] for index in pair) for pair in interactions.pairs(effects)]
    assert named == [
        ("attn 1", "mlp 2", "attn 1 + mlp 2"),
        ("attn 1", "layer 3", "attn 1 + layer 3"),
        ("mlp 2", "attn 3", "mlp 2 + attn 3"),
    ]
    assert interactions.pairs(toy_effects.rich(ablated=("layer 3", "attn 3", "mlp 1"))) == []
    both = toy_effects.rich(ablated=("attn 3", "mlp 3", "layer 3"))
    assert interactions.pairs(both) == [(0, 1, 2)]


def test_interactions_are_sums_of_total_effects(effects):
    found = interactions.interactions(effects)
    assert found.sizes == {"prompt": 30, "first": 4, "second": 4, "replacement": 3}
    assert found["first"].values.tolist() == ["attn 1", "mlp 2", "layer 3", "attn 3"]
    one = found.sel(first="attn 1", second="layer 3")
    joint = total(effects, "attn 1 + layer 3")
    np.testing.assert_allclose(one["joint_effect"], joint)
    np.testing.assert_allclose(
        one["interaction"], joint - total(effects, "attn 1") - total(effects, "layer 3"), atol=1e-6
    )
    np.testing.assert_allclose(one["effect_after"], joint - total(effects, "attn 1"), atol=1e-6)
    np.testing.assert_allclose(found["single_effect"].sel(first="layer 3"), total(effects, "layer 3"))
    np.testing.assert_array_equal(found["prompt_id"], effects["prompt_id"])


def test_woken_is_the_change_when_the_other_alone_is_ablated(effects):
    woken = interactions.interactions(effects)["woken"]
    compensation = effects["compensation"].values
    after_attn_1 = compensation[:, NAMES.index("attn 1")]
    np.testing.assert_allclose(woken.sel(first="attn 1", second="mlp 2"), after_attn_1[:, 5])
    np.testing.assert_allclose(
        woken.sel(first="attn 1", second="layer 3"), after_attn_1[:, 6] + after_attn_1[:, 7], atol=1e-6
    )
    np.testing.assert_allclose(woken.sel(first="mlp 2", second="attn 3"), compensation[:, 1, 6])
    assert (woken.sel(first="mlp 2", second="attn 1") == 0).all()  # upstream


def test_symmetric_where_it_must_be_and_empty_where_nothing_was_swept(effects):
    found = interactions.interactions(effects)
    for name in ("interaction", "joint_effect"):
        values = found[name].values
        np.testing.assert_array_equal(values, values.transpose(0, 2, 1, 3))
    assert not np.array_equal(found["effect_after"][:, 0, 1], found["effect_after"][:, 1, 0])
    swept = {("attn 1", "mlp 2"), ("attn 1", "layer 3"), ("mlp 2", "attn 3")}
    for one, other in itertools.product(found["first"].values, found["second"].values):
        there = (one, other) in swept or (other, one) in swept
        for name in ("interaction", "joint_effect", "effect_after", "woken"):
            known = np.isfinite(found[name].sel(first=one, second=other))
            assert known.all() if there else not known.any()


def test_heads_wake_up_as_far_as_heads_were_recorded():
    effects = toy_effects.rich(ablated=("attn 0.1", "attn 2.3", "attn 0.1 + attn 2.3"))
    woken = interactions.interactions(effects)["woken"].sel(first="attn 0.1", second="attn 2.3")
    np.testing.assert_allclose(woken, effects["head_compensation"][:, 0, 2, 3])
    without = interactions.interactions(effects.drop_vars("head_compensation"))
    assert without["woken"].isnull().all()
    assert np.isfinite(without["interaction"].sel(first="attn 0.1", second="attn 2.3")).all()


def test_the_table_has_the_means_and_the_intervals_of_the_sweeps_own_draws(effects):
    resampled = bootstrap(effects, samples=200)
    table = interactions.interaction_table(effects, resampled)
    assert len(table) == 3
    assert (np.diff(table["interaction"].abs()) <= 0).all()
    found = interactions.interactions(effects)
    for row in table.to_dict("records"):
        one = found.sel(first=row["first"], second=row["second"])
        by_prompt = one["interaction"].mean("replacement").values
        assert row["interaction"] == pytest.approx(by_prompt.mean(), abs=1e-5)
        assert row["interaction_median"] == pytest.approx(np.median(by_prompt), abs=1e-5)
        assert row["joint_effect"] == pytest.approx(one["joint_effect"].values.mean(), rel=1e-4)
        assert row["effect_after"] == pytest.approx(one["effect_after"].values.mean(), rel=1e-4)
        assert row["woken"] == pytest.approx(one["woken"].values.mean(), abs=1e-5)
        for name in ("interaction", "interaction_median", "joint_effect", "woken"):
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    pair = resampled.samples["total_effect"]
    row = table[(table["first"] == "attn 1") & (table["second"] == "mlp 2")].iloc[0]
    low, high = np.quantile(pair[:, 3] - pair[:, 0] - pair[:, 1], [0.025, 0.975])
    assert (row["interaction_low"], row["interaction_high"]) == (pytest.approx(low), pytest.approx(high))


def test_a_sweep_without_pairs_is_refused_in_one_line():
    effects = toy_effects.rich(ablated=("attn 1", "mlp 2"))
    for function in (interactions.interactions, interactions.interaction_table):
        with pytest.raises(UserError, match=r"ablation\.interactions"):
            function(effects)
