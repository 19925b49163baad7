import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_jax.core.edits import SITES, Kind, WriteStatistics, all_components, replacement
from hydra_jax.core.effects import delta_unembed, effects, head_unembed
from hydra_jax.core.prefill import MOST_LIKELY, prefill
from hydra_jax.core.replay import direct_edges, replay
from hydra_jax.models import pieces
from hydra_jax.models.transformer import Edits, forward
from tests.helpers import models as toy_models

jit_forward, jit_prefill, jit_replay = jax.jit(forward), jax.jit(prefill), jax.jit(replay)
lengths = st.sampled_from([1, 2, 5, 9])
seeds = st.integers(0, 5)


def full_forward_effects(params, tokens, layer, site, value):
    """Total effect and compensation [L, 2], from two whole forward passes and the unembedding itself."""
    logits, clean = jit_forward(params, tokens)
    ablated_logits, ablated = jit_forward(
        params, tokens, toy_models.edit(params.config, len(tokens), layer, site, -1, value)
    )
    target = logits[-1].argmax()
    final = clean.resid_post[-1, -1]
    sigma = np.sqrt(np.mean(np.square(final)) + params.config.norm_eps)
    unembedding = params.weights["unembedding"]
    direction = params.weights["final_norm"]["scale"] * (unembedding[:, target] - unembedding.mean(axis=1))
    moved = np.stack(
        [ablated.attn_out[:, -1] - clean.attn_out[:, -1], ablated.mlp_out[:, -1] - clean.mlp_out[:, -1]], 1
    )
    moved[layer, site] = 0

    def centred(row):
        return row[-1, target] - row[-1].mean()

    return centred(logits) - centred(ablated_logits), moved @ np.asarray(direction) / sigma


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("component", all_components(toy_models.config().layers), ids=str)
def test_replay_equals_the_full_forward(component, kind):
    params, tokens = toy_models.params(), toy_models.tokens(9)
    clean = jit_prefill(params, jnp.pad(tokens, (0, 3)), len(tokens))
    key = jax.random.key(7)
    source, mean, deviation = jax.random.normal(key, (3, params.config.width))
    value = replacement(kind, source, WriteStatistics(mean, deviation), key)
    delta = value - clean.writes[component.layer, component.site]
    found = effects(params, clean, jit_replay(params, clean, component.arrays()[:2], delta))
    total, compensation = full_forward_effects(params, tokens, component.layer, component.site, value)
    np.testing.assert_allclose(found.total_effect, total, atol=1e-5)
    np.testing.assert_allclose(found.compensation, compensation, atol=1e-5)
    assert abs(total) > 1e-2
    assert (found.compensation.ravel()[: component.index + 1] == 0).all()


@pytest.mark.slow
@given(seeds, lengths, st.sampled_from(all_components(4)), st.floats(0.01, 10))
def test_total_effect_is_direct_effect_less_compensation(seed, length, component, size):
    params = toy_models.params(seed)
    clean = jit_prefill(params, toy_models.tokens(length, seed), length)
    delta = size * jax.random.normal(jax.random.key(seed), (params.config.width,))
    found = effects(params, clean, jit_replay(params, clean, component.arrays()[:2], delta))
    downstream = found.attn_compensation + found.mlp_compensation + found.norm_compensation
    np.testing.assert_allclose(found.total_effect, found.direct_effect - downstream, atol=1e-4)
    np.testing.assert_allclose(found.residual, 0, atol=1e-4)


@given(seeds, lengths)
def test_contributions_sum_to_the_centred_logit(seed, length):
    params, tokens = toy_models.params(seed), toy_models.tokens(length, seed)
    clean = jit_prefill(params, tokens, length)
    embedding = clean.lens(params.weights["embedding"][tokens[-1]])
    np.testing.assert_allclose(delta_unembed(clean).sum() + embedding, clean.centred_logit, atol=1e-5)


