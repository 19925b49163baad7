import contextlib
import json
import re
import shutil
import signal
from unittest import mock

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from hydra_jax.errors import UserError
from hydra_jax.store.files import sha256
from hydra_jax.text.tokenizer import encode
from hydra_jax.weights import directory as directories
from hydra_jax.weights.load import load
from tests.helpers import checkpoints


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    directory = tmp_path_factory.mktemp("published")
    return checkpoints.gguf_file(directory / "tiny.gguf"), checkpoints.hugging_face_directory(directory / "tiny")


@pytest.fixture
def gguf_path(published, tmp_path):
    return shutil.copy(published[0], tmp_path / "spoiled.gguf")


@pytest.fixture
def directory(published, tmp_path):
    return shutil.copytree(published[1], tmp_path / "spoiled")


@contextlib.contextmanager
def within(seconds):
    def fail(*_):
        pytest.fail("reading hangs")

    old = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def weights_hash(path):
    return directories.digest(path) if path.is_dir() else sha256(path)


def complaint(path):
    try:
        with within(30):
            load(str(path))
    except UserError as error:
        return str(error)
    return ""


def refusal(path):
    message = complaint(path)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_and_hugging_face_give_the_same_model(tmp_path, tied):
    tensors = checkpoints.weights(tied)
    one = load(str(checkpoints.gguf_file(tmp_path / "tiny.gguf", tensors)))
    other = load(str(checkpoints.hugging_face_directory(tmp_path / "tiny", tensors)))
    assert one.config == other.config
    assert one.config.tied == tied
    jax.tree.map(np.testing.assert_array_equal, one.params.weights, other.params.weights)


def test_weights_are_the_published_ones_transposed_and_stacked(published):
    tensors, weights = checkpoints.weights(), load(str(published[0])).params.weights
    np.testing.assert_array_equal(weights["embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(weights["unembedding"], tensors["lm_head.weight"].T)
    for layer in range(checkpoints.LAYERS):
        layers = jax.tree.map(lambda array, layer=layer: array[layer], weights["layers"])
        prefix = f"model.layers.{layer}"
        np.testing.assert_array_equal(layers["attn"]["query"]["kernel"], tensors[f"{prefix}.self_attn.q_proj.weight"].T)
        np.testing.assert_array_equal(layers["attn"]["key"]["kernel"], tensors[f"{prefix}.self_attn.k_proj.weight"].T)
        np.testing.assert_array_equal(layers["mlp"]["down"]["kernel"], tensors[f"{prefix}.mlp.down_proj.weight"].T)
        np.testing.assert_array_equal(layers["attn_norm"]["scale"], tensors[f"{prefix}.input_layernorm.weight"])


def test_bfloat16_weights_are_the_float32_ones_rounded(published):
    for path in published:
        single, half = load(str(path)), load(str(path), dtype="bfloat16")
        kernels = [model.params.weights["layers"]["mlp"]["up"]["kernel"] for model in (single, half)]
        assert kernels[1].dtype == jnp.bfloat16
        np.testing.assert_array_equal(kernels[0].astype(jnp.bfloat16), kernels[1])


@pytest.fixture
def sharded(tmp_path):
    return checkpoints.hugging_face_directory(tmp_path / "sharded", shards=2)


def test_a_sharded_directory_is_the_same_model(published, sharded):
    assert len(list(sharded.glob("*.safetensors"))) == 2
    shutil.copy(published[1] / "model.safetensors", sharded / "consolidated.safetensors")  # not in the index
    weights = [load(str(path)).params.weights for path in (published[1], sharded)]
    jax.tree.map(np.testing.assert_array_equal, *weights)


def test_a_shard_that_the_index_names_and_is_not_there_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    message = refusal(sharded)
    assert str(sharded) in message
    assert "no model-00002-of-00002.safetensors, which model.safetensors.index.json names" in message


@pytest.mark.parametrize(
    "index", ["[]", "{", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x"}}']
)
def test_a_damaged_index_is_refused(sharded, index):
    (sharded / "model.safetensors.index.json").write_text(index)
    assert str(sharded) in refusal(sharded)


@pytest.mark.parametrize(("key", "name"), [("attention_bias", "k_proj.bias"), ("mlp_bias", "down_proj.bias")])
def test_biases_that_the_config_promises_and_are_not_there_are_named(directory, key, name):
    (directory / "config.json").write_text(json.dumps(checkpoints.settings() | {key: True}))
    message = refusal(directory)
    assert str(directory) in message
    assert f"{name} is missing" in message


def test_integers_are_not_weights(tmp_path):
    tensors = changed("model.layers.0.mlp.up_proj.weight", lambda array: (100 * array).astype(np.int8))
    message = refusal(checkpoints.hugging_face_directory(tmp_path / "quantised", tensors))
    assert "up_proj.weight holds 'I8', not floats" in message


@pytest.fixture(scope="module")
def both_tokenizers(published):
    return [load(str(path)).tokenizer for path in published]


@given(st.text(max_size=30) | st.text("the 12 in of\n", max_size=30))
def test_both_tokenizers_agree_and_lose_nothing(both_tokenizers, text):
    one, other = (encode(tokenizer, text) for tokenizer in both_tokenizers)
    assert one == other
    assert max(one, default=0) < len(checkpoints.VOCABULARY)
    assert both_tokenizers[0].decode(one, skip_special_tokens=False) == text


def test_tokens_are_merged_split_at_digits_and_special(both_tokenizers):
    expected = ["Ġthe", "Ġ", "1", "2", "Ġin", "t", "o", checkpoints.CONTROL]
    for tokenizer in both_tokenizers:
        assert tokenizer.encode(f" the 12 into{checkpoints.CONTROL}").tokens == expected


def test_a_changed_byte_changes_the_hash(published, gguf_path, directory):
    for original, copy, file in (
        (published[0], gguf_path, gguf_path),
        *((published[1], directory, directory / n) for n in ("config.json", "model.safetensors", "tokenizer.json")),
    ):
        assert weights_hash(copy) == weights_hash(original) == load(str(original)).weights_hash
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert weights_hash(copy) != weights_hash(original)
        file.write_bytes(whole)


@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=60)
def test_a_truncated_gguf_file_is_refused(published, tmp_path_factory, share):
    path = tmp_path_factory.mktemp("cut") / "cut.gguf"
    whole = published[0].read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert str(path) in refusal(path)


@given(st.dictionaries(st.integers(4, 6000), st.integers(0, 255), min_size=1, max_size=8))
@settings(max_examples=150)
def test_a_corrupted_gguf_header_is_refused_or_read(published, tmp_path_factory, changes):
    path = tmp_path_factory.mktemp("flipped") / "flipped.gguf"
    data = bytearray(published[0].read_bytes())
    for place, byte in changes.items():
        data[place] = byte
    path.write_bytes(data)
    with mock.patch("hydra_jax.weights.source.Check"):  # would compile every shape that the changes make
        message = complaint(path)
    assert not message or (str(path) in message and "\n" not in message)


@pytest.mark.parametrize("length", [10_000, 2**40, 2**63], ids=str)
@pytest.mark.parametrize("field", ["tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"])
def test_an_array_longer_than_the_file_is_refused_at_once(gguf_path, field, length):
    data = bytearray(gguf_path.read_bytes())
    place = gguf.GGUFReader(gguf_path).fields[field].offset + 8 + len(field) + 4 + 4
    data[place : place + 8] = length.to_bytes(8, "little")
    gguf_path.write_bytes(data)
    assert str(gguf_path) in refusal(gguf_path)


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"not a model", b'{"prompt": "x"}' * 1000], ids=["", "0", "text", "json"]
)
def test_what_is_not_gguf_is_refused(tmp_path, content):
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    assert str(path) in refusal(path)


