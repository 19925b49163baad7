"""Every kind of block, without anything else to compare with: the kernels against the general path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydra_jax.core.edits import ATTN, MLP, all_components
from hydra_jax.core.effects import delta_unembed, effects, head_unembed
from hydra_jax.core.prefill import prefill
from hydra_jax.core.replay import direct_edges, replay
from hydra_jax.models import pieces
from hydra_jax.models.transformer import Edits, embed, forward, unembed
from tests.helpers import models as toy_models
from tests.helpers.speed import few

jit_forward, jit_prefill, jit_replay, jit_edges = (jax.jit(f) for f in (forward, prefill, replay, direct_edges))
TOKENS = toy_models.tokens(9)
LAST = toy_models.config().layers - 1

pytestmark = pytest.mark.parametrize("block", few(toy_models.BLOCKS, "gemma 2"))


def clean_run(params):
    return jit_prefill(params, jnp.pad(TOKENS, (0, 3)), len(TOKENS))


def contribution(params, write, final, target):
    """What `write` adds to the centred logit of `final`, the final norm's divisor held: the norm spelled out."""
    centre = np.mean if params.config.norm == "layer" else lambda stream: 0.0
    norm = {name: np.asarray(leaf) for name, leaf in params.weights["final_norm"].items()}
    sigma = np.sqrt(np.square(final - centre(final)).mean() + params.config.norm_eps)
    matrix = np.asarray(params.weights["embedding"].T if params.config.tied else params.weights["unembedding"])

    def centred_logit(stream):
        logits = ((stream - centre(stream)) / sigma * norm["scale"] + norm.get("bias", 0.0)) @ matrix
        return logits[target] - logits.mean()

    return centred_logit(final) - centred_logit(final - write)


def downstream(params, component):
    """Whose reads are after `component`, by the block's order."""
    parallel = params.config.parallel
    return [c for c in all_components(LAST + 1) if (c.layer > component.layer if parallel else c > component)]


@pytest.mark.parametrize("component", all_components(LAST + 1)[::3], ids=str)
def test_replay_equals_the_full_forward(block, component):
    params = toy_models.block(block)
    clean = clean_run(params)
    value = jax.random.normal(jax.random.key(3), (params.config.width,))
    delta = value - clean.writes[component.layer, component.site]
    found = effects(params, clean, jit_replay(params, clean, component.arrays()[:2], delta))
    edits = toy_models.edit(params.config, len(TOKENS), component.layer, component.site, -1, value)
    runs = [jit_forward(params, TOKENS, edits)[1] for edits in (None, edits)]
    logits = [unembed(params, run.resid_post[-1, -1]) for run in runs]
    target = int(logits[0].argmax())
    writes, ablated = (np.stack([run.attn_out[:, -1], run.mlp_out[:, -1]], axis=1) for run in runs)
    final = np.asarray(runs[0].resid_post[-1, -1])
    expected = [row[target] - row.mean() for row in logits]
    np.testing.assert_allclose(clean.centred_logit, expected[0], atol=1e-5)
    np.testing.assert_allclose(found.total_effect, expected[0] - expected[1], atol=1e-5)
    np.testing.assert_allclose(found.residual, 0, atol=1e-5)
    assert abs(found.total_effect) > 1e-2
    after = downstream(params, component)
    for other in all_components(LAST + 1):
        change = ablated[other.layer, other.site] - writes[other.layer, other.site]
        moved = contribution(params, change, final, target) if other != component else 0
        np.testing.assert_allclose(found.compensation[other.layer, other.site], moved, atol=1e-5)
        assert (found.compensation[other.layer, other.site] != 0) == (other in after)


def test_the_lens_sums_to_the_logit_and_writes_to_the_stream(block):
    params = toy_models.block(block)
    clean = clean_run(params)
    entering = embed(params, TOKENS)[-1]
    np.testing.assert_allclose(entering + clean.writes.sum(axis=(0, 1)), clean.final, atol=1e-4)
    lens = delta_unembed(clean).sum() + clean.lens(entering) + clean.constant
    np.testing.assert_allclose(lens, clean.centred_logit, atol=1e-4)
    logits, _ = jit_forward(params, TOKENS)
    np.testing.assert_allclose(clean.probability, jax.nn.softmax(logits[-1])[clean.target], atol=1e-6)


def test_the_last_attention_has_its_mlp_downstream_unless_the_block_is_parallel(block):
    params = toy_models.block(block)
    clean = clean_run(params)
    delta = jax.random.normal(jax.random.key(0), (params.config.width,))
    for kernel in (lambda *a: jit_replay(*a).changes, jit_edges):
        moved = kernel(params, clean, (LAST, ATTN), delta)
        assert (moved[:, ATTN] == 0).all()
        assert (moved[:LAST, MLP] == 0).all()
        assert (moved[LAST, MLP] == 0) == params.config.parallel
        assert (kernel(params, clean, (LAST, MLP), delta) == 0).all()


