"""Sweeps over meshes: of the four devices here, and as commands on eight or by two processes."""

import itertools

import jax
import numpy as np
import pytest

from hydra_jax.benchmarks import loading
from hydra_jax.benchmarks.devices import collectives
from hydra_jax.config import MeshConfig
from hydra_jax.core.edits import ATTN, MLP, SITES, all_components
from hydra_jax.core.programs import Word, program
from hydra_jax.engine import blocks, mesh, walk
from hydra_jax.engine.layers import Resident
from hydra_jax.engine.mesh import DATA, MODEL
from hydra_jax.engine.summary import summarise
from hydra_jax.errors import UserError
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import flat
from hydra_jax.store import effects as store
from hydra_jax.store import variables
from tests.helpers import models as toy_models
from tests.helpers import sweeps, walks
from tests.helpers.commands import finish
from tests.helpers.speed import few

PROMPTS = 22
TOKENS = np.stack([np.asarray(toy_models.tokens(6, seed)) for seed in range(8)])
PLACES = np.full((8, 1), 5)
SHAPES = {"data 4": (0, 1), "data 2, model 2": (2, 2), "model 4": (1, 4)}


def laid(block, data, model):
    made = mesh.make(MeshConfig(data, model))
    return mesh.lay(made, toy_models.block(block))


def swept(params):
    """A walk with every ablation and its direct edges."""
    rests = itertools.product(all_components(params.config.layers), (Word.FOLLOW, Word.PROBE))
    programs = [program(params.config, clamp=[component], rest=rest) for component, rest in rests]
    return walks.walk(params, TOKENS, PLACES, programs)


def ablated(params):
    summarised = walk.program(mesh.mesh_of(params), summarise, (), variants=("", "edges"))
    return jax.device_get(summarised(swept(params).effects, None, None))


