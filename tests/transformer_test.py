import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_jax.core.edits import all_components
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import Edits, forward
from tests.helpers import models as toy_models

jit_forward = jax.jit(forward)


@given(st.integers(1, 11), st.integers(0, 4))
def test_no_future_token_leaks(cut, seed):
    params, tokens = toy_models.params(seed), toy_models.tokens(12, seed)
    other = tokens.at[cut:].set((tokens[cut:] + 1) % params.config.vocab_size)
    before, after = jit_forward(params, tokens), jit_forward(params, other)
    np.testing.assert_array_equal(before[0][:cut], after[0][:cut])
    np.testing.assert_array_equal(before[1].resid_post[:, :cut], after[1].resid_post[:, :cut])
    assert not np.allclose(before[0][cut:], after[0][cut:])


def test_the_trace_adds_up():
    params, tokens = toy_models.params(), toy_models.tokens(7)
    _, trace = jit_forward(params, tokens)
    np.testing.assert_array_equal(trace.resid_pre[0], params.weights["embedding"][tokens])
    np.testing.assert_array_equal(trace.resid_pre[1:], trace.resid_post[:-1])
    np.testing.assert_array_equal(trace.resid_post, trace.resid_pre + trace.attn_out + trace.mlp_out)


@pytest.mark.parametrize("component", all_components(4), ids=str)
@pytest.mark.parametrize("position", [0, 3, 6])
def test_an_edit_replaces_one_write_and_what_follows_from_it(component, position):
    params, tokens = toy_models.params(), toy_models.tokens(7)
    value = jnp.linspace(-1, 1, params.config.width)
    edits = toy_models.edit(params.config, 7, component.layer, component.site, position, value)
    clean, edited = jit_forward(params, tokens)[1], jit_forward(params, tokens, edits)[1]
    writes = ("attn_out", "mlp_out")
    np.testing.assert_array_equal(getattr(edited, writes[component.site])[component.layer, position], value)
    for other in all_components(4):
        name, upstream = writes[other.site], other < component
        same = getattr(clean, name)[other.layer] == getattr(edited, name)[other.layer]
        assert same[:position].all()
        assert same.all() == upstream or other.index == component.index


def test_an_edit_with_what_is_written_anyway_changes_nothing():
    params, tokens = toy_models.params(), toy_models.tokens(7)
    logits, trace = jit_forward(params, tokens)
    everything = Edits(jnp.ones((4, 2, 7), bool), jnp.stack([trace.attn_out, trace.mlp_out], axis=1))
    np.testing.assert_allclose(jit_forward(params, tokens, everything)[0], logits, atol=1e-5)


def test_an_unused_trace_costs_nothing():
    params, tokens = toy_models.params(layers=8), toy_models.tokens(32)
    whole = jax.jit(forward).lower(params, tokens).compile().memory_analysis()
    logits = jax.jit(lambda *a: forward(*a)[0]).lower(params, tokens).compile().memory_analysis()
    traced = 3 * 8 * 32 * params.config.width * 4
    assert whole.output_size_in_bytes - logits.output_size_in_bytes >= traced
    assert logits.temp_size_in_bytes <= whole.temp_size_in_bytes


def test_tied_weights_unembed_with_the_embedding():
    tied = toy_models.params(tied=True)
    assert "unembedding" not in tied.weights
    untied = toy_models.params()
    weights = tied.weights | {"unembedding": tied.weights["embedding"].T}
    tokens = toy_models.tokens(5)
    expected, _ = jit_forward(untied.replace(weights=weights), tokens)
    np.testing.assert_allclose(jit_forward(tied, tokens)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"width": 0}, "width"),
        ({"heads": 5}, "evenly"),
        ({"head_dim": 5}, "even"),
        ({"dtype": "float8"}, "dtype"),
        ({"precision": "best"}, "precision"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, word):
    with pytest.raises(ValueError, match=word):
        toy_models.config(**changes)
    assert isinstance(toy_models.config(), ModelConfig)
