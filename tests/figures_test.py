import matplotlib as mpl
import matplotlib.image
import numpy as np
import pytest

import hydra_jax
from hydra_jax.analysis.results import Results, beside
from hydra_jax.report import figures
from tests.helpers import checkpoints
from tests.helpers import effects as toy_effects

TEXTS = ["costs $5 and $x^2$ in the", "the of", "a <b> & \\frac", "in the of the", "the 日本"]
EVERY = {"direct_against_total", "compensation_by_layer", "compensation", "erasure", "causal_motifs"}
OF_LAYERS = {"effects_by_layer", "regression"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return hydra_jax.load(str(checkpoints.gguf_file(tmp_path_factory.mktemp("model") / "tiny.gguf")))


@pytest.mark.slow
@pytest.mark.parametrize("sites", ["attn,mlp", "mlp", "heads"])
def test_every_figure_is_drawn_whatever_the_text(model, tmp_path, sites):
    results = Results(hydra_jax.sweep(model, TEXTS, replacements=2, sites=sites), samples=5)
    paths = figures.draw(tmp_path, results)
    names = EVERY | ({"heads"} if sites == "heads" else OF_LAYERS)
    assert {path.name for path in paths} == {f"{name}.{form}" for name in names for form in ("png", "pdf")}
    for path in paths:
        if path.suffix == ".png":
            height, width, _ = matplotlib.image.imread(path).shape
            assert min(height, width) > 250
        else:
            assert path.read_bytes().startswith(b"%PDF")
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
def test_one_prompt_has_no_regression(model, tmp_path):
    results = Results(hydra_jax.sweep(model, TEXTS[:1], kind="zero"), samples=5)
    drawn = figures.figures_of(results)
    assert drawn.keys() == (EVERY | OF_LAYERS) - {"compensation_by_layer", "regression", "erasure"}
    figures.draw(tmp_path, results)


@pytest.mark.slow
def test_kinds_and_heads_stand_beside_a_sweep(model, tmp_path):
    every = [
        Results(hydra_jax.sweep(model, TEXTS, kind=kind, sites=sites), samples=5)
        for kind, sites in (("zero", "attn,mlp"), ("mean", "attn,mlp"), ("zero", "heads"))
    ]
    drawn = figures.figures_of(every[0], *beside(every[0], every[1:]))
    assert {"kinds", "heads"} <= drawn.keys()
    with mpl.rc_context(figures.STYLE):
        kinds = drawn["kinds"]()
    labels = [text.get_text() for text in kinds.axes[0].get_legend().get_texts()]
    assert labels == ["zero", "mean"]


def test_figures_show_the_numbers_of_the_sweep():
    random = np.random.default_rng(0)
    direct = random.normal(1, 1, (40, 6, 2)).astype(np.float32)
    results = Results(toy_effects.effects(direct, 0.5 * direct), samples=20)
    with mpl.rc_context(figures.STYLE):
        drawn = figures.figures_of(results)
        slope = drawn["regression"]().axes[0].lines[0].get_ydata()
        median = drawn["effects_by_layer"]().axes[0].lines[2].get_ydata()
        points = drawn["direct_against_total"]().axes[0].collections[0].get_offsets()
    np.testing.assert_allclose(slope, 0.5, atol=1e-4)
    np.testing.assert_allclose(median, np.median(0.5 * direct.mean(axis=2), axis=0)[::2], atol=1e-5)
    np.testing.assert_allclose(points[:, 1], 0.5 * points[:, 0], atol=1e-5)
    assert len(points) == 40 * 3