@pytest.mark.parametrize("component", all_components(4), ids=str)
def test_an_edit_that_changes_nothing_has_no_effect(component):
    params = toy_models.params()
    clean = jit_prefill(params, toy_models.tokens(8), 8)
    delta = jnp.zeros(params.config.width)
    found = effects(params, clean, jit_replay(params, clean, component.arrays()[:2], delta))
    jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf, 0, atol=1e-5), found)


def test_the_last_layer_has_no_downstream_attention():
    params = toy_models.params()
    last = params.config.layers - 1
    clean = jit_prefill(params, toy_models.tokens(8), 8)
    delta = jax.random.normal(jax.random.key(0), (params.config.width,))
    of = {site: effects(params, clean, jit_replay(params, clean, (last, s), delta)) for s, site in enumerate(SITES)}
    assert of["attn"].attn_compensation == 0
    assert of["attn"].mlp_compensation != 0
    assert of["mlp"].attn_compensation == of["mlp"].mlp_compensation == 0


@pytest.mark.slow
@given(seeds, lengths, st.sampled_from([1, 4]))
def test_padding_changes_nothing(seed, length, padding):
    params, tokens = toy_models.params(seed), toy_models.tokens(length, seed)
    delta = jax.random.normal(jax.random.key(seed), (params.config.width,))
    found = []
    for rest in (0, padding):
        clean = jit_prefill(params, jnp.pad(tokens, (0, rest), constant_values=seed), length)
        layers = clean.layers
        layers = layers.replace(keys=layers.keys[..., :length], values=layers.values[..., :length, :])
        kept = clean.replace(layers=layers)
        found.append((kept, effects(params, clean, jit_replay(params, clean, (1, 0), delta))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), *found)


@pytest.mark.slow
def test_batching_over_prompts_and_edits_changes_nothing():
    params = toy_models.params()
    tokens = jnp.stack([toy_models.tokens(10, seed) for seed in range(3)])
    lengths = jnp.array([4, 10, 7])
    deltas = jax.random.normal(jax.random.key(0), (3, 5, params.config.width))
    clean = jax.jit(jax.vmap(prefill, (None, 0, 0)))(params, tokens, lengths)
    over_edits = jax.vmap(replay, (None, None, None, 0))
    together = jax.jit(jax.vmap(over_edits, (None, 0, None, 0)))(params, clean, (1, 1), deltas)
    for prompt in range(3):
        alone = jit_prefill(params, tokens[prompt], lengths[prompt])
        for edit in range(5):
            one = jit_replay(params, alone, (1, 1), deltas[prompt, edit])
            jax.tree.map(
                lambda a, b, at=(prompt, edit): np.testing.assert_allclose(a[at], b, atol=1e-5, rtol=1e-5),
                together,
                one,
            )


@pytest.mark.slow
@pytest.mark.parametrize("over", ["prompts", "all", "cache"])
def test_vmap_of_what_does_not_share_a_cache_is_right_too(over):
    """The cached attention's own batching rule covers one case; these are the others."""
    params = toy_models.params()
    clean = jax.jit(jax.vmap(prefill, (None, 0, None)))(
        params, jnp.stack([toy_models.tokens(6, s) for s in range(3)]), 6
    )
    deltas = jax.random.normal(jax.random.key(0), (3, params.config.width))
    layers = jnp.array([0, 2, 1])
    axes = {"prompts": (None, 0, (None, None), 0), "all": (None, 0, (0, 0), 0), "cache": (None, 0, (None, None), None)}
    component = (layers, jnp.array([0, 1, 0])) if over == "all" else (1, 0)
    delta = deltas[0] if over == "cache" else deltas
    together = jax.jit(jax.vmap(replay, axes[over]))(params, clean, component, delta)
    for i in range(3):
        where = (layers[i], i % 2) if over == "all" else (1, 0)
        one = jit_replay(params, jax.tree.map(lambda a, i=i: a[i], clean), where, deltas[0 if over == "cache" else i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-5, rtol=1e-5), together, one)


