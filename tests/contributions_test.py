"""Contributions to what a text says: the parts add up, and the stream on its way is read as the model reads it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from tokenizers.pre_tokenizers import WhitespaceSplit

import hydra_jax as hj
from hydra_jax.config import MeshConfig
from hydra_jax.core.prefill import MOST_LIKELY
from hydra_jax.engine import mesh
from hydra_jax.engine.layers import Streamed
from hydra_jax.errors import UserError
from hydra_jax.models import pieces
from hydra_jax.models.transformer import Contrast, flat, forward, unembed
from hydra_jax.sweep import contributions as module
from hydra_jax.sweep.contributions import contributions
from hydra_jax.sweep.items import Item, itemise
from hydra_jax.text.prompts import Prompt, as_prompts
from tests.helpers import models as toy_models
from tests.helpers.speed import few

TOKENS = tuple(np.asarray(toy_models.tokens(9)).tolist())
PLACE = 6
TOP = Contrast(np.array([MOST_LIKELY]), np.array([1.0]))
DIFFERENCE = Contrast(np.array([MOST_LIKELY, 3, 11]), np.array([1.0, -1.0, 0.5]))
BLOCKS = few(toy_models.BLOCKS, "gpt-2", "gemma 2")
jit_forward = jax.jit(forward)


def text():
    made = Tokenizer(tokenizer_models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    made.pre_tokenizer = WhitespaceSplit()
    return made


def item(tokens):
    return Item(Prompt("a text", " ".join(f"w{token}" for token in tokens)), tuple(tokens))


def model(params):
    return hj.Model("tiny", params, text(), "")


def said(params, tokens, contrast, place=-1):
    """The whole pass: a contrast's value, the most likely token, and logits, before and after any soft-cap."""
    capped, trace = jit_forward(params, jnp.array(tokens, jnp.int32))
    logits = np.asarray(unembed(params, trace.resid_post[-1, place]), np.float64)
    asked = np.where(contrast.tokens == MOST_LIKELY, logits.argmax(), contrast.tokens)
    return float(contrast.weights @ (logits[asked] - logits.mean())), asked[0], logits, np.asarray(capped[place])


@pytest.mark.slow
@given(st.sampled_from(sorted(toy_models.BLOCKS)), st.integers(0, 2), st.integers(0, 8), st.booleans())
def test_the_parts_add_up_to_what_is_read(block, seed, place, by_head):
    params = toy_models.params(seed, **toy_models.BLOCKS[block])
    found = contributions(model(params), item(TOKENS), place, DIFFERENCE, by_head)
    expected, target, *_ = said(params, TOKENS, DIFFERENCE, place)
    np.testing.assert_allclose(found["contribution"].sum(), expected, atol=2e-5)
    np.testing.assert_allclose(found["accumulated"][-1], expected, atol=2e-5)
    np.testing.assert_allclose(found.attrs["clean_logit"], expected, atol=2e-5)
    np.testing.assert_allclose(found["accumulated"], found["contribution"].cumsum(), atol=2e-5)
    assert found.attrs["target_id"] == target
    assert found.attrs["foil_ids"] == [3]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_part_adds_what_the_stream_without_it_lacks(block):
    """Each write is taken from the final stream, its norm spelled out, the divisor held."""
    params = toy_models.block(block)
    found = contributions(model(params), item(TOKENS), PLACE, DIFFERENCE).set_index(part=["site", "layer"])
    _, trace = jit_forward(params, jnp.array(TOKENS, jnp.int32))
    final = trace.resid_post[-1, PLACE]
    asked = DIFFERENCE.replace(tokens=np.where(DIFFERENCE.tokens < 0, found.attrs["target_id"], DIFFERENCE.tokens))
    scale = jnp.asarray(found.attrs["final_scale"], jnp.float32)

    def lacks(part):
        return asked.of(unembed(params, final, scale)) - asked.of(unembed(params, final - part, scale))

    for layer in range(params.config.layers):
        for site, writes in (("attn", trace.attn_out), ("mlp", trace.mlp_out)):
            one = found["contribution"].sel(part=(site, layer))
            np.testing.assert_allclose(one, lacks(writes[layer, PLACE]), atol=2e-5)
    embedding = found["contribution"].sel(part=("embedding", -1))
    np.testing.assert_allclose(embedding, lacks(trace.resid_pre[0, PLACE]), atol=2e-5)
    constant = float(asked.of(unembed(params, jnp.zeros_like(final), scale)))
    np.testing.assert_allclose(found["contribution"].sel(part=("constant", -1)), constant, atol=2e-5)
    assert (abs(constant) > 1e-3) == (params.config.norm == "layer")


