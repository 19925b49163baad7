import json

import matplotlib.image
import pytest

import hydra_jax
from hydra_jax import figures, stats
from hydra_jax.store import write_example
from tests import builders

TEXTS = ["costs $5 and $x^2$ in the", "the of", "a <b> & \\frac", "in the of the", "the 日本"]


@pytest.mark.parametrize("sites", ["attn,mlp", "mlp", "heads"])
def test_every_figure_is_drawn_whatever_the_text(tmp_path, sites):
    model = hydra_jax.load(str(builders.gguf_file(tmp_path / "tiny.gguf")))
    effects = hydra_jax.sweep(model, TEXTS, replacements=2, sites=sites)
    site, head = ("attn", 3) if sites == "heads" else (sites.split(",")[0], None)
    write_example(tmp_path, hydra_jax.ablate(model, TEXTS[0] * 2, site, 1, head, kind="zero"))
    paths = figures.draw(tmp_path, effects, stats.summary(effects, samples=5))
    assert len(paths) == 4
    for path in paths:
        height, width, _ = matplotlib.image.imread(path).shape
        assert min(height, width) > 250
    assert not list(tmp_path.glob("*.part"))
    assert json.loads(effects.attrs["protocol"])["ablation"]["sites"] == sites
