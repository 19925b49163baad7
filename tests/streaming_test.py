"""Layers that are read as they are needed: the same as those that are there, and whatever can happen to their files."""

import math
import os
import shutil
import tracemalloc

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from hydra_jax import api
from hydra_jax.benchmarks import loading
from hydra_jax.config import MeshConfig
from hydra_jax.engine import memory, mesh
from hydra_jax.engine.layers import Resident, Streamed
from hydra_jax.errors import UserError
from hydra_jax.models.transformer import flat
from hydra_jax.weights import assemble, source
from hydra_jax.weights.gguf_file import GgufFile
from hydra_jax.weights.load import load
from hydra_jax.weights.shards import Shards
from tests.helpers import checkpoints
from tests.helpers import models as toy_models
from tests.helpers.speed import few

LAYERS = 6
TEXTS = ["the 1 of the", "in the", "of 7 in the of", "the the"]
NORM = "model.layers.4.input_layernorm.weight"


def stored():
    return checkpoints.weights(layers=LAYERS)


def halves():
    return {name: array.astype(jnp.bfloat16) for name, array in stored().items()}


def quantised():
    """One matrix in halves; kinds of fewer bits have blocks of 32, longer than this model's rows."""
    tensors, name = stored(), "model.layers.3.mlp.down_proj.weight"
    whole = gguf.quants.quantize(tensors[name].astype(np.float32), gguf.GGMLQuantizationType.F16)
    return tensors, {name: (whole, gguf.GGMLQuantizationType.F16)}


def fused():
    """Phi-3's tensors: queries, keys and values in one, and the gate with what it gates."""
    tensors = stored()
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, parts in (
            ("self_attn.qkv_proj", [f"self_attn.{part}_proj" for part in "qkv"]),
            ("mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"]),
        ):
            rows = [tensors.pop(f"{prefix}.{part}.weight") for part in parts]
            tensors[f"{prefix}.{name}.weight"] = np.concatenate(rows)
    return tensors


def written(path, kind):
    """A model of more layers than are streamed at a time."""
    if kind == "gguf":
        return checkpoints.gguf_file(path / "tiny.gguf", stored())
    if kind == "gguf, halves":
        tensors, kept = quantised()
        return checkpoints.gguf_file(path / "tiny.gguf", tensors, stored=kept)
    if kind == "directory, fused":
        stated = dict(model_type="phi3", num_hidden_layers=LAYERS)
        return checkpoints.hugging_face_directory(path / "tiny", fused(), **stated)
    tensors = halves() if "bfloat16" in kind else stored()
    shards = 3 if "shards" in kind else 1
    return checkpoints.hugging_face_directory(path / "tiny", tensors, shards, num_hidden_layers=LAYERS)


KINDS = ["gguf", "gguf, halves", "directory", "directory, shards", "directory, bfloat16", "directory, fused"]


def limit(path, dtype="float32"):
    """Bytes that the weights do not fit into, but two layers do."""
    config = source.open(str(path)).config(dtype)
    return memory.layer_bytes(config, 1) * 4.5 + mesh.bytes_a_device(config, 1, 0)


def streamed(path, dtype="float32"):
    said = []
    model = source.open(str(path)).load(dtype, limit=limit(path, dtype), say=said.append)
    assert isinstance(model.streamed, Streamed)
    return model, said


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_streamed_are_those_that_are_read_at_once(kind, dtype, tmp_path):
    path = written(tmp_path, kind)
    whole, (model, said) = load(str(path), dtype), streamed(path, dtype)
    assert isinstance(whole.layers, Resident)
    assert len(said) == 1
    assert said[0].startswith("weights ")
    assert said[0].endswith("streaming layers, 2 at a time")
    for _ in range(2):  # the second time without looking at the values
        for one, other in zip(whole.layers, model.layers, strict=True):
            assert_equal(one, other)
    rest = {name: leaf for name, leaf in whole.params.weights.items() if name != "layers"}
    assert_equal(rest, model.params.weights)
    assert model.weights_hash == whole.weights_hash


@pytest.mark.parametrize("kind", few(KINDS, "directory, shards"))
def test_what_is_swept_is_the_same_to_the_bit(kind, tmp_path):
    path = written(tmp_path, kind)
    found = [api.sweep(model, TEXTS, replacements=3) for model in (load(str(path)), streamed(path)[0])]
    assert found[0].identical(found[1])
    assert np.abs(found[0]["total_effect"]).max() > 1e-2


def test_two_layers_are_there_at_a_time(tmp_path):
    path = written(tmp_path, "directory")
    model, _ = streamed(path)
    layer, others = memory.layer_bytes(model.config, 1), sum(array.nbytes for array in jax.live_arrays())
    held = []
    for weights in model.layers:
        jax.block_until_ready(weights)
        held.append(sum(array.nbytes for array in jax.live_arrays()) - others)
    assert max(held) <= 3 * layer  # the third as it takes the first one's place
    assert min(held) >= layer


@pytest.mark.parametrize("shape", [(0, 1), (2, 2)])
def test_layers_are_laid_on_every_mesh_as_the_stack_is(shape):
    params = toy_models.block("llama 3")
    on = mesh.make(MeshConfig(*shape))
    laid = mesh.lay(on, params)
    host = [{name: np.asarray(leaf) for name, leaf in flat(layer).items()} for layer in Resident(params)]
    for one, other in zip(Resident(laid), Streamed(params.config, on, host.__getitem__), strict=True):
        assert_equal(one, other)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def shard_with(path, tensor):
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return next(f for f in files if f.suffix == ".gguf" or tensor in safetensors.numpy.load_file(f))


