"""GGUF headers: what `gguf` reads of them, and what is refused before anything of that size is made."""

import itertools
import re
import struct
import tracemalloc

import gguf
import numpy as np
import pytest

from hydra_jax.errors import UserError
from hydra_jax.weights import gguf_header, hub, source
from hydra_jax.weights.gguf_file import GgufFile
from hydra_jax.weights.load import load
from tests.helpers import checkpoints, corruption

U32, STRING, ARRAY = 4, 8, 9


def text(value):
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def array(kind, count, values=b""):
    return struct.pack("<IQ", kind, count) + values


def tensor(name="a", shape=(4,), kind=0, offset=0):
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def header(pairs=(), tensors=(), version=3, magic=b"GGUF", counts=None, data=b"\0" * 64):
    whole = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(pairs)))) + b"".join([*pairs, *tensors])
    return whole + b"\0" * (-len(whole) % 32) + data


@pytest.fixture
def written(tmp_path):
    def write(content):
        path = tmp_path / "x.gguf"
        path.write_bytes(content)
        return path

    return write


def flattened(value):
    """Nested arrays as `gguf` has them: one after the other."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return [inner for part in value for inner in flattened(part)]
    return value


def assert_as_gguf_reads(path):
    ours, theirs = gguf_header.read(path), gguf.GGUFReader(path)
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert {key: flattened(value) for key, value in ours.metadata.items()} == expected
    assert [type(value) for value in ours.metadata.values()] == [type(value) for value in expected.values()]
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(tensor.shape.tolist())
        assert (info.kind, info.start) == (tensor.tensor_type, tensor.data_offset)
    return theirs


def assert_decoded_as_gguf_does(path, theirs):
    tensors = GgufFile(path)._tensors
    for tensor in theirs.tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        decoded = tensors[tensor.name].decoded()
        assert decoded.dtype == np.float32
        np.testing.assert_array_equal(decoded, expected)


@pytest.mark.slow
@pytest.mark.network
def test_the_real_model_is_read_as_gguf_reads_it():
    path = hub.locate("smollm2-135m")
    assert_decoded_as_gguf_does(path, assert_as_gguf_reads(path))


def test_a_tiny_model_is_read_as_gguf_reads_it(tmp_path):
    path = checkpoints.gguf_file(tmp_path / "tiny.gguf")
    assert_decoded_as_gguf_does(path, assert_as_gguf_reads(path))


def every_type(path, alignment=None):
    """Write a file with values of all types, by themselves and in arrays, and a few tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    numbers = dict(uint8=200, int8=-3, uint16=60_000, int16=-300, uint32=2**32 - 1, int32=-(2**31), uint64=2**64 - 1)
    numbers |= dict(int64=-(2**63), float32=0.1, float64=0.1, bool=True)
    for name, value in numbers.items():
        getattr(writer, f"add_{name}")(f"one.{name}", value)
        kind = gguf.GGUFValueType[name.upper()]
        writer.add_key_value(f"many.{name}", [value, 0, value], gguf.GGUFValueType.ARRAY, kind)
    writer.add_string("one.string", "é\n")
    writer.add_array("many.string", ["", "é", "x" * 1000])
    writer.add_array("nested", [[1, 2], [3, 4, 5]])
    writer.add_array("nested.string", [["a", "b"], ["c"]])
    writer.add_tensor("a", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("b", np.arange(7, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_values_of_all_types_are_read_as_gguf_reads_them(tmp_path, alignment):
    path = every_type(tmp_path / "every.gguf", alignment)
    assert_as_gguf_reads(path)
    metadata = gguf_header.read(path).metadata
    assert metadata["nested"] == [[1, 2], [3, 4, 5]]
    assert metadata["one.string"] == "é\n"


def test_a_large_vocabulary_is_read_whole(tmp_path):
    count = 262_144
    tokens, merges = [f"token {i}" for i in range(count)], [f"t {i}" for i in range(count - 256)]
    writer = gguf.GGUFWriter(tmp_path / "large.gguf", "llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(count)])
    writer.add_token_types([1] * count)
    writer.add_token_merges(merges)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = gguf_header.read(tmp_path / "large.gguf").metadata
    assert metadata["tokenizer.ggml.tokens"] == tokens
    assert metadata["tokenizer.ggml.merges"] == merges
    assert metadata["tokenizer.ggml.scores"][-1] == 1.0 - count
    assert metadata["tokenizer.ggml.token_type"] == [1] * count


@pytest.mark.parametrize("version", [2, 3])
def test_versions_2_and_3_are_read(written, version):
    read = gguf_header.read(written(header([pair("a", U32, struct.pack("<I", 7))], [tensor()], version)))
    assert read.metadata == {"a": 7}
    assert read.tensors["a"].start % 32 == 0


def nested(depth):
    return array(U32, 1, struct.pack("<I", 1)) if not depth else array(ARRAY, 1, nested(depth - 1))


ONE = struct.pack("<I", 1)
DAMAGED = {
    "nothing": (b"", "does not begin with GGUF"),
    "four bytes": (b"GGUF", "do not fit"),
    "other magic": (header(magic=b"GGML"), "does not begin with GGUF"),
    "pairs without end": (header(counts=(0, 2**40)), "do not fit"),
    "tensors without end": (header(counts=(2**40, 0)), "do not fit"),
    "a string without end": (header([text("a") + struct.pack("<IQ", STRING, 2**40)]), "has no end"),
    "a key without end": (header([struct.pack("<Q", 2**63) + b"a" * 20]), "has no end"),
    "strings without end": (header([pair("a", ARRAY, array(STRING, 2**40))]), "do not fit"),
    "numbers without end": (header([pair("a", ARRAY, array(U32, 2**40))]), "do not fit"),
    "numbers past the end": (header([pair("a", ARRAY, array(10, 20))], data=b""), "do not fit"),
    "arrays without end": (header([pair("a", ARRAY, array(ARRAY, 2**40))]), "do not fit"),
    "unknown type": (header([pair("a", 13, ONE)]), "unknown type, 13"),
    "unknown type in an array": (header([pair("a", ARRAY, array(77, 1, ONE))]), "unknown type, 77"),
    "nested too deep": (header([pair("a", ARRAY, nested(5))]), "nested"),
    "a key twice": (header([pair("a", U32, ONE)] * 2), "key 'a' is there twice"),
    "a tensor twice": (header(tensors=[tensor()] * 2), "tensor 'a' is there twice"),
    "not UTF-8": (header([pair(b"\xff", U32, ONE)]), "utf-8"),
    "no dimensions": (header(tensors=[tensor(shape=())]), "0 dimensions"),
    "many dimensions": (header(tensors=[tensor(shape=(1,) * 5)]), "5 dimensions"),
    "not aligned": (header(tensors=[tensor(offset=4)]), "not aligned"),
    "alignment 0": (header([pair("general.alignment", U32, struct.pack("<I", 0))]), "general.alignment is 0"),
    "alignment 24": (header([pair("general.alignment", U32, struct.pack("<I", 24))]), "general.alignment is 24"),
    "alignment a text": (header([pair("general.alignment", STRING, text("x"))]), "general.alignment is 'x'"),
}


@pytest.mark.parametrize(("content", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_header_is_refused_in_a_line(written, content, reason):
    path = written(content)
    tracemalloc.start()
    with pytest.raises(UserError) as raised:
        source.open(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = str(raised.value)
    assert message.startswith(f"{path}: truncated or damaged (")
    assert message.endswith("; fetch it again")
    assert re.search(reason, message)
    assert peak < 4 << 20


@pytest.mark.parametrize(
    ("version", "reason"), [(1, "version 1, versions 2 and 3 are read"), (4, "version 4"), (0, "version 0")]
)
def test_other_versions_are_refused(written, version, reason):
    with pytest.raises(UserError, match=reason):
        source.open(str(written(header(version=version))))


def test_a_big_endian_file_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="big-endian"):
        source.open(str(tmp_path / "big.gguf"))


LLAMA = pair("general.architecture", STRING, text("llama"))
TENSORS = {
    "past the end": (tensor(shape=(17,)), "ends at byte"),
    "far past the end": (tensor(shape=(2**40, 2**40)), "ends at byte"),
    "far away": (tensor(offset=2**62), "ends at byte"),
    "unknown type": (tensor(kind=999), "999"),
    "part of a block": (tensor(shape=(16,), kind=2), "whole blocks of 32"),
}


@pytest.mark.parametrize(("described", "reason"), TENSORS.values(), ids=TENSORS)
def test_a_tensor_that_is_not_in_the_file_is_refused_before_it_is_used(written, described, reason):
    path = written(header([LLAMA], [described]))
    with pytest.raises(UserError) as raised:
        source.open(str(path)).config()
    assert str(raised.value).startswith(f"{path}: truncated or damaged (")
    assert reason in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [(dict(architecture="mamba"), "architecture 'mamba'"), (dict(pre="chameleon"), "tokenizer gpt2/chameleon")],
    ids=str,
)
def test_what_is_not_supported_is_refused_before_any_weight_is_read(tmp_path, changes, reason):
    path = checkpoints.gguf_file(tmp_path / "tiny.gguf", **changes)
    starts = [info.start for info in gguf_header.read(path).tensors.values()]
    path.write_bytes(path.read_bytes()[: min(starts)])  # the header alone
    with pytest.raises(UserError, match=reason):
        load(str(path))


def test_a_file_is_parsed_once_and_hashed_once(tmp_path, monkeypatch):
    calls = []
    for module, name in ((gguf_header, "read"), (source.GgufFile, "digest"), (source.GgufFile, "tokenizer")):
        inner = getattr(module, name)

        def counted(*arguments, inner=inner, name=name):
            calls.append(name)
            return inner(*arguments)

        monkeypatch.setattr(module, name, counted)
    opened = source.open(str(checkpoints.gguf_file(tmp_path / "tiny.gguf")))
    assert opened.config() == opened.load().config
    assert opened.tokenizer() is opened.load().tokenizer
    assert opened.weights_hash == opened.load().weights_hash
    assert sorted(calls) == ["digest", "read", "tokenizer"]


@pytest.mark.parametrize("number", range(200))
def test_a_spoiled_header_is_refused_or_read(tmp_path, number):
    random = corruption.generator("header", number)
    path = every_type(tmp_path / "every.gguf")
    path.write_bytes(corruption.content(random, path.read_bytes(), 1 + number % 3))
    try:
        read = gguf_header.read(path)
    except (ValueError, UserError):
        return
    assert all(isinstance(key, str) for key in itertools.chain(read.metadata, read.tensors))