def changed(name, change):
    tensors = checkpoints.weights()
    return tensors | {name: change(tensors[name])}


def without(name):
    tensors = checkpoints.weights()
    del tensors[name]
    return tensors


def spoil_one(value):
    def spoil(array):
        array = array.copy()
        array.flat[5] = value
        return array

    return spoil


WRONG_TENSORS = {
    "embedding missing": (without("model.embed_tokens.weight"), "embed.*missing|token_embd.*missing"),
    "layer's missing": (without("model.layers.1.mlp.up_proj.weight"), r"(blk|layers)\.1\..*up.*missing"),
    "longer": (changed("model.norm.weight", lambda a: np.append(a, a)), r"norm.*shape \(32,\).*\(16,\)"),
    "transposed": (changed("model.layers.0.mlp.up_proj.weight", lambda a: a.T.copy()), "up.*shape"),
    "three axes": (changed("model.layers.0.mlp.up_proj.weight", lambda a: a[..., None]), "up.*shape"),
    "surplus": (checkpoints.weights() | {"model.layers.1.mlp.more.weight": np.ones(3)}, r"\.1\.mlp\.more.* than"),
    "surplus layer": (checkpoints.weights() | {"model.layers.2.mlp.up_proj.weight": np.ones(3)}, r"\.2\..*up.* than"),
    "NaN": (changed("model.layers.1.mlp.down_proj.weight", spoil_one(np.nan)), r"\.1\..*down.*NaN"),
    "infinite": (changed("model.layers.1.self_attn.q_proj.weight", spoil_one(-np.inf)), r"\.1\..*q.*infinity"),
}


