import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_jax.core import causal
from hydra_jax.core.edits import all_components
from hydra_jax.core.effects import effects
from hydra_jax.core.prefill import prefill
from hydra_jax.core.replay import replay
from hydra_jax.models import pieces
from tests.helpers import models as toy_models

numbers = st.floats(-5, 5, width=32).map(jnp.float32)
nonzero = numbers.filter(lambda x: abs(x) > 0.1)


@given(numbers, numbers)
def test_an_erased_cause_has_a_direct_effect_and_no_total_effect(u, ablated):
    arguments = causal.ERASURE, {"u": u}, "x", ablated, "y"
    assert causal.total_effect(*arguments) == 0
    np.testing.assert_allclose(causal.direct_effect(*arguments), u - ablated, atol=1e-6)
    np.testing.assert_allclose(causal.compensation(*arguments)["f"], u - ablated, atol=1e-6)


@given(nonzero)
def test_a_cause_ablated_to_nothing_is_repaired_in_full(u):
    arguments = causal.SELF_REPAIR, {"u": u}, "x", jnp.float32(0), "y"
    assert causal.SELF_REPAIR.run({"u": u})["f"] == 0
    assert causal.total_effect(*arguments) == 0
    assert causal.direct_effect(*arguments) == u
    assert causal.indirect_effect(*arguments) == -u
    assert causal.compensation(*arguments) == {"f": u}


@given(numbers, numbers, numbers)
def test_effects_of_a_chain_with_a_side_path_have_their_closed_forms(u, ablated, slope):
    model = causal.CausalModel(x=lambda u: u, m=lambda x: slope * x, n=lambda m: 2 * m, y=lambda x, m, n: x + m + n)
    arguments = model, {"u": u}, "x", ablated, "y"
    drop = u - ablated
    np.testing.assert_allclose(causal.direct_effect(*arguments), drop, atol=1e-4)
    np.testing.assert_allclose(causal.total_effect(*arguments), drop * (1 + 3 * slope), atol=1e-3)
    found = causal.compensation(*arguments)
    np.testing.assert_allclose(found["m"], -slope * drop, atol=1e-3)
    np.testing.assert_allclose(found["n"], -2 * slope * drop, atol=1e-3)
    np.testing.assert_allclose(sum(found.values()), -causal.indirect_effect(*arguments), atol=1e-3)


def test_do_cuts_a_variable_off_from_its_causes():
    model = causal.CausalModel(x=lambda u: u, m=lambda x: x + 1, y=lambda m, u: m * u)
    assert model.run({"u": 3}) == {"u": 3, "x": 3, "m": 4, "y": 12}
    assert model.run({"u": 3}, {"m": 10}) == {"u": 3, "x": 3, "m": 10, "y": 30}
    assert model.exogenous == ("u",)
    assert model.mediators("x", "y") == ["m"]
    assert model.mediators("m", "y") == []


def test_variables_out_of_causal_order_are_refused():
    with pytest.raises(ValueError, match="y: its cause x comes after it"):
        causal.CausalModel(y=lambda x: x, x=lambda u: u)


def as_causal_model(params, clean):
    """A two-layer transformer's last token as a causal graph, its final norm's divisor held at the clean one's."""

    def attn(layer, resid):
        weights, cache = pieces.layer_of(params, layer), (clean.layers.keys[layer], clean.layers.values[layer])
        return pieces.attn_write(weights, pieces.attend(weights, resid, clean.position, *cache))

    def mlp(layer, resid):
        return pieces.mlp_write(pieces.layer_of(params, layer), resid)

    return causal.CausalModel(
        attn_0=lambda embedding: attn(0, embedding),
        mlp_0=lambda embedding, attn_0: mlp(0, embedding + attn_0),
        attn_1=lambda embedding, attn_0, mlp_0: attn(1, embedding + attn_0 + mlp_0),
        mlp_1=lambda embedding, attn_0, mlp_0, attn_1: mlp(1, embedding + attn_0 + mlp_0 + attn_1),
        logit=lambda embedding, attn_0, mlp_0, attn_1, mlp_1: clean.lens(embedding + attn_0 + mlp_0 + attn_1 + mlp_1),
    )


@pytest.mark.slow
@pytest.mark.parametrize("component", all_components(2), ids=str)
def test_a_transformer_as_a_causal_graph_has_the_effects_of_effects(component):
    params, tokens = toy_models.params(layers=2), toy_models.tokens(6)
    clean = jax.jit(prefill)(params, tokens, 6)
    model = as_causal_model(params, clean)
    given = {"embedding": params.weights["embedding"][tokens[-1]]}
    name = str(component).replace(" ", "_")
    new = jax.random.normal(jax.random.key(3), (params.config.width,))
    arguments = model, given, name, new, "logit"
    delta = new - clean.writes[component.layer, component.site]
    where = jnp.int32(component.layer), jnp.int32(component.site)
    found = effects(params, clean, jax.jit(replay)(params, clean, where, delta))
    np.testing.assert_allclose(model.run(given)[name], clean.writes[component.layer, component.site], atol=1e-5)
    np.testing.assert_allclose(found.direct_effect, causal.direct_effect(*arguments), atol=1e-4)
    # With the divisor held, the final norm repairs nothing.
    total = causal.total_effect(*arguments)
    np.testing.assert_allclose(found.total_effect + found.norm_compensation, total, atol=1e-4)
    for other, change in causal.compensation(*arguments).items():
        site, layer = other.split("_")
        np.testing.assert_allclose(found.compensation[int(layer), ("attn", "mlp").index(site)], change, atol=1e-4)
