"""Every family against `transformers`: the pass itself, and ablations by forward hooks."""

import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from hydra_jax.core.edits import all_components
from hydra_jax.core.effects import effects
from hydra_jax.core.prefill import prefill
from hydra_jax.core.replay import replay
from hydra_jax.engine import mesh as meshes
from hydra_jax.models.transformer import embed, forward
from hydra_jax.weights import source
from hydra_jax.weights.load import load

pytest.importorskip("torch", reason="tests/parity/requirements.txt is not installed")
pytest.importorskip("transformers", reason="tests/parity/requirements.txt is not installed")

import torch

from tests.helpers import families, gguf_files

IDS = list(range(5, 60, 4))
TOLERANCE = 2e-5
jit_forward, jit_prefill, jit_replay = jax.jit(forward), jax.jit(prefill), jax.jit(replay)


@pytest.fixture(scope="module", autouse=True)
def unchecked():
    """Loading without the checks of what was loaded: here they only cost time."""
    with pytest.MonkeyPatch.context() as patch:
        for check in ("Check", "check_streamed"):
            patch.setattr(f"hydra_jax.weights.source.{check}", mock.MagicMock())
        yield


@pytest.fixture(scope="module", params=families.CONFIGS)
def both(request, tmp_path_factory):
    """A family's model of ours, and that of `transformers`."""
    model = families.made(request.param)
    path = families.saved(model, tmp_path_factory.mktemp("saved"))
    return load(str(path)).params, model


def test_logits_and_every_hidden_state_equal_transformers(both):
    params, model = both
    tokens = jnp.asarray(IDS, jnp.int32)
    logits, trace = jit_forward(params, tokens)
    expected = families.run(model, IDS)
    assert np.abs(expected["logits"]).max() > 0.5
    np.testing.assert_allclose(embed(params, tokens), expected["embedded"], atol=TOLERANCE)
    np.testing.assert_allclose(trace.resid_post, expected["resid_post"], atol=TOLERANCE)
    np.testing.assert_allclose(trace.attn_out, expected["writes"][:, 0], atol=TOLERANCE)
    np.testing.assert_allclose(trace.mlp_out, expected["writes"][:, 1], atol=TOLERANCE)
    np.testing.assert_allclose(logits, expected["logits"], atol=TOLERANCE)


@pytest.mark.parametrize("component", all_components(families.LAYERS), ids=str)
def test_ablations_equal_forward_hooks(both, component):
    params, model = both
    clean = jit_prefill(params, jnp.asarray(IDS + [0] * 2, jnp.int32), len(IDS))
    value = jax.random.normal(jax.random.key(0), (families.WIDTH,))
    delta = value - clean.writes[component.layer, component.site]
    found = effects(params, clean, jit_replay(params, clean, component.arrays()[:2], delta))
    before, after = (families.run(model, IDS, edit) for edit in (None, (component.layer, component.site, value)))
    target = before["uncapped"].argmax()
    assert clean.target == target
    total = [run["uncapped"][target] - run["uncapped"].mean() for run in (before, after)]
    np.testing.assert_allclose(found.total_effect, total[0] - total[1], atol=TOLERANCE)
    change = after["writes"][:, :, -1] - before["writes"][:, :, -1]
    moved = np.stack([[families.contribution(model, w, before["final"], target) for w in pair] for pair in change])
    np.testing.assert_allclose(found.direct_effect, -moved[component.layer, component.site], atol=TOLERANCE)
    moved[component.layer, component.site] = 0
    np.testing.assert_allclose(found.compensation, moved, atol=TOLERANCE)
    assert abs(found.total_effect) > 1e-3


@pytest.mark.parametrize("name", gguf_files.NAMES)
def test_a_gguf_file_gives_the_logits_of_transformers(name, tmp_path):
    model = families.made(name, **gguf_files.CHANGES.get(name, {}))
    loaded = load(str(gguf_files.written(model, tmp_path / "tiny.gguf")))
    logits, trace = jit_forward(loaded.params, jnp.asarray(IDS, jnp.int32))
    expected = families.run(model, IDS)
    np.testing.assert_allclose(trace.resid_post, expected["resid_post"], atol=TOLERANCE)
    np.testing.assert_allclose(logits, expected["logits"], atol=TOLERANCE)


def assert_streamed_alike(path, dtype):
    """A model's layers are the same one by one as together."""
    whole, opened = load(str(path), dtype), source.open(str(path))
    limit = meshes.bytes_a_device(whole.config, 1)
    streamed = opened.load(dtype, limit=limit, say=lambda line: None)
    assert streamed.streamed
    for one, other in zip(whole.layers, streamed.layers, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    rest = {name: leaf for name, leaf in whole.params.weights.items() if name != "layers"}
    jax.tree.map(np.testing.assert_array_equal, rest, streamed.params.weights)


@pytest.mark.parametrize(("stored", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("name", families.CONFIGS)
def test_layers_of_every_family_are_streamed_alike(name, stored, dtype, tmp_path):
    model = families.made(name)
    assert_streamed_alike(families.saved(model.to(getattr(torch, stored)), tmp_path), dtype)


@pytest.mark.parametrize("name", gguf_files.NAMES)
def test_layers_of_every_familys_gguf_file_are_streamed_alike(name, tmp_path):
    model = families.made(name, **gguf_files.CHANGES.get(name, {}))
    assert_streamed_alike(gguf_files.written(model, tmp_path / "tiny.gguf"), "float32")


def renamed(directory, old, new):
    """`directory`, its tensors published under another prefix."""
    path = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({name.replace(old, new, 1): array for name, array in tensors.items()}, path)
    return directory


@pytest.mark.parametrize(
    ("name", "old", "new"), [("gpt2", "transformer.", ""), ("opt", "model.decoder.", "decoder.")], ids=str
)
def test_the_names_of_other_times_are_known(name, old, new, tmp_path):
    model = families.made(name)
    before = load(str(families.saved(model, tmp_path))).params.weights
    after = load(str(renamed(tmp_path, old, new))).params.weights
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize(("old", "new"), [("model.", "language_model.model."), ("model.", "model.language_model.")])
def test_the_text_of_a_multimodal_gemma_is_read(tmp_path, old, new):
    model = families.made("gemma3")
    before = load(str(families.saved(model, tmp_path))).params
    renamed(tmp_path, old, new)
    stated = tmp_path / "config.json"
    text = json.loads(stated.read_text())
    stated.write_text(json.dumps(dict(model_type="gemma3", text_config=text, vision_config={}, mm_tokens_per_image=4)))
    after = load(str(tmp_path)).params
    assert before.config == after.config
    jax.tree.map(np.testing.assert_array_equal, before.weights, after.weights)
