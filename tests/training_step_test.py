import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hydra_jax.models import pieces, transformer
from hydra_jax.models.transformer import Dropout, DropoutRates
from hydra_jax.training import data, step
from tests.helpers import models as toy_models
from tests.helpers import training as toy_training
from tests.helpers.speed import few

VOCABULARY = 40
BOUNDARY = 3
STEP_SIZE = 3e-3
"""Of finite differences, in units of a parameter's own size."""
ARMS = {
    "no_dropout": {},
    "dropout": dict(resid=0.1, attn=0.2, mlp=0.3),
    "stochastic_depth": dict(depth=0.4),
}


update = jax.jit(step.update, static_argnames="config")


def rows(batch=4, parts=1, seed=1):
    return jax.random.randint(jax.random.key(seed), (parts, batch, toy_training.SHAPE.context + 1), 0, VOCABULARY)


def after(config, state=None, given=None, steps=2):
    state = step.initial(config, VOCABULARY) if state is None else state
    for number in range(steps):
        given_rows = rows(seed=number) if given is None else given
        state, metrics = update(state, given_rows, jnp.int32(BOUNDARY), config=config)
    return state, metrics


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def keyed(tree):
    """Keys as numbers, which can be compared."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)


class TestArms:
    @pytest.mark.slow
    @pytest.mark.parametrize("arm", ARMS)
    def test_share_initial_parameters(self, arm):
        assert_equal(
            keyed(step.initial(toy_training.config(), VOCABULARY)),
            keyed(step.initial(toy_training.config(arm=arm, dropout=ARMS[arm]), VOCABULARY)),
        )

    def test_share_batches(self):
        batches = []
        for arm, rates in ARMS.items():
            config = toy_training.config(arm=arm, dropout=rates)
            corpus = data.build(config.data, config.model.context)
            iterator = corpus.batches(config.seed, config.batch)
            batches.append([next(iterator) for _ in range(2 * len(corpus.rows) // config.batch)])
        np.testing.assert_array_equal(batches[0], batches[1])
        np.testing.assert_array_equal(batches[0], batches[2])

    @pytest.mark.slow
    def test_rate_0_is_no_dropout(self):
        weights = step.initial(toy_training.config(), VOCABULARY).weights
        keys = jax.random.split(jax.random.key(1), 4)

        @functools.partial(jax.jit, static_argnums=1)
        @functools.partial(jax.value_and_grad, has_aux=True)
        def run(weights, config, keys):
            params = step.computing(config, weights, VOCABULARY)
            return step.batch_loss(params, rows()[0], jnp.int32(BOUNDARY), keys, config)

        nothing = run(weights, toy_training.config(), None)
        assert_equal(nothing, run(weights, toy_training.config(), keys))
        (loss, _), _ = run(weights, toy_training.config(dropout=dict(attn=0.1)), keys)
        assert loss != nothing[0][0]


class TestDropout:
    @pytest.mark.parametrize("arm", few(ARMS, "dropout"))
    @pytest.mark.parametrize("block", few(["llama 3", "pythia", "gemma 2"], "llama 3"))
    def test_trace_is_what_was_added(self, arm, block):
        params, tokens = toy_models.block(block), toy_models.tokens(7)
        dropout = Dropout(jax.random.key(5), DropoutRates(**ARMS[arm]))
        logits, trace = transformer.forward(params, tokens, dropout=dropout)
        np.testing.assert_allclose(trace.resid_pre[1:], trace.resid_post[:-1], rtol=0, atol=1e-6)
        last = jax.vmap(lambda resid: transformer.unembed(params, resid))(trace.resid_post[-1])
        cap = params.config.final_softcap
        np.testing.assert_allclose(logits, cap * np.tanh(last / cap) if cap else last, rtol=0, atol=1e-4)
        # What is written is the write of the stream that is read, where it was kept: nothing else was added.
        for layer in range(params.config.layers):
            resid = trace.resid_pre[layer] if params.config.parallel else trace.resid_mid[layer]
            weights = pieces.layer_of(params, layer)
            whole = jax.vmap(pieces.mlp_write, (None, 0))(weights, resid)
            rates = dropout.rates
            kept = whole / ((1 - rates.mlp) * (1 - rates.depth))
            left_out = np.asarray(trace.mlp_out[layer] == 0)
            np.testing.assert_allclose(np.where(left_out, 0, kept), trace.mlp_out[layer], rtol=0, atol=1e-4)
            places = jnp.arange(len(tokens))
            cache = jnp.transpose(trace.keys[layer], (1, 2, 0)), jnp.swapaxes(trace.values[layer], 0, 1)
            attend = jax.vmap(pieces.attend, (None, 0, 0, None, None))
            mixed = attend(weights, trace.resid_pre[layer], places, *cache)
            whole = jax.vmap(pieces.attn_write, (None, 0))(weights, mixed)
            kept = whole / ((1 - rates.attn) * (1 - rates.depth))
            attn_left_out = np.asarray(trace.attn_out[layer] == 0)
            np.testing.assert_allclose(np.where(attn_left_out, 0, kept), trace.attn_out[layer], rtol=0, atol=1e-4)
            if arm == "stochastic_depth":
                assert left_out.all() or not left_out.any()
            if arm == "no_dropout":
                assert not left_out.any()

    @pytest.mark.slow
    def test_leaves_out_as_much_as_its_rate_and_keeps_the_mean(self):
        params, tokens = toy_models.params(layers=1), toy_models.tokens(5)
        _, clean = transformer.forward(params, tokens)
        keys = jax.random.split(jax.random.key(0), 2000)

        def run(rates):
            return jax.vmap(lambda key: transformer.forward(params, tokens, dropout=Dropout(key, rates))[1])(keys)

        for rates, share in ((DropoutRates(attn=0.3), 0.3), (DropoutRates(depth=0.25), 0.25)):
            writes = run(rates).attn_out
            assert abs(float((writes == 0).mean()) - share) < 0.02
            np.testing.assert_allclose(writes.mean(axis=0), clean.attn_out[...], rtol=0, atol=0.15)
        entering = run(DropoutRates(resid=0.4)).resid_pre[:, 0]
        assert abs(float((entering == 0).mean()) - 0.4) < 0.02

    @pytest.mark.slow
    def test_an_edit_replaces_what_dropout_left(self):
        params, tokens = toy_models.params(), toy_models.tokens(6)
        edit = toy_models.edit(params.config, 6, 1, 0, 3, jnp.full(params.config.width, 2.0))
        dropout = Dropout(jax.random.key(0), DropoutRates(attn=0.5, depth=0.5))
        _, trace = transformer.forward(params, tokens, edit, dropout)
        np.testing.assert_array_equal(trace.attn_out[1, 3], 2.0)


class TestLoss:
    def test_is_the_mean_of_what_is_foretold_but_boundaries(self):
        config = toy_training.config()
        state = step.initial(config, VOCABULARY)
        given = rows()[0].at[:, 5].set(BOUNDARY)
        params = step.computing(config, state.weights, VOCABULARY)
        total, count = step.batch_loss(params, given, jnp.int32(BOUNDARY), None, config)
        losses = []
        for row in np.asarray(given):
            logits = np.asarray(transformer.forward(params, jnp.asarray(row[:-1]))[0], np.float64)
            log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            losses += [-lp[token] for lp, token in zip(log_probabilities, row[1:], strict=True) if token != BOUNDARY]
        assert count == len(losses) < given[:, 1:].size
        np.testing.assert_allclose(total, np.sum(losses), rtol=1e-5)

    @pytest.mark.parametrize("arm", few(ARMS))
    def test_gradient_agrees_with_finite_differences(self, arm):
        config = toy_training.config(dropout=ARMS[arm])
        weights = step.initial(config, VOCABULARY).weights
        keys = jax.random.split(jax.random.key(2), 4)

        @jax.jit
        def loss(weights):
            params = step.computing(config, weights, VOCABULARY)
            total, count = step.batch_loss(params, rows()[0], jnp.int32(BOUNDARY), keys, config)
            return total / count

        gradient = jax.grad(loss)(weights)
        for leaf_key in range(3):
            random = jax.random.key(leaf_key)
            direction = jax.tree.map(lambda w, key=random: w.std() * jax.random.normal(key, w.shape), weights)
            slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)))
            ends = [jax.tree.map(lambda w, d, by=by: w + by * d, weights, direction) for by in (STEP_SIZE, -STEP_SIZE)]
            # Rounding of the loss, some 3e-7 over 6e-3; and the third derivative.
            np.testing.assert_allclose((loss(ends[0]) - loss(ends[1])) / (2 * STEP_SIZE), slope, rtol=5e-3, atol=3e-4)


class TestUpdate:
    @pytest.mark.parametrize("arm", few(["no_dropout", "dropout"]))
    def test_parts_of_a_batch_make_the_whole(self, arm):
        # A part's share of boundaries is its own: the mean is over all that is foretold, not over parts.
        whole = rows(batch=4)
        parts = whole.reshape(2, 2, -1)
        _, of_one = after(toy_training.config(dropout=ARMS[arm]), given=whole, steps=1)
        _, of_two = after(toy_training.config(dropout=ARMS[arm], accumulate=2), given=parts, steps=1)
        np.testing.assert_allclose(of_one.loss, of_two.loss, rtol=1e-6)
        np.testing.assert_allclose(of_one.gradient_norm, of_two.gradient_norm, rtol=1e-5)
        assert of_one.gradient_norm > 0.1

    @pytest.mark.slow
    @pytest.mark.parametrize("arm", ["no_dropout", "dropout"])
    def test_devices_change_nothing(self, arm):
        config = toy_training.config(dropout=ARMS[arm])
        alone, _ = after(config)
        mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
        spread = NamedSharding(mesh, PartitionSpec(None, "data"))
        state = jax.device_put(step.initial(config, VOCABULARY), NamedSharding(mesh, PartitionSpec()))
        for number in range(2):
            given = jax.device_put(rows(seed=number), spread)
            boundary = jax.device_put(np.int32(BOUNDARY), NamedSharding(mesh, PartitionSpec()))
            state, _ = update(state, given, boundary, config=config)
        # Adam divides small gradients by their own size, so rounding of those shows.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), alone.weights, state.weights)

    @pytest.mark.slow
    def test_bfloat16_computes_on_float32_weights(self):
        config = toy_training.config(dtype="bfloat16")
        state, metrics = after(config)
        _, exact = after(toy_training.config())
        assert {leaf.dtype for leaf in jax.tree.leaves(state.weights)} == {np.dtype("float32")}
        assert metrics.loss != exact.loss
        np.testing.assert_allclose(metrics.loss, exact.loss, rtol=1e-2)

    def test_only_matrices_decay(self):
        decays = step.decays(step.initial(toy_training.config(), VOCABULARY).weights)
        assert decays["layers"]["attn"]["query"]["kernel"]
        assert decays["embedding"]
        assert not decays["layers"]["attn_norm"]["scale"]
        assert not decays["final_norm"]["scale"]

    def test_learning_rate_rises_and_falls(self):
        config = toy_training.config(optimizer=dict(warmup=10, learning_rate=0.5, final_share=0.1)).optimizer
        rate = step.schedule(config, 100)  # of optax, with numbers of Python
        assert rate(0) == 0
        np.testing.assert_allclose([rate(5), rate(10), rate(55), rate(100)], [0.25, 0.5, 0.275, 0.05], rtol=1e-6)
