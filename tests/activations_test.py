"""The trace of a text: everything that its clean run writes, as the general path has it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hydra_jax as hj
from hydra_jax.config import MeshConfig
from hydra_jax.engine import mesh
from hydra_jax.engine.layers import Streamed
from hydra_jax.errors import UserError
from hydra_jax.models.transformer import flat, forward
from hydra_jax.sweep import activations
from hydra_jax.sweep.activations import trace, trace_bytes
from hydra_jax.sweep.items import Item
from hydra_jax.text.prompts import Prompt
from tests.helpers import checkpoints
from tests.helpers import models as toy_models
from tests.helpers.speed import few

BLOCKS = few(toy_models.BLOCKS, "gpt-2", "gemma 2")
STREAMS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
jit_forward = jax.jit(forward)


def item(length=9, seed=0):
    return Item(Prompt("a text", "a text"), tuple(np.asarray(toy_models.tokens(length, seed)).tolist()))


def model(params):
    return hj.Model("tiny", params, checkpoints.tokenizer(), "")


@pytest.mark.slow
@given(st.sampled_from(sorted(toy_models.BLOCKS)), st.integers(0, 2), st.integers(1, 12))
def test_a_trace_is_that_of_the_general_path(block, seed, length):
    params, one = toy_models.params(seed, **toy_models.BLOCKS[block]), item(length, seed)
    found = trace(model(params), one)
    logits, expected = jit_forward(params, jnp.array(one.tokens, jnp.int32))
    for name in (*STREAMS, "mixed", "keys", "values"):
        np.testing.assert_allclose(found[name], getattr(expected, name), atol=2e-5, err_msg=name)
        assert found[name].dtype == np.float32
    np.testing.assert_array_equal(found["top_id"], logits.argmax(axis=-1))
    np.testing.assert_allclose(found["top_probability"], jax.nn.softmax(logits).max(axis=-1), atol=1e-5)


@pytest.mark.slow
@given(st.sampled_from(sorted(toy_models.BLOCKS)), st.integers(0, 2), st.integers(1, 12))
def test_a_pattern_is_causal_and_mixes_the_values(block, seed, length):
    params = toy_models.params(seed, **toy_models.BLOCKS[block])
    c, found = params.config, trace(model(params), item(length, seed))
    pattern = found["pattern"].values
    np.testing.assert_allclose(pattern.sum(axis=-1), 1, atol=1e-5)
    distance = np.arange(length)[:, None] - np.arange(length)
    for layer, window in enumerate(c.windows or [0] * c.layers):
        seen = (distance >= 0) & (distance < (window or length))
        assert (pattern[layer][:, ~seen] == 0).all()
        assert (pattern[layer][:, seen] > 0).all()
    values = np.repeat(found["values"].values, c.heads // c.kv_heads, axis=2)
    mixed = np.einsum("lhqk,lkhd->lqhd", pattern, values)
    np.testing.assert_allclose(mixed, found["mixed"], atol=2e-5)


def test_everything_is_labelled():
    tiny, text = model(toy_models.params(vocab_size=len(checkpoints.VOCABULARY))), checkpoints.CONTROL + "the 1"
    one = Item(Prompt("name", text), tuple(tiny.tokenizer.encode(text).ids))
    found, c = trace(tiny, one), tiny.config
    length = len(one.tokens)
    assert found.sizes == dict(
        layer=4, token=length, query=length, key=length, width=c.width, head=4, kv_head=2, head_dim=6
    )
    for dim in ("token", "query", "key"):
        assert found[f"{dim}_id"].values.tolist() == list(one.tokens)
        assert "".join(found[f"{dim}_text"].values) == text
        assert found[f"{dim}_text"].values[0] == checkpoints.CONTROL
    assert found.attrs == dict(prompt_id="name", text=text)
    assert all(found[name].attrs["long_name"] for name in found)
    tops = [tiny.tokenizer.decode([int(top)], skip_special_tokens=False) for top in found["top_id"]]
    assert found["top_text"].values.tolist() == tops


def streamed(params):
    """A model whose layers are read as they are needed, from this machine's memory."""
    on = mesh.mesh_of(params)
    host = {name: np.asarray(leaf) for name, leaf in flat(params.weights["layers"]).items()}
    layers = Streamed(params.config, on, lambda number: {name: leaf[number] for name, leaf in host.items()})
    rest = {name: leaf for name, leaf in params.weights.items() if name != "layers"}
    return dataclasses.replace(model(params), params=params.replace(weights=rest), streamed=layers)


@pytest.mark.parametrize("block", BLOCKS)
def test_streamed_layers_give_the_same_to_the_bit(block):
    params = toy_models.block(block)
    assert trace(model(params), item()).identical(trace(streamed(params), item()))


@pytest.mark.parametrize(("data", "model_axis"), few([(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)], (2, 2)))
def test_several_devices_give_the_same(data, model_axis):
    params = toy_models.block("gemma 2")
    laid = mesh.lay(mesh.make(MeshConfig(data, model_axis)), params)
    one, other = (trace(model(each), item()) for each in (params, laid))
    for name in (*activations.WRITTEN, "top_id", "top_probability"):
        np.testing.assert_allclose(one[name], other[name], atol=2e-5, err_msg=name)


def test_halves_are_given_in_float32():
    found = trace(model(toy_models.params(dtype="bfloat16")), item())
    assert all(found[name].dtype == np.float32 for name in activations.WRITTEN)
    np.testing.assert_allclose(found["pattern"].sum("key"), 1, atol=1e-5)


def test_a_trace_that_does_not_fit_is_refused(monkeypatch):
    tiny, one = model(toy_models.params()), item()
    wanted = trace_bytes(tiny.config, len(one.tokens))
    found = trace(tiny, one)
    assert wanted == sum(found[name].nbytes for name in activations.WRITTEN)
    monkeypatch.setattr(activations, "host_bytes", lambda: wanted / activations.SHARE - 1)
    with pytest.raises(UserError, match=r"prompt 'a text': a trace of its 9 tokens takes .* give a shorter text"):
        trace(tiny, one)
    monkeypatch.setattr(activations, "host_bytes", lambda: wanted / activations.SHARE + 1)
    trace(tiny, one)
