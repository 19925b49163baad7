import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydra_jax.benchmarks.kernels import forward_batch, layer_products, measure, table
from hydra_jax.edits import SITES, all_components
from hydra_jax.errors import UserError
from hydra_jax.models.shapes import SHAPES, shape
from hydra_jax.models.transformer import forward
from hydra_jax.roofline import intervention_flops
from tests import toys


@pytest.mark.parametrize("block", ["llama 3", "gpt-2", "pythia"])
@pytest.mark.parametrize("component", all_components(4), ids=str)
def test_arithmetic_is_two_operations_a_downstream_weight(component, block):
    params = toys.block(block)
    layers = params.weights["layers"]
    kernels = {site: [leaf[0].size for leaf in jax.tree.leaves(layers[site]) if leaf.ndim == 3] for site in SITES}
    sizes = {site: sum(kernels[site]) for site in SITES}
    parallel = params.config.parallel
    downstream = [c for c in all_components(4) if (c.layer > component.layer if parallel else c > component)]
    expected = 2 * sum(sizes[SITES[c.site]] for c in downstream)
    assert intervention_flops(params.config, component, length=0) == expected
    products, operations = layer_products(params.config, rows=3)
    assert len(products()) == len(kernels["attn"] + kernels["mlp"])
    assert operations == 2 * 3 * sum(sizes.values())


def test_the_baseline_is_the_full_forward_with_an_edit():
    params = toys.params()
    tokens = jnp.stack([toys.tokens(7, seed) for seed in range(3)])
    values = jax.random.normal(jax.random.key(0), (3, params.config.width))
    found = forward_batch(params, tokens, jnp.array([2, 1]), values)
    for row in range(3):
        edits = toys.edit(params.config, 7, 2, 1, -1, values[row])
        np.testing.assert_allclose(found[row], forward(params, tokens[row], edits)[0][-1], atol=1e-5)


def test_a_shape_may_be_cut_to_its_first_layers():
    whole, cut = shape("gemma2-2b"), shape("gemma2-2b", 3)
    assert whole == SHAPES["gemma2-2b"]
    assert cut == dataclasses.replace(whole, layers=3, windows=(4096, 0, 4096))
    for layers in (-1, 27):
        with pytest.raises(UserError, match=r"config\.layers: is .*; gemma2-2b has 26"):
            shape("gemma2-2b", layers)


def test_a_measurement_is_whole():
    measured = measure(toys.params(), length=6, rows=12, draws=3, step=3)
    assert measured.rows == 12
    assert measured.kernel_to_gemm == pytest.approx(measured.kernel_flops / measured.gemm_flops)
    assert measured.speedup == pytest.approx(measured.interventions / measured.forwards)
    assert measured.interventions > 0
    assert len(table([measured]).splitlines()) == 4
    assert "bound by" in str(measured.roofline)