def test_all_components_share_one_compilation():
    params = toy_models.params(seed=3)
    clean = jit_prefill(params, toy_models.tokens(8), 8)
    fresh = jax.jit(lambda *arguments: replay(*arguments))
    for component in all_components(params.config.layers):
        fresh(params, clean, component.arrays()[:2], jnp.ones(params.config.width))
    assert fresh._cache_size() == 1


def test_a_given_target_is_the_one_that_is_read():
    params, tokens = toy_models.params(), toy_models.tokens(8)
    logits, _ = jit_forward(params, tokens)
    for target in (3, 17, MOST_LIKELY):
        clean = jit_prefill(params, tokens, 8, target)
        chosen = logits[-1].argmax() if target == MOST_LIKELY else target
        assert clean.target == chosen
        np.testing.assert_allclose(clean.centred_logit, logits[-1, chosen] - logits[-1].mean(), atol=1e-5)
        np.testing.assert_allclose(clean.probability, jax.nn.softmax(logits[-1])[chosen], atol=1e-6)
        np.testing.assert_allclose(clean.lens(clean.final), clean.centred_logit, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_weights_keep_the_identity():
    params = toy_models.params(dtype="bfloat16")
    clean = jit_prefill(params, toy_models.tokens(8), 8)
    assert clean.layers.keys.dtype == jnp.bfloat16
    assert clean.final.dtype == jnp.float32
    delta = jax.random.normal(jax.random.key(0), (params.config.width,))
    found = effects(params, clean, jit_replay(params, clean, (1, 0), delta))
    np.testing.assert_allclose(found.residual, 0, atol=1e-4)
    single = jit_prefill(toy_models.params(), toy_models.tokens(8), 8, clean.target)
    np.testing.assert_allclose(clean.centred_logit, single.centred_logit, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("component", all_components(4)[::2], ids=str)
def test_a_direct_edge_is_the_change_of_a_component_that_alone_sees_the_edit(component):
    """In full forward passes: every write but the edited and the responding one held at its clean value."""
    params, tokens = toy_models.params(), toy_models.tokens(7)
    clean = jit_prefill(params, tokens, 7)
    delta = jax.random.normal(jax.random.key(1), (params.config.width,))
    found = jax.jit(direct_edges)(params, clean, component.arrays()[:2], delta)
    held = clean.writes.at[component.layer, component.site].add(delta)
    for other in all_components(4):
        if other <= component:
            assert found[other.layer, other.site] == 0
            continue
        mask = jnp.zeros((4, 2, 7), bool).at[:, :, -1].set(True).at[other.layer, other.site, -1].set(False)
        _, trace = jit_forward(params, tokens, Edits(mask, held[:, :, None]))
        write = (trace.attn_out, trace.mlp_out)[other.site][other.layer, -1]
        expected = clean.lens(write - clean.writes[other.layer, other.site])
        np.testing.assert_allclose(found[other.layer, other.site], expected, atol=1e-5)


@pytest.mark.parametrize("component", all_components(4)[:-1], ids=str)
def test_the_first_component_downstream_has_nothing_passed_on_to_it(component):
    params = toy_models.params()
    clean = jit_prefill(params, toy_models.tokens(8), 8)
    delta = jax.random.normal(jax.random.key(0), (params.config.width,))
    where = component.arrays()[:2]
    first = component.index + 1
    edges = jax.jit(direct_edges)(params, clean, where, delta)
    whole = effects(params, clean, jit_replay(params, clean, where, delta))
    np.testing.assert_allclose(edges.ravel()[first], whole.compensation.ravel()[first], atol=1e-6)
    assert abs(edges.ravel()[first]) > 1e-4


def test_heads_add_up_to_the_attention_write():
    params = toy_models.params()
    clean = jit_prefill(params, toy_models.tokens(8), 8)
    for layer in range(4):
        shares = pieces.head_shares(pieces.layer_of(params, layer), clean.mixed[layer])
        np.testing.assert_allclose(shares.sum(axis=0), clean.writes[layer, 0], atol=1e-5)
    np.testing.assert_allclose(head_unembed(params, clean).sum(axis=1), delta_unembed(clean)[:, 0], atol=1e-5)