def test_a_direct_edge_is_the_change_of_a_component_that_alone_sees_the_edit(block):
    params = toy_models.block(block)
    clean = clean_run(params)
    delta = jax.random.normal(jax.random.key(1), (params.config.width,))
    found = jit_edges(params, clean, (1, ATTN), delta)
    held = clean.writes.at[1, ATTN].add(delta)
    after = [c for c in all_components(LAST + 1) if (c.layer, c.site) > (1, MLP if params.config.parallel else ATTN)]
    for other in after:
        mask = jnp.zeros((LAST + 1, 2, len(TOKENS)), bool).at[:, :, -1].set(True)
        _, trace = jit_forward(params, TOKENS, Edits(mask.at[other.layer, other.site, -1].set(False), held[:, :, None]))
        write = (trace.attn_out, trace.mlp_out)[other.site][other.layer, -1]
        expected = clean.lens(write - clean.writes[other.layer, other.site])
        np.testing.assert_allclose(found[other.layer, other.site], expected, atol=1e-5)
    assert np.count_nonzero(found) == len(after)


def test_padding_changes_nothing(block):
    params = toy_models.block(block)
    one, other = clean_run(params), jit_prefill(params, TOKENS, len(TOKENS))
    layers = one.layers
    layers = layers.replace(keys=layers.keys[..., : len(TOKENS)], values=layers.values[..., : len(TOKENS), :])
    trimmed = one.replace(layers=layers)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), trimmed, other)


def test_no_future_token_leaks(block):
    params = toy_models.block(block)
    before, after = (jit_forward(params, tokens)[0] for tokens in (TOKENS, TOKENS.at[5:].add(-1)))
    np.testing.assert_array_equal(before[:5], after[:5])
    assert not np.allclose(before[5:], after[5:])


def test_a_window_is_as_long_as_it_says(block):
    params = toy_models.block(block)
    one_layer = dataclasses.replace(params.config, layers=1, windows=params.config.windows[:1])
    params = params.replace(
        weights=params.weights | {"layers": jax.tree.map(lambda leaf: leaf[:1], params.weights["layers"])},
        config=one_layer,
    )
    window = one_layer.windows[0] if one_layer.windows else len(TOKENS)
    for distance in range(1, len(TOKENS)):
        changed = TOKENS.at[-1 - distance].add(1)
        same = np.array_equal(*(jit_forward(params, tokens)[0][-1] for tokens in (TOKENS, changed)))
        assert same == (distance >= window)


def test_heads_and_the_output_bias_add_up_to_the_write(block):
    params = toy_models.block(block)
    c, clean = params.config, clean_run(params)
    shares = [pieces.head_shares(pieces.layer_of(params, layer), clean.mixed[layer]) for layer in range(c.layers)]
    sums = np.stack(shares).sum(axis=1)
    bias = params.weights["layers"]["attn"]["out"].get("bias", jnp.zeros_like(sums))
    if c.post_norm:
        scale = params.weights["layers"]["attn_post_norm"]["scale"]
        sums = sums / np.sqrt(np.square(sums).mean(axis=1, keepdims=True) + c.norm_eps) * scale
    np.testing.assert_allclose(sums + bias, clean.writes[:, ATTN], atol=1e-4)
    found = head_unembed(params, clean).sum(axis=1) + jax.vmap(clean.lens)(bias)
    np.testing.assert_allclose(found, delta_unembed(clean)[:, ATTN], atol=1e-4)


def test_a_heads_delta_is_of_the_write_computed_anew(block):
    params = toy_models.block(block)
    clean = clean_run(params)
    c, layer, head = params.config, 1, 2
    new = jax.random.normal(jax.random.key(5), (c.head_dim,))
    values = jnp.zeros((c.heads, c.head_dim)).at[head].set(new)
    found = pieces.heads_delta(pieces.layer_of(params, layer), clean.mixed[layer], values, jnp.arange(c.heads) == head)
    attn = jax.tree.map(lambda leaf: np.asarray(leaf[layer]), params.weights["layers"]["attn"]["out"])
    mixed = np.asarray(clean.mixed[layer].at[head].set(new)).reshape(-1)
    write = mixed @ attn["kernel"] + attn.get("bias", 0.0)
    if c.post_norm:
        scale = params.weights["layers"]["attn_post_norm"]["scale"][layer]
        write = write / np.sqrt(np.square(write).mean() + c.norm_eps) * scale
    np.testing.assert_allclose(found, write - clean.writes[layer, ATTN], atol=1e-5)