@pytest.mark.parametrize("block", BLOCKS)
def test_heads_and_bias_add_up_to_the_write(block):
    params = toy_models.block(block)
    c = params.config
    whole, parted = (contributions(model(params), item(TOKENS), PLACE, TOP, by_head) for by_head in (False, True))
    for layer in range(c.layers):
        of_layer = parted.isel(part=(parted["site"] == "attn").values & (parted["layer"] == layer).values)
        assert list(of_layer["head"].values) == [*range(c.heads), *[-1] * c.out_bias]
        np.testing.assert_allclose(
            of_layer["contribution"].sum(), whole["contribution"].sel(part=f"attn {layer}"), atol=2e-5
        )
        assert (f"attn {layer} bias" in parted["part"]) == c.out_bias
    same = [name for name in whole["part"].values if not name.startswith("attn")]
    np.testing.assert_array_equal(whole["contribution"].sel(part=same), parted["contribution"].sel(part=same))
    assert list(parted["part"].values[:2]) == ["embedding", "attn 0.0"]


@pytest.mark.parametrize("block", BLOCKS)
def test_heads_and_bias_write_what_attention_writes(block):
    params = toy_models.block(block)
    _, trace = jit_forward(params, jnp.array(TOKENS, jnp.int32))
    for layer in range(params.config.layers):
        mixed = trace.mixed[layer, PLACE]
        heads, bias = pieces.head_writes(pieces.layer_of(params, layer), mixed)
        np.testing.assert_allclose(heads.sum(axis=0) + bias, trace.attn_out[layer, PLACE], atol=1e-5)
        assert bool(np.abs(bias).max() > 0) == params.config.out_bias


@pytest.mark.parametrize("block", BLOCKS)
def test_the_lens_reads_every_stage_as_the_model_reads_the_last(block):
    params = toy_models.block(block)
    found = contributions(model(params), item(TOKENS), PLACE, DIFFERENCE)
    _, trace = jit_forward(params, jnp.array(TOKENS, jnp.int32))
    streams = [*trace.resid_pre[:, PLACE], trace.resid_post[-1, PLACE]]
    target = found.attrs["target_id"]
    asked = np.array([target, 3, 11])
    for stage, stream in enumerate(streams):
        logits = np.asarray(unembed(params, stream), np.float64)
        cap = params.config.final_softcap
        shares = np.exp(cap * np.tanh(logits / cap) if cap else logits)
        here = found.isel(stage=stage)
        np.testing.assert_allclose(here["lens_logit"], DIFFERENCE.weights @ (logits[asked] - logits.mean()), atol=2e-5)
        np.testing.assert_allclose(here["lens_probability"], shares[target] / shares.sum(), atol=1e-5)
        assert here["lens_rank"] == (logits > logits[target]).sum()
        assert here["lens_top_id"] == logits.argmax()
        assert here["lens_top_text"] == f"w{logits.argmax()}"
    last = found.isel(stage=-1)
    np.testing.assert_allclose(last["lens_logit"], found.attrs["clean_logit"], atol=1e-6)
    np.testing.assert_allclose(last["lens_probability"], found.attrs["clean_probability"], atol=1e-6)
    assert last["lens_rank"] == 0
    assert list(found["stage"].values) == [f"resid_pre {layer}" for layer in range(4)] + ["resid_post 3"]
    value, _, _, capped = said(params, TOKENS, DIFFERENCE, PLACE)
    np.testing.assert_allclose(last["lens_logit"], value, atol=2e-5)
    probability = np.exp(capped - capped.max())[target] / np.exp(capped - capped.max()).sum()
    np.testing.assert_allclose(last["lens_probability"], probability, atol=1e-5)


