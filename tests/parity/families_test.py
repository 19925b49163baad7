"""Every family against `transformers`: the pass itself, and ablations by forward hooks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydra_jax.edits import all_components
from hydra_jax.effects import effects
from hydra_jax.models.load import load
from hydra_jax.models.transformer import embed, forward
from hydra_jax.prefill import prefill
from hydra_jax.replay import replay

pytest.importorskip("torch", reason="tests/parity/requirements.txt is not installed")
pytest.importorskip("transformers", reason="tests/parity/requirements.txt is not installed")

from tests.parity import families

IDS = list(range(5, 60, 4))
jit_forward, jit_prefill, jit_replay = jax.jit(forward), jax.jit(prefill), jax.jit(replay)


@pytest.fixture(scope="module", params=families.CONFIGS)
def both(request, tmp_path_factory):
    """The family's name, its model of ours, and that of `transformers`."""
    path = families.saved(request.param, tmp_path_factory.mktemp("saved"))
    return request.param, load(str(path)).params, families.made(request.param)


def test_logits_and_every_hidden_state_equal_transformers(both):
    _, params, model = both
    tokens = jnp.asarray(IDS, jnp.int32)
    logits, trace = jit_forward(params, tokens)
    expected = families.run(model, IDS)
    assert np.abs(expected["logits"]).max() > 0.5
    np.testing.assert_allclose(embed(params, tokens), expected["embedded"], atol=2e-4)
    np.testing.assert_allclose(trace.resid_post, expected["resid_post"], atol=2e-4)
    np.testing.assert_allclose(trace.attn_out, expected["writes"][:, 0], atol=2e-4)
    np.testing.assert_allclose(trace.mlp_out, expected["writes"][:, 1], atol=2e-4)
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-4)


@pytest.mark.parametrize("component", all_components(families.LAYERS), ids=str)
def test_ablations_equal_forward_hooks(both, component):
    _, params, model = both
    clean = jit_prefill(params, jnp.asarray(IDS + [0] * 2, jnp.int32), len(IDS))
    value = jax.random.normal(jax.random.key(0), (families.WIDTH,))
    delta = value - clean.writes[component.layer, component.site]
    found = effects(clean, delta, jit_replay(params, clean, component[:2], delta))
    before, after = (families.run(model, IDS, edit) for edit in (None, (*component[:2], value)))
    target = before["uncapped"].argmax()
    assert clean.target == target
    total = [run["uncapped"][target] - run["uncapped"].mean() for run in (before, after)]
    np.testing.assert_allclose(found.total_effect, total[0] - total[1], atol=1e-3)
    change = after["writes"][:, :, -1] - before["writes"][:, :, -1]
    moved = np.stack([[families.contribution(model, w, before["final"], target) for w in pair] for pair in change])
    np.testing.assert_allclose(found.direct_effect, -moved[component.layer, component.site], atol=1e-3)
    moved[component.layer, component.site] = 0
    np.testing.assert_allclose(found.compensation, moved, atol=1e-3)
    assert abs(found.total_effect) > 1e-3
