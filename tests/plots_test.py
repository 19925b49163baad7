"""Figures of datasets in memory: what they show, and that they need no style around them."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from hydra_jax.analysis import cascades, interactions
from hydra_jax.analysis.results import Results
from hydra_jax.errors import UserError
from hydra_jax.report import figures, plots
from tests.helpers import effects as toy_effects

ALWAYS = ("direct_against_total", "compensation", "erasure")
SINGLES = ("effects_by_layer", "compensation_by_layer", "regression")


@pytest.fixture(scope="module")
def effects():
    return toy_effects.rich()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ALWAYS, *SINGLES, *figures.OPTIONAL])
def test_every_plot_is_drawn_in_the_style_whatever_is_around_it(effects, tmp_path, name):
    before = dict(mpl.rcParams)
    with mpl.rc_context({"axes.spines.top": True, "font.size": 17, "text.parse_math": True}):
        figure = getattr(plots, name)(effects, bootstrap=10)
        figure.savefig(tmp_path / "drawn.png")
    assert isinstance(figure, Figure)
    drawn = [axis for axis in figure.axes if axis.get_visible() and axis.get_label() != "<colorbar>"]
    assert not any(axis.spines["top"].get_visible() for axis in drawn)
    assert {**mpl.rcParams} == before


def test_what_a_sweep_does_not_have_is_refused_in_one_line():
    direct = np.random.default_rng(0).normal(1, 1, (3, 4, 2)).astype(np.float32)
    effects = toy_effects.effects(direct, direct / 2)
    for name in (*figures.OPTIONAL, "heads", "regression"):
        with pytest.raises(UserError, match=f"{name}: this sweep has nothing to draw there; it takes .") as raised:
            getattr(plots, name)(effects, bootstrap=5)
        assert "\n" not in str(raised.value)
    effects["finished"][:] = False
    with pytest.raises(UserError, match="none of its prompts is finished"):
        plots.compensation(effects)


def test_every_plot_says_what_it_takes():
    named = {name for name in vars(plots) if callable(getattr(plots, name)) and name in figures.OPTIONAL}
    assert named == set(figures.OPTIONAL)
    assert set(figures.OPTIONAL) < plots.NEEDS.keys()


def test_figures_of_sets_pairs_and_freezes_show_the_numbers(effects):
    summary = Results(effects, samples=10).summary
    bars = plots.sets(effects, bootstrap=10).axes[0]
    assert [label.get_text() for label in bars.get_yticklabels()] == summary["name"].tolist()[::-1]
    widths = [patch.get_width() for patch in bars.containers[1]]
    np.testing.assert_allclose(widths, summary["direct_effect"][::-1], rtol=1e-5)
    free = plots.frozen_against_free(effects, bootstrap=10).axes[1].lines[0]
    np.testing.assert_allclose(np.asarray(free.get_xdata(), float), summary["free_total_effect"])
    np.testing.assert_allclose(np.asarray(free.get_ydata(), float), summary["total_effect"])
    left, right = plots.interactions(effects, bootstrap=10).axes[:2]
    found = interactions.interactions(effects)
    expected = found["interaction"].values.mean(axis=(0, 3))
    for axis, matrix in ((left, expected), (right, found["woken"].values.mean(axis=0))):
        shown = axis.images[0].get_array()
        np.testing.assert_allclose(shown.filled(np.nan), matrix, atol=1e-5)
    written = {text.get_text() for text in left.texts}
    assert written == {f"{value:+.2f}" for value in expected[np.isfinite(expected)]}


def test_the_figure_of_cascades_shows_the_table(effects):
    table = cascades.cascade(effects, samples=10)
    left, middle, right = plots.cascade(effects, bootstrap=10).axes[:3]
    np.testing.assert_allclose(left.lines[0].get_ydata(), table["logit"])
    np.testing.assert_allclose(left.lines[1].get_ydata(), table["logit_median"])
    np.testing.assert_allclose(middle.lines[1].get_ydata(), table["survives"])
    np.testing.assert_allclose(right.images[0].get_array(), cascades.repairs(effects).T, rtol=1e-5)


def test_the_heads_that_respond_are_shown_for_ablations_with_any(effects):
    axes = plots.head_responders(effects, bootstrap=10).axes
    means = effects["head_compensation"].values.mean(axis=0)
    for axis in axes[:4]:
        name = axis.get_title().partition(" ablated")[0]
        shown = axis.images[0].get_array()
        np.testing.assert_allclose(shown, means[toy_effects.PAIRS.index(name)], atol=1e-6)
        assert np.abs(shown).max() > 0


@pytest.mark.parametrize("single", [True, False])
def test_effects_along_the_text(single):
    effects = toy_effects.rich(prompts=20, positions=20 if single else 5, seed=3)
    axis = plots.positions(effects, bootstrap=10).axes[1]
    line = axis.lines[0]
    index = toy_effects.PAIRS.index(line.get_label())
    total = effects["total_effect"].values[:, index].mean(axis=1)
    if single:
        np.testing.assert_allclose(line.get_ydata(), total, rtol=1e-5)
        assert [label.get_text() for label in axis.get_xticklabels()] == [f" $t{number}" for number in range(20)]
    else:
        np.testing.assert_allclose(line.get_ydata(), total.reshape(4, 5).mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(line.get_xdata(), [0.05, 0.25, 0.55, 0.75, 0.95])


@pytest.mark.parametrize("ablated", [("layer 0", "attn 1 + mlp 2"), ("attn 0.1", "mlp 2", "attn 3.2"), ("attn 2",)])
@pytest.mark.parametrize("prompts", [1, 2, 5])
def test_sweeps_of_sets_of_some_heads_and_of_one_component_have_their_figures(tmp_path, ablated, prompts):
    results = Results(toy_effects.rich(prompts=prompts, positions=1, ablated=ablated), samples=5)
    drawn = figures.figures_of(results)
    sets = ablated[0] == "layer 0"
    assert ("sets" in drawn) == (len(ablated) > 1)
    assert ("effects_by_layer" in drawn) == (len(ablated) == 1)
    assert ("compensation_by_layer" in drawn) == (prompts >= 4 and not sets)
    assert ("heads" in drawn) == (len(ablated) == 3)
    for name in drawn.keys() - {"causal_motifs"}:
        figures.save(tmp_path, name, drawn[name])


def test_examples_without_entries_are_no_figure(effects):
    examples = effects.isel(prompt=[]).rename(prompt="example")
    assert "single_prompts" not in figures.figures_of(Results(effects, examples, samples=5))