def vanish(file):
    file.unlink()


def replaced(file):
    shutil.copy(file, file.with_suffix(".new"))
    os.replace(file.with_suffix(".new"), file)


def cut(file):
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def touched(file):
    with file.open("r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(b"\0\0\0\0")


@pytest.mark.parametrize("kind", ["gguf", "directory, shards"])
@pytest.mark.parametrize("disturb", [vanish, replaced, cut, touched])
def test_a_file_that_changes_while_it_is_read_ends_the_walk(disturb, kind, tmp_path):
    path = written(tmp_path, kind)
    model, _ = streamed(path)
    file = shard_with(path, NORM)
    walk = iter(model.layers)
    next(walk)
    disturb(file)
    with pytest.raises(
        UserError, match=rf"^\S*{file.name}: (is gone|has changed) while its weights are being read; put"
    ):
        list(walk)
    with pytest.raises(UserError):
        api.sweep(model, TEXTS, replacements=2)


def test_a_file_that_is_cut_while_a_tensor_is_read_does_not_end_the_process(tmp_path):
    """A mapped one would."""
    path = written(tmp_path, "gguf")
    tensors = GgufFile(path)._tensors
    cut(path)
    with pytest.raises(ValueError, match="bytes early"):
        [tensor.decoded() for tensor in tensors.values()]
    file = written(tmp_path, "directory") / "model.safetensors"
    shards = Shards([file])
    cut(file)
    with pytest.raises(UserError, match=r"^\S*model.safetensors: truncated or damaged \(it ends .* bytes early\)"):
        [shards.read(name) for name in shards.names]


@pytest.mark.parametrize("how", ["whole", "streamed"])
@pytest.mark.parametrize("kind", ["gguf", "directory, shards"])
def test_a_file_that_changes_while_a_model_is_loaded_is_found(how, kind, tmp_path, monkeypatch):
    path = written(tmp_path, kind)
    opened, file = source.open(str(path)), shard_with(path, NORM)
    most = limit(path) if how == "streamed" else math.inf
    read = assemble.Parameters.read

    def disturbed(self, name, *arguments):
        touched(file)
        return read(self, name, *arguments)

    monkeypatch.setattr(assemble.Parameters, "read", disturbed)
    with pytest.raises(UserError, match=rf"^\S*{file.name}: has changed while its weights are being read; put"):
        opened.load(limit=most, say=lambda line: None)


def test_this_hosts_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    peaks = []
    for layers in (3, 12):
        config = toy_models.config(width=256, mlp_width=1024, layers=layers, vocab_size=64, dtype="bfloat16")
        path = tmp_path / str(layers)
        path.mkdir()
        loading.write_checkpoint(path, config)
        stored = source.open(str(path))._stored
        tracemalloc.start()  # which sees NumPy's memory, not JAX's
        _, streamed = stored.streamed(config, mesh.make(MeshConfig(1)))
        for _ in streamed:
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    layer = memory.layer_bytes(config, 1)
    assert layer < peaks[0]
    assert peaks[1] < peaks[0] + layer / 2


@pytest.mark.parametrize("kind", ["gguf", "directory"])
def test_a_value_that_is_no_number_is_found_before_anything_is_computed(kind, tmp_path):
    tensors = stored()
    tensors[NORM][3] = np.nan
    path = tmp_path / "tiny.gguf" if kind == "gguf" else tmp_path / "tiny"
    if kind == "gguf":
        checkpoints.gguf_file(path, tensors)
    else:
        checkpoints.hugging_face_directory(path, tensors, num_hidden_layers=LAYERS)
    with pytest.raises(UserError, match="holds NaN or infinity; fetch it again"):
        source.open(str(path)).load(limit=limit(path), say=lambda line: None)


def test_a_limit_that_two_layers_do_not_fit_into_is_refused(tmp_path):
    path = written(tmp_path, "directory")
    config = source.open(str(path)).config()
    least = mesh.bytes_a_device(config, 1, 2)
    with pytest.raises(UserError) as refused:
        source.open(str(path)).load(limit=least - 1)
    assert "2 layers at a time" in str(refused.value)
    assert "raise --config.memory, or set --config.mesh.model to 2 or more, or dtype=bfloat16" in str(refused.value)
    assert source.open(str(path)).load(limit=least, say=lambda line: None).streamed


def test_the_limit_holds_for_what_is_done_with_the_model(tmp_path, capsys):
    path = written(tmp_path, "directory")
    model = load(str(path), memory=limit(path) / 1e9)
    assert model.streamed
    assert "streaming layers, 2 at a time" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"^memory: a prompt of .* are free"
    ):  # beside the weights there is nothing left
        api.sweep(model, TEXTS, replacements=2)


def test_weights_that_fit_are_not_streamed(tmp_path):
    path = written(tmp_path, "directory")
    whole = mesh.bytes_a_device(source.open(str(path)).config(), 1)
    assert source.open(str(path)).load(limit=whole / memory.SHARE + 1).streamed is None
