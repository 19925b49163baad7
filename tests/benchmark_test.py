import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydra_jax.benchmarks import devices as device_scaling
from hydra_jax.benchmarks import sweep, timing, walks
from hydra_jax.benchmarks.host import HostModel
from hydra_jax.benchmarks.kernels import forward_batch, layer_products, measure, table
from hydra_jax.config import AblationConfig, MeshConfig
from hydra_jax.core.edits import SITES, all_components
from hydra_jax.engine import mesh
from hydra_jax.engine.walk import Texts
from hydra_jax.engine.walk import forward as layers_of
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


def test_a_measured_walk_ablates_as_whole_forward_passes_do():
    params, draws = toy_models.params(), 2
    tokens, components = walks.random_tokens(params.config, 3, 5), all_components(4)[1::3]
    run = jax.jit(forward)
    targets, used = walks.most_likely(params, tokens), {}

    def sources(component, clean):
        used[component] = np.asarray(walks.others(component, clean, draws))
        return used[component]

    effects = walks.walk(params, tokens, targets, components, draws, at_once=4, sources=sources)
    for prompt, (number, component) in itertools.product(range(3), enumerate(components)):
        clean, _ = run(params, jnp.asarray(tokens[prompt]))
        assert targets[prompt] == clean[-1].argmax()
        others = [run(params, jnp.asarray(tokens[(prompt - 1 - draw) % 3]))[1] for draw in range(draws)]
        for draw, other in enumerate(others):
            write = (other.attn_out, other.mlp_out)[component.site][component.layer, -1]
            np.testing.assert_allclose(used[component][prompt, draw], write, atol=1e-5)
            edits = toy_models.edit(params.config, 5, component.layer, component.site, -1, write)
            ablated = run(params, jnp.asarray(tokens[prompt]), edits)[0][-1]
            centred = [logits[targets[prompt]] - logits.mean() for logits in (clean[-1], ablated)]
            total = effects.total_effect[prompt, number, 0, draw]
            np.testing.assert_allclose(total, centred[0] - centred[1], atol=1e-4)


def test_steps_within_steps_are_timed_by_themselves(monkeypatch):
    now = [0.0]

    class Step:
        def outer(self):
            now[0] += 3
            self.inner()
            now[0] += 4

        def inner(self):
            now[0] += 5
            return "made"

        def failing(self):
            now[0] += 11
            raise ValueError("failed")

    plain = dict(vars(Step))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "STEPS", {"kernel": [(Step, "outer"), (Step, "failing")], "sources": [(Step, "inner")]})
    with timing.apart() as spent:
        Step().outer()
        now[0] += 100
        assert Step().inner() == "made"
        with pytest.raises(ValueError, match="failed"):
            Step().failing()
    Step().outer()
    assert spent == timing.Spent(clean=0, sources=10, kernel=18)
    assert dict(vars(Step)) == plain


@pytest.mark.parametrize("block", few(toy_models.BLOCKS, "gemma 3"))
def test_a_model_made_layer_by_layer_is_the_same_on_devices_and_streamed(block):
    config = toy_models.block(block).config
    host = HostModel.random(config, mesh.make(MeshConfig(1)))
    params = host.resident()
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), toy_models.block(block)
    )
    kernels = params.weights["layers"]["mlp"]["down"]["kernel"]
    assert np.std(kernels) == pytest.approx(config.mlp_width**-0.5, rel=0.1)
    assert len(np.unique(kernels)) > 0.9 * kernels.size  # no layer is another's copy
    assert "layers" not in host.beside.weights
    texts, layers = Texts(host.beside, np.asarray(toy_models.tokens(6))[None], np.array([[5]])), host.streamed()
    for layer in layers_of(config, layers):
        texts.through(layer)
    _, trace = forward(params, toy_models.tokens(6))
    np.testing.assert_allclose(texts.stream[0], trace.resid_post[-1], atol=1e-5)
    copied = HostModel.copy(toy_models.block(block)).resident()
    jax.tree.map(np.testing.assert_array_equal, copied, toy_models.block(block))


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
    once = [intervention_flops(toy_models.config(), component, 6) for component in all_components(4)[::3]]
    assert measured.kernel_flops / measured.interventions == pytest.approx(np.mean(once))
    assert len(table([measured]).splitlines()) == 4
    assert "bound by" in str(measured.roofline)


@pytest.mark.slow
def test_a_whole_sweep_is_measured_by_the_code_that_sweeps():
    swept = sweep.measure(toy_models.params(), prompts=6, length=5, ablation=AblationConfig(replacements=3), rows=9)
    assert (swept.prompts, swept.at_once, swept.interventions) == (6, 3, 6 * 3 * 8)
    once = sum(intervention_flops(toy_models.config(), component, 5) for component in all_components(4))
    assert swept.flops * swept.kernel_seconds == pytest.approx(6 * 3 * once)
    assert "of bare products" in str(swept)


@pytest.mark.slow
def test_a_sweep_with_streamed_layers_says_what_that_costs():
    ablation, params = AblationConfig(replacements=3), toy_models.params()
    host = HostModel.copy(params)
    asked = dict(prompts=6, length=5, ablation=ablation, rows=9)
    streamed = sweep.measure(host.beside, layers=host.streamed(), limit=1.0, **asked)
    resident = sweep.measure(params, **asked)
    assert streamed.at_once == 6  # as there is room for the rows of all, layers are read once
    assert streamed.read_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params.weights["layers"]))
    assert 0 < streamed.waited_seconds < streamed.seconds
    assert (resident.waited_seconds, resident.read_bytes) == (0, 0)
    assert "layers streamed" in str(streamed)
    assert "layers streamed" not in str(resident)
    resident, streamed = (dataclasses.replace(streamed, seconds=seconds, waited_seconds=0.5) for seconds in (4.0, 5.0))
    line = sweep.cost_of_streaming(resident, streamed)
    assert "ablations 5.00 s, resident 4.00 (+25.0%)" in line
    assert line.endswith("10.0% waited for layers")


def test_everything_that_passes_between_devices_is_counted():
    on = mesh.make(MeshConfig(2, 2))
    rows = mesh.put(on, np.ones((4, 3), np.float32), mesh.Spec(mesh.DATA))
    total = jax.jit(lambda rows: rows.sum(axis=0), out_shardings=jax.sharding.NamedSharding(on, mesh.Spec()))
    for _ in range(2):  # also of what was compiled before
        (found,) = device_scaling.compiled_collectives(on, lambda: total(rows))
        assert (found.kind, found.bytes, found.over(on)) == ("all-reduce", 12, {mesh.DATA})


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
    both = finish(
        commands.start("launch.benchmark", *asked, "--sweep=4", "--stream=1", f"--output={tmp_path}/both.json")
    )
    assert both.returncode == 0, both.err
    assert set(json.loads((tmp_path / "both.json").read_text())["figures"]) == {"streamed", "resident"}
    assert "waited for layers" in both.out
    for wrong, words in (
        (["--stream=8"], "--stream: is of a sweep"),
        (
            [*asked, "--sweep=4", "--stream=0.001", "--shape=gpt2", "--config.layers=3"],
            "memory: the model's parameters",
        ),
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