def test_later_tokens_do_not_matter():
    tiny = model(toy_models.block("llama 3"))
    whole = contributions(tiny, item(TOKENS), PLACE, TOP)
    cut = contributions(tiny, item(TOKENS[: PLACE + 1]), PLACE, TOP)
    assert whole.drop_attrs().identical(cut.drop_attrs())
    assert (whole.attrs["position"], whole.attrs["token"]) == (PLACE, f"w{TOKENS[PLACE]}")
    assert "foil_ids" not in whole.attrs


def streamed(params):
    """A model whose layers are read as they are needed, from this machine's memory."""
    on = mesh.mesh_of(params)
    host = {name: np.asarray(leaf) for name, leaf in flat(params.weights["layers"]).items()}
    layers = Streamed(params.config, on, lambda number: {name: leaf[number] for name, leaf in host.items()})
    rest = {name: leaf for name, leaf in params.weights.items() if name != "layers"}
    return dataclasses.replace(model(params), params=params.replace(weights=rest), streamed=layers)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("by_head", [False, True])
def test_streamed_layers_give_the_same_to_the_bit(block, by_head):
    params = toy_models.block(block)
    one, other = (contributions(made, item(TOKENS), PLACE, TOP, by_head) for made in (model(params), streamed(params)))
    assert one.identical(other)


@pytest.mark.parametrize(("data", "model_axis"), few([(2, 1), (1, 2), (2, 2), (4, 1)], (2, 2)))
def test_several_devices_give_the_same(data, model_axis):
    params = toy_models.block("gemma 2")
    laid = mesh.lay(mesh.make(MeshConfig(data, model_axis)), params)
    one, other = (contributions(model(each), item(TOKENS), PLACE, TOP, True) for each in (params, laid))
    for name in ("contribution", "accumulated", "lens_logit", "lens_probability", "lens_rank", "lens_top_id"):
        np.testing.assert_allclose(one[name], other[name], atol=2e-5)


@pytest.mark.parametrize("by_head", [False, True])
def test_halves_add_up_to_their_rounding(by_head):
    params = toy_models.params(dtype="bfloat16", **toy_models.BLOCKS["gemma 2"])
    found = contributions(model(params), item(TOKENS), PLACE, TOP, by_head)
    np.testing.assert_allclose(found["contribution"].sum(), found.attrs["clean_logit"], atol=0.1)


def test_a_token_that_is_not_there_is_refused():
    tiny = model(toy_models.block("llama 3"))
    (one,) = itemise(tiny, as_prompts(["w1 w2 w3"]))
    for place in (3, -1):
        with pytest.raises(UserError, match=f"position {place}: prompt 'w1 w2 w3' has tokens 0-2; give one of them"):
            contributions(tiny, one, place, TOP)


@pytest.mark.parametrize("wrong", [0.01, np.nan])
def test_parts_that_do_not_add_up_are_refused(monkeypatch, wrong):
    right = module._walk

    def walk(*arguments):
        streams, writes = right(*arguments)
        return streams, [each * (1 + wrong) for each in writes]

    monkeypatch.setattr(module, "_walk", walk)
    with pytest.raises(UserError, match=r"prompt 'a text': contributions add up to .* use float32") as refused:
        contributions(model(toy_models.block("llama 3")), item(TOKENS), PLACE, TOP)
    assert "\n" not in str(refused.value)
