"""A result store from a stranger runs no code, and is read only as this project writes it."""

import json
import os
import shutil

import numcodecs
import numpy as np
import pytest
import xarray as xr
import zarr

from hydra_jax.analysis import results
from hydra_jax.errors import UserError
from hydra_jax.store import effects as store
from hydra_jax.store import metadata
from tests.helpers import effects as toy_effects


@pytest.fixture
def stored(tmp_path):
    direct = np.random.default_rng(0).normal(1, 1, (6, 4, 2)).astype(np.float32)
    (tmp_path / "sweep").mkdir()
    toy_effects.stored(tmp_path / "sweep", toy_effects.effects(direct, direct), 3)
    return tmp_path / "sweep"


class Harmful:
    """What makes a directory when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def pickled_array(group, name, mark):
    """Write an array of strings of zarr format 2, which `numcodecs` unpickles when it is read."""
    array = group / name
    array.mkdir()
    codecs = {"filters": [{"id": "vlen-utf8"}, {"id": "pickle"}], "compressor": None}
    layout = {"shape": [1], "chunks": [1], "dtype": "|O", "fill_value": None, "order": "C", "zarr_format": 2}
    (array / ".zarray").write_text(json.dumps(codecs | layout))
    (array / ".zattrs").write_text(json.dumps({"_ARRAY_DIMENSIONS": [name]}))
    (array / "0").write_bytes(numcodecs.Pickle().encode(Harmful(mark)))


@pytest.mark.parametrize("name", [store.NAME, store.EXAMPLES])
def test_a_store_of_format_2_is_refused_before_anything_of_it_is_unpickled(stored, tmp_path, monkeypatch, name):
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True)
    mark = tmp_path / "ran"
    path = stored / name
    shutil.rmtree(path, ignore_errors=True)
    zarr.open_group(path, mode="w", zarr_format=2)
    pickled_array(path, "prompt", mark)  # an index, which xarray reads as it opens

    with pytest.raises(Exception):  # noqa: B017, PT011  (whatever comes of what is no array)
        xr.open_zarr(path, consolidated=False, chunks=None)
    assert mark.is_dir(), "the store is harmless, so this test shows nothing"
    mark.rmdir()

    for read in (results.load, store.open_effects if name == store.NAME else store.open_examples):
        with pytest.raises(UserError, match="not of zarr format 3"):
            read(stored)
    assert not mark.exists()


def test_an_array_of_format_2_in_a_group_of_format_3_is_not_opened(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True)
    mark = tmp_path / "ran"
    shutil.rmtree(stored / store.NAME / "total_effect")
    pickled_array(stored / store.NAME, "total_effect", mark)
    with pytest.raises(UserError, match="total_effect"):
        results.load(stored)
    assert not mark.exists()


CHANGES = {
    "codec": {"codecs": [{"name": "numcodecs.pickle"}]},
    "codec after ours": {"codecs": [{"name": "bytes"}, {"name": "blosc", "configuration": {}}]},
    "codec of another type": {"codecs": ["bytes"]},
    "no codecs": {"codecs": []},
    "codecs that are none": {"codecs": 5},
    "data type": {"data_type": "variable_length_bytes"},
    "data type with settings": {"data_type": {"name": "struct", "configuration": {}}},
    "chunk grid": {"chunk_grid": {"name": "rectilinear"}},
    "chunk key encoding": {"chunk_key_encoding": {"name": "v2"}},
    "storage transformers": {"storage_transformers": [{"name": "any"}]},
    "node type": {"node_type": "group"},
    "zarr format": {"zarr_format": 2},
}


@pytest.mark.parametrize("what", CHANGES)
def test_metadata_that_this_project_does_not_write_is_refused_in_one_line(stored, what):
    path = stored / store.NAME / "total_effect" / metadata.DOCUMENT
    path.write_text(json.dumps(json.loads(path.read_text()) | CHANGES[what]))
    with pytest.raises(UserError) as raised:
        store.open_effects(stored)
    assert "total_effect" in str(raised.value)
    assert "--workdir" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b'{"zarr_format": "3"}', b"\xff"])
def test_a_document_that_is_not_metadata_is_refused_in_one_line(stored, content):
    (stored / store.NAME / "zarr.json").write_bytes(content)
    with pytest.raises(UserError, match=r"effects\.zarr") as raised:
        store.open_effects(stored)
    assert "\n" not in str(raised.value)


def test_a_document_of_any_size_is_not_read(stored, monkeypatch):
    monkeypatch.setattr(metadata, "MOST_BYTES", 10)
    with pytest.raises(UserError, match="MiB"):
        store.open_effects(stored)
