import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydra_jax.benchmarks import devices as device_scaling
from hydra_jax.benchmarks import sweep
from hydra_jax.benchmarks.kernels import forward_batch, layer_products, measure, table
from hydra_jax.config import AblationConfig
from hydra_jax.core.edits import SITES, all_components
from hydra_jax.errors import UserError
from hydra_jax.models.shapes import SHAPES, shape
from hydra_jax.models.transformer import forward
from hydra_jax.sweep.roofline import Roofline, intervention_flops
from tests.helpers import checkpoints, commands
from tests.helpers import models as toy_models
from tests.helpers.commands import finish
from tests.helpers.speed import few


@pytest.mark.parametrize("block", ["llama 3", "gpt-2", "pythia"])
@pytest.mark.parametrize("component", all_components(4), ids=str)
def test_arithmetic_is_two_operations_a_downstream_weight(component, block):
    params = toy_models.block(block)
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
    params = toy_models.params()
    tokens = jnp.stack([toy_models.tokens(7, seed) for seed in range(3)])
    values = jax.random.normal(jax.random.key(0), (3, params.config.width))
    found = forward_batch(params, tokens, jnp.array([2, 1]), values)
    for row in range(3):
        edits = toy_models.edit(params.config, 7, 2, 1, -1, values[row])
        np.testing.assert_allclose(found[row], forward(params, tokens[row], edits)[0][-1], atol=1e-5)


def test_a_shape_may_be_cut_to_its_first_layers():
    whole, cut = shape("gemma2-2b"), shape("gemma2-2b", 3)
    assert whole == SHAPES["gemma2-2b"]
    assert cut == dataclasses.replace(whole, layers=3, windows=(4096, 0, 4096))
    for layers in (-1, 27):
        with pytest.raises(UserError, match=r"config\.layers: is .*; gemma2-2b has 26"):
            shape("gemma2-2b", layers)


@pytest.mark.slow
def test_a_measurement_is_whole():
    measured = measure(toy_models.params(), length=6, rows=12, draws=3, step=3)
    assert measured.rows == 12
    assert measured.kernel_to_gemm == pytest.approx(measured.kernel_flops / measured.gemm_flops)
    assert measured.speedup == pytest.approx(measured.interventions / measured.forwards)
    assert measured.interventions > 0
    assert len(table([measured]).splitlines()) == 4
    assert "bound by" in str(measured.roofline)


@pytest.mark.slow
def test_a_whole_sweep_is_measured_by_the_code_that_sweeps():
    swept = sweep.measure(toy_models.params(), prompts=6, length=5, ablation=AblationConfig(replacements=3), rows=9)
    assert (swept.prompts, swept.at_once, swept.interventions) == (6, 3, 6 * 3 * 8)
    once = sum(intervention_flops(toy_models.config(), component, 5) for component in all_components(4))
    assert swept.flops * swept.kernel_seconds == pytest.approx(6 * 3 * once)
    assert "of bare products" in str(swept)


@pytest.mark.parametrize(("devices", "model"), few([(1, 1), (4, 2)], (4, 2)))
def test_devices_are_measured_with_what_passes_between_them(devices, model):
    found = device_scaling.measure(toy_models.params(), devices, model, prompts=5, length=6, draws=3, step=3)
    assert found.prompts == -(-5 // (devices // model)) * (devices // model)
    assert found.data_collectives == 0
    assert (found.model_collectives > 0) == (model > 1)
    assert found.parameter_bytes <= sum(leaf.nbytes for leaf in jax.tree.leaves(toy_models.params())) / model * 1.2


@pytest.mark.slow
def test_the_commands_measure_a_shape_that_is_a_config_alone(tmp_path):
    described = checkpoints.hugging_face_directory(tmp_path / "tiny") / "config.json"
    asked = [f"--shape={described}", "--config.lengths=(6,)", "--config.rows=6", "--config.draws=3"]
    scaled = finish(commands.start("launch.benchmark", *asked, "--devices=1,2", f"--output={tmp_path}/devices.json"))
    assert scaled.returncode == 0, scaled.err
    rates = [line.split()[:2] for line in scaled.out.splitlines() if line.startswith(("strong", "weak"))]
    assert rates == [["strong", "1"], ["strong", "2"], ["weak", "1"], ["weak", "2"]]
    swept = finish(commands.start("launch.benchmark", *asked, "--sweep=4", f"--output={tmp_path}/sweep.json"))
    assert swept.returncode == 0, swept.err
    assert json.loads((tmp_path / "sweep.json").read_text())["figures"]["interventions"] == 4 * 3 * 4
    for wrong, words in (
        (["--devices=two"], "--devices: two are not numbers"),
        (["--sweep=4", "--loading"], "--loading and --sweep: are different things"),
        (["--shape=llama-8b"], "--shape: 'llama-8b' is unknown"),
    ):
        refused = finish(commands.start("launch.benchmark", *wrong))
        assert refused.returncode == 1
        assert refused.err.startswith(f"error: {words}")


@pytest.mark.parametrize(("flops", "bound"), [(80e9, "arithmetic"), (1e9, "memory")])
def test_what_takes_longest_is_the_bound(flops, bound):
    assert Roofline(flops, gemm_flops=100e9, bytes=5e9, bandwidth=10e9).bound == bound