@pytest.mark.parametrize(
    ("block", "shape"),
    few(
        [*((block, "data 2, model 2") for block in toy_models.BLOCKS), ("llama 3", "data 4"), ("pythia", "model 4")],
    ),
)
def test_every_family_is_ablated_alike_on_every_mesh(block, shape):
    expected = ablated(toy_models.block(block))
    found = ablated(laid(block, *SHAPES[shape]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)
    assert np.abs(expected.compensation).max() > 1e-2


def test_parameters_of_a_device_fall_as_the_model_is_shared():
    params = toy_models.params(width=64, heads=8, kv_heads=8, head_dim=8, mlp_width=128, vocab_size=64)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    norms = sum(leaf.nbytes for name, leaf in flat(params.weights).items() if "norm" in name)
    for model in (1, 2, 4):
        shared = mesh.lay(mesh.make(MeshConfig(0, model)), params)
        held = [sum(leaf.addressable_shards[d].data.nbytes for leaf in jax.tree.leaves(shared)) for d in range(4)]
        assert held == [(whole - norms) // model + norms] * 4
        assert held[0] == mesh.bytes_a_device(params.config, model)


@pytest.mark.parametrize("shape", few(SHAPES, "data 2, model 2"))
def test_nothing_passes_between_devices_that_take_other_prompts(shape):
    """In the compiled programs: on the model axis a sum for each of a layer's writes, on the data axis nothing."""
    params = laid("mistral", *SHAPES[shape])
    on, c = mesh.mesh_of(params), params.config
    texts = walk.Texts(params, TOKENS, PLACES)
    layer = next(walk.forward(c, Resident(params)))
    programs = {"clean": walk.clean_program(params).lower(layer, texts.stream, texts.positions)}
    clean, rows = texts.through(layer), swept(params).rows
    layout = rows.layout
    for site in (ATTN, MLP):
        switches = dict(sites=(site,), layout=layout, by_head=False)
        advance = walk.program(on, blocks.advance, (0, 5, 6, 7, 8, 9), (4,), **switches)
        flags = np.ones((layout.total, 1), bool)
        chosen = np.arange(layout.blocks, dtype=np.int32), np.int32(layout.blocks)
        reading = layout.reading().astype(np.int32)
        programs[SITES[site]] = advance.lower(
            layer, clean, texts.positions, rows.readout, rows.shift, *chosen, flags, flags, reading, None
        )
    write = "all-reduce", layout.texts_at_once * layout.rows * 4 * c.width
    of_texts = "all-reduce", texts.stream.nbytes // on.shape[DATA]
    # Of the read tokens, what heads mix is brought together as well.
    mixed = "all-gather", clean.mixed.nbytes // on.shape[DATA]
    expected = {"clean": [mixed, of_texts, of_texts], "attn": [write], "mlp": [write]}
    for name, lowered in programs.items():
        found = collectives(lowered.compile().as_text())
        assert set().union(*(one.over(on) for one in found)) == ({MODEL} if on.shape[MODEL] > 1 else set())
        if on.shape[MODEL] == 2:
            assert sorted((one.kind, one.bytes) for one in found) == expected[name]


def test_collectives_are_read_however_they_are_written():
    on = mesh.make(MeshConfig(2, 2))
    lines = """
      %a = f32[4,3]{1,0} all-reduce(%x), channel_id=1, replica_groups=[2,2]<=[4], use_global_device_ids=true
      %b = (bf16[8]{0}, f32[]) all-gather-start(%x), replica_groups={{0,2},{1,3}}, dimensions={0}
      %c = f32[2]{0} all-to-all(%x), replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
      %d = f32[2]{0} all-gather(%x), replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, dimensions={2}
      %g = f32[2]{0} all-gather(%x), replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, dimensions={2}
      %e = f32[2]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
      %f = f32[2]{0} add(%x, %all-reduce)
    """
    found = collectives(lines)
    assert [one.bytes for one in found] == [48, 20, 8, 8, 8, 8]
    assert [one.over(on) for one in found] == [{MODEL}, {DATA}, {DATA}, {MODEL}, {DATA}, {MODEL}]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dict(data=3, model=2), "data 3 and model 2 do not go with 4 devices"),
        (dict(model=8), "do not go with 4 devices"),
        (dict(model=3), "each process has 4 devices"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(config, words):
    with pytest.raises(UserError, match=words):
        mesh.make(MeshConfig(**config))
    with pytest.raises(UserError, match="give 1 or more"):
        MeshConfig(model=0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return sweeps.inputs(tmp_path_factory.mktemp("inputs"), PROMPTS)


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """The sweep by one device."""
    workdir = tmp_path_factory.mktemp("alone")
    sweeps.done(inputs, workdir)
    return store.open_effects(workdir).load()


def assert_same(workdir, expected):
    found = store.open_effects(workdir)
    assert found.attrs["protocol"] == expected.attrs["protocol"]
    assert found["finished"].values.all()
    for name in (*found.coords, "source"):
        np.testing.assert_array_equal(found[name], expected[name])
    for name in variables.VARIABLES.keys() & set(expected.data_vars):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("mesh.data=8", "rows=3"),
        ("mesh.data=4", "mesh.model=2", "rows=6"),
        ("mesh.model=8", "rows=15"),
    ],
)
def test_eight_devices_make_the_store_of_one(inputs, alone, tmp_path, settings):
    sweeps.done(inputs, tmp_path, *(f"--config.{setting}" for setting in settings), devices=8)
    assert_same(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize("model", [1, 8])
def test_two_processes_of_four_devices_make_it_too(inputs, alone, tmp_path, model):
    """Each by itself on its own chunks; or both together, where one cannot hold the model."""
    workdir = tmp_path / "run"
    sweeps.done(inputs, workdir, f"--config.mesh.model={model}", processes=2, devices=4, said=tmp_path)
    first, second = ((tmp_path / f"said-{process}").read_text() for process in range(2))
    assert "results in" in first
    assert not second
    assert_same(workdir, alone)


FEW_TOKENS = ["--prefill-tokens=64"]
"""At once, so that a tiny model's parameters are more than what is computed."""


@pytest.mark.slow
def test_a_model_that_one_device_cannot_hold_runs_on_eight(inputs, tmp_path):
    """Of 6.3 MB of parameters, where each device may use 4 MB."""
    config = ModelConfig(2000, 128, 4, 8, 8, 16, 512, 64)
    (tmp_path / "model").mkdir()
    loading.write_checkpoint(tmp_path / "model", config)
    asked = [f"--config.model={tmp_path}/model", "--config.memory=0.004", "--config.rows=3"]
    (one,) = map(finish, sweeps.start(inputs, tmp_path / "run", *asked, devices=8, disturbed=FEW_TOKENS))
    assert one.returncode == 1
    assert "memory: the model's parameters take 0.00625 GB a device, and 2 layers at a time 0.0041" in one.err
    assert one.err.endswith("set --config.mesh.model to 2 or more, or dtype=bfloat16\n")
    assert not (tmp_path / "run").exists()
    sweeps.done(inputs, tmp_path / "run", *asked, "--config.mesh.model=8", devices=8, disturbed=FEW_TOKENS)
    assert store.open_effects(tmp_path / "run")["finished"].values.all()
