"""Weights as they are stored: every quantisation, type and division into files."""

import json
import shutil
from unittest import mock

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax

import hydra_jax
from hydra_jax.weights import source
from hydra_jax.weights.load import load
from tests.helpers import checkpoints

NAME = "model.layers.1.mlp.down_proj.weight"
WIDE = 256
"""Weights of a row, as many as the largest block has."""


def is_done(function, *arguments):
    try:
        function(*arguments)
    except NotImplementedError:
        return False
    return True


def raw(kind, rows):
    """Random bytes of `rows` rows, in which no block's scale is NaN or infinite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (rows * WIDE // block, size), np.uint8)
    with np.errstate(all="ignore"):
        while (bad := ~(np.abs(gguf.dequantize(blocks, kind)) < 1e30).all(axis=-1)).any():
            blocks[bad] = random.integers(0, 256, (bad.sum(), size), np.uint8)
    return blocks.reshape(rows, -1)


FLOATS = {kind for kind in gguf.GGMLQuantizationType if kind.name in ("F16", "F32", "BF16")}
DECODED = [kind for kind in gguf.GGMLQuantizationType if kind in FLOATS or is_done(lambda k: raw(k, 1), kind)]
ENCODED = [kind for kind in DECODED if is_done(gguf.quantize, np.zeros((1, WIDE), np.float32), kind)]


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """What `NAME` is as a loaded parameter [in, out] where a GGUF file stores it so, the other weights in float32."""
    monkeypatch.setattr(checkpoints, "MLP_WIDTH", WIDE)
    monkeypatch.setattr(source, "Check", mock.MagicMock())  # random bytes make no working model

    def load_stored(data, kind):
        path = checkpoints.gguf_file(tmp_path / "tiny.gguf", stored={NAME: (data, kind)})
        return np.asarray(load(str(path)).params.weights["layers"]["mlp"]["down"]["kernel"][1])

    return load_stored


def test_the_known_quantisations_are_among_those_tested():
    names = {kind.name for kind in DECODED}
    assert names >= {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "BF16"}
    assert {kind.name for kind in ENCODED} >= {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"}


@pytest.mark.parametrize("kind", [kind for kind in DECODED if kind not in FLOATS], ids=lambda kind: kind.name)
def test_every_quantisation_is_read_as_its_decoder_says(loaded, kind):
    data = raw(kind, checkpoints.WIDTH)
    values = gguf.dequantize(data, kind)
    assert values.shape == (checkpoints.WIDTH, WIDE)
    assert len(np.unique(values)) > 2
    np.testing.assert_array_equal(loaded(data, kind), values.T)


ERRORS = {"F32": 0, "F16": 0.001, "BF16": 0.01, "Q8_0": 0.02, "Q5_0": 0.15, "Q5_1": 0.15, "Q4_0": 0.3, "Q4_1": 0.3}
"""How far a weight of unit variance may be off: about half a step of a block whose largest weight is 4."""


@pytest.mark.parametrize("kind", [kind for kind in ENCODED if kind.name in ERRORS], ids=lambda kind: kind.name)
def test_quantised_weights_are_the_unquantised_ones_rounded(loaded, kind):
    exact = np.random.default_rng(0).normal(size=(checkpoints.WIDTH, WIDE)).astype(np.float32)
    difference = np.abs(loaded(gguf.quantize(exact, kind), kind) - exact.T).max()
    assert difference <= ERRORS[kind.name]
    assert (difference > 0) == (kind.name != "F32")


@pytest.mark.parametrize("tied", [False, True])
def test_a_sharded_directory_is_the_same_model_tied_or_not(tmp_path, tied):
    tensors = checkpoints.weights(tied)
    whole = load(str(checkpoints.hugging_face_directory(tmp_path / "whole", tensors)))
    sharded = checkpoints.hugging_face_directory(tmp_path / "sharded", tensors, shards=3)
    found = load(str(sharded))
    assert found.config == whole.config
    assert found.config.tied == tied
    jax.tree.map(np.testing.assert_array_equal, found.params.weights, whole.params.weights)


def test_a_tied_model_may_be_published_with_its_unembedding(tmp_path):
    tied = load(str(checkpoints.hugging_face_directory(tmp_path / "tied", checkpoints.weights(tied=True))))
    tensors = checkpoints.weights(tied=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    found = load(
        str(checkpoints.hugging_face_directory(tmp_path / "both", tensors, shards=2, tie_word_embeddings=True))
    )
    assert "unembedding" not in found.params.weights
    jax.tree.map(np.testing.assert_array_equal, found.params.weights, tied.params.weights)


def test_a_second_copy_beside_the_usual_name_is_not_read(tmp_path):
    path = checkpoints.hugging_face_directory(tmp_path / "tiny")
    alone = load(str(path)).params.weights
    shutil.copy(path / "model.safetensors", path / "consolidated.safetensors")
    (path / "adapter.safetensors").write_bytes(b"nothing")
    jax.tree.map(np.testing.assert_array_equal, load(str(path)).params.weights, alone)


@pytest.mark.parametrize("kept", [jnp.float32, jnp.float16, jnp.bfloat16], ids=lambda kept: kept.__name__)
def test_weights_of_every_stored_type_are_read(tmp_path, kept):
    path = checkpoints.hugging_face_directory(tmp_path / "tiny")
    tensors = {name: jnp.asarray(array, kept) for name, array in checkpoints.weights().items()}
    safetensors.flax.save_file(tensors, path / "model.safetensors")
    kernels = load(str(path)).params.weights["layers"]["mlp"]["down"]["kernel"]
    assert kernels.dtype == jnp.float32
    np.testing.assert_array_equal(kernels[1], tensors[NAME].astype(jnp.float32).T)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (dict(torch_dtype="bfloat16"), "bfloat16"),
        (dict(dtype="bfloat16"), "bfloat16"),
        (dict(torch_dtype="float16"), "float32"),
        (dict(torch_dtype="float32"), "float32"),
        ({}, "float32"),
    ],
    ids=str,
)
def test_the_stored_type_is_honoured_where_it_is_asked_for(tmp_path, stated, expected):
    path = checkpoints.hugging_face_directory(tmp_path / "tiny", **stated)
    assert hydra_jax.load(str(path), dtype="auto").config.dtype == expected
    assert source.open(str(path)).config(dtype="auto").dtype == expected
    assert hydra_jax.load(str(path)).config.dtype == "float32"


def test_a_multimodal_model_states_its_type_outside_of_its_text(tmp_path):
    path = checkpoints.hugging_face_directory(tmp_path / "tiny")
    text = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    stated = dict(model_type="gemma3", torch_dtype="bfloat16", text_config=text)
    (path / "config.json").write_text(json.dumps(stated))
    assert source.open(str(path)).config(dtype="auto").dtype == "bfloat16"


@pytest.mark.parametrize("kind", ["BF16", "F16", "F32"])
def test_the_stored_type_of_a_gguf_file_is_honoured(tmp_path, kind):
    name, kind = "model.embed_tokens.weight", gguf.GGMLQuantizationType[kind]
    data = gguf.quantize(checkpoints.weights()[name], kind)
    path = checkpoints.gguf_file(tmp_path / "tiny.gguf", stored={name: (data, kind)})
    assert load(str(path), dtype="auto").config.dtype == ("bfloat16" if kind.name == "BF16" else "float32")
