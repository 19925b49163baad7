"""Whole sweeps of models that are not Llama: the identity is asserted of every ablation in them."""

import numpy as np
import pytest

import hydra_jax
from hydra_jax.weights.load import Model
from tests.helpers import checkpoints
from tests.helpers import models as toy_models

PROMPTS = [f"the {number} in the" for number in (7, 12, 385, 4096)]


@pytest.mark.slow
@pytest.mark.parametrize("block", ["gpt-2", "pythia", "gemma 2", "olmo 2"])
@pytest.mark.parametrize("sites", ["attn,mlp", "heads"])
def test_a_sweep_of_every_kind_of_block(block, sites):
    params = toy_models.params(vocab_size=300, **toy_models.BLOCKS[block])
    model = Model(block, params, checkpoints.tokenizer(), "")
    effects = hydra_jax.sweep(model, PROMPTS, kind="resample", replacements=2, sites=sites, layers="1,3")
    assert np.isfinite(effects["total_effect"]).all()
    assert (np.abs(effects["total_effect"]).max("prompt") > 1e-3).all()
    ablated = effects.isel(ablated=(effects["ablated_site"] == "attn") & (effects["ablated_layer"] == 3))
    own_mlp = (effects["layer"] == 3) & (effects["site"] == "mlp")
    responds = np.abs(ablated["compensation"].isel(component=own_mlp)) > 1e-6
    assert (responds.any() == (not params.config.parallel)).all()
