from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydra_jax.core.prefill import prefill
from hydra_jax.errors import UserError
from hydra_jax.models import transformer
from hydra_jax.weights import check as checks
from tests.helpers import models as toy_models
from tests.helpers.speed import few


def check(params, where):
    with ThreadPoolExecutor(1) as beside:
        checks.Check(params.config, None, beside)(params, where)


def refusal(params):
    with pytest.raises(UserError) as raised:
        check(params, "model.gguf")
    message = str(raised.value)
    assert message.startswith("model.gguf: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", few(["float32", "bfloat16"], "float32"))
@pytest.mark.parametrize("block", few(toy_models.BLOCKS, "gemma 2"))
def test_every_block_passes(block, dtype):
    check(toy_models.params(dtype=dtype, **toy_models.BLOCKS[block]), "model.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [dict(context=2), dict(context=1), dict(layers=1)], ids=str)
def test_other_shapes_and_types_pass(changes):
    check(toy_models.params(**changes), "model.gguf")


@pytest.mark.slow
def test_activations_that_overflow_are_found():
    params = toy_models.params()
    huge = jax.tree.map(lambda leaf: leaf * 1e25, params.weights["layers"]["mlp"])
    layers = params.weights["layers"] | {"mlp": huge}
    assert "writes do not sum" in refusal(params.replace(weights=params.weights | {"layers": layers}))


def test_a_wrong_readout_is_found(monkeypatch):
    def gain_forgotten(params, contrast):
        matrix = params.weights["unembedding"]
        return matrix[:, contrast.tokens[0]] - matrix.mean(axis=1), jnp.zeros(())

    monkeypatch.setattr(transformer, "readout", gain_forgotten)
    assert "do not sum to the logit" in refusal(toy_models.params(norm_eps=3e-5))  # compiled by no other test


def test_padding_that_leaks_is_found(monkeypatch):
    def leaky(params, tokens, length):
        return prefill(params, jnp.where(np.arange(len(tokens)) == 0, len(tokens), tokens), length)

    monkeypatch.setattr(checks, "prefill", leaky)
    assert "padding changes" in refusal(toy_models.params(norm_eps=4e-5))