@pytest.mark.parametrize(("tensors", "reason"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
@pytest.mark.parametrize("write", [checkpoints.gguf_file, checkpoints.hugging_face_directory])
def test_a_wrong_tensor_is_named(tmp_path, write, tensors, reason):
    path = write(tmp_path / "wrong.gguf", tensors)
    message = refusal(path)
    assert str(path) in message
    assert re.search(reason, message)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(architecture="mamba"), "architecture 'mamba'"),
        (dict(pre="chameleon"), "tokenizer gpt2/chameleon"),
        (dict(llama__rope__scaling__type="yarn"), "rope.scaling.type is 'yarn'"),
        (dict(llama__expert_count="8"), "expert_count"),
        (dict(llama__attention__key_length="x"), "head_dim"),
        (dict(llama__vocab_size="x"), "vocab_size"),
    ],
    ids=str,
)
def test_gguf_metadata_of_an_unsupported_model_is_refused(tmp_path, changes, reason):
    path = checkpoints.gguf_file(tmp_path / "other.gguf", **changes)
    message = refusal(path)
    assert str(path) in message
    assert reason in message


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.5, 0.999])
def test_a_truncated_safetensors_file_is_named(directory, share):
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert str(path) in refusal(directory)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_damaged_json_is_named(directory, file, content):
    (directory / file).write_bytes(content)
    assert str(directory / file) in refusal(directory)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("model_type", "mamba", "architecture 'mamba'"),
        ("model_type", None, "architecture"),
        ("num_experts", 8, "num_experts"),
        ("quantization_config", {"bits": 4}, "quantization_config"),
        ("dtype", "int8", "dtype is 'int8'"),
        ("torch_dtype", "float8_e4m3fn", "torch_dtype is 'float8_e4m3fn'"),
        ("rope_interleaved", True, "rope_interleaved"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "original_max_position_embeddings"),
        ("rope_scaling", {"type": "linear"}, "factor"),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}, "rotary scaling of type 'dynamic'"),
        ("rope_scaling", {"type": "linear", "factor": 2.0, "beta_fast": 3}, "beta_fast"),
        ("rope_scaling", [2.0], ""),
        ("partial_rotary_factor", 1.5, "partial_rotary_factor"),
        ("partial_rotary_factor", 0.75, "rotary_dim"),
        ("hidden_act", "mish", "activation 'mish'"),
        ("hidden_size", "16", ""),
        ("num_attention_heads", 0, ""),
        ("num_key_value_heads", 3, "evenly"),
        ("head_dim", 3, "head_dim"),
        ("vocab_size", 263.0, "vocab_size"),
        ("num_hidden_layers", None, "layers"),
        ("num_hidden_layers", True, "layers"),
        ("num_hidden_layers", -1, "layers"),
        ("intermediate_size", [24], "mlp_width"),
        ("max_position_embeddings", None, "context"),
        ("max_position_embeddings", "48", "context"),
        ("rope_theta", "much", "much"),
        ("rope_theta", float("nan"), "rope_base"),
        ("rms_norm_eps", None, ""),
        ("rms_norm_eps", float("inf"), "norm_eps"),
    ],
)
def test_a_wrong_setting_of_config_json_is_named(directory, key, value, reason):
    path = directory / "config.json"
    path.write_text(json.dumps(checkpoints.settings() | {key: value}))
    message = refusal(directory)
    assert str(path) in message
    assert reason in message


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
    ],
)
def test_a_missing_setting_of_config_json_is_named(directory, key):
    path = directory / "config.json"
    config = checkpoints.settings()
    del config[key]
    path.write_text(json.dumps(config))
    message = refusal(directory)
    assert str(path) in message
    assert f"{key}' is missing" in message


def test_settings_that_change_nothing_are_read_over(directory):
    path = directory / "config.json"
    harmless = dict(
        rope_scaling=None, quantization_config=None, attention_dropout=0.1, use_cache=False, dtype="float16"
    )
    path.write_text(json.dumps(checkpoints.settings() | harmless))
    assert load(str(directory)).config == load(str(checkpoints.hugging_face_directory(directory / "plain"))).config


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_missing_file_of_a_directory_is_named(directory, file):
    (directory / file).unlink()
    message = refusal(directory)
    assert str(directory) in message
    assert f"no {file}" in message


def test_pickled_weights_are_never_read(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    message = refusal(directory)
    assert str(directory) in message
    assert "pytorch_model.bin is pickled" in message
    assert "save_pretrained" in message
    assert "is pickled" in refusal(directory / "pytorch_model.bin")


@pytest.mark.parametrize(
    "name", ["smollm3", "nowhere/tiny.gguf", "~nobody/tiny.gguf", "x" * 5000], ids=lambda n: n[:20]
)
def test_an_unknown_model_is_refused_with_the_known_ones(name):
    message = refusal(name)
    assert name in message
    assert "smollm2-135m" in message


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(directory):
    vocabulary = {token: index for index, token in enumerate([*checkpoints.VOCABULARY, "one-more"])}
    Tokenizer(models.WordLevel(vocabulary, unk_token="one-more")).save(str(directory / "tokenizer.json"))
    message = complaint(directory)
    assert str(directory) in message
    assert "embedding" in message
    assert "\n" not in message
