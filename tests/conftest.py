"""Strict JAX for every test: no silent promotion of types or ranks, annotations checked, and four CPU devices.

Tests marked `slow` are left out by `launch/test.sh --fast`; those of the real model are marked `network` here.
"""

import gc
import os
import socket
import time
from pathlib import Path

import platformdirs

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
# Every compiled program is kept, for other test modules, workers, commands, and the next run of the tests.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(platformdirs.user_cache_path("hydra_jax") / "tests"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import jaxtyping
import pytest
from hypothesis import settings

from tests.helpers import annotations

# Before those modules are imported, and in the tests' own processes only: commands that tests start run as users' do.
jaxtyping.install_import_hook(annotations.MODULES, "tests.helpers.annotations.checked")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# Compiling takes seconds now and then: no deadline. Derandomised: a red run can be run again.
settings.register_profile("hydra", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("hydra")

PROGRAM_DAYS = 3
"""After which a compiled program is removed, so that those of old code do not fill the disk."""
LONG = ("kills_test", "mesh_test", "sweep_command_test", "cluster_test", "train_command_test", "training_loop_test")
"""The files that take longest, longest first: begun last, one of them would keep a worker while the others are done."""


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist: its controller has done it
        return
    for path in Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*-cache"):
        if time.time() - path.stat().st_mtime > PROGRAM_DAYS * 86_400:
            path.unlink(missing_ok=True)


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))  # stable
    for item in items:
        if "smollm2" in item.fixturenames:
            item.add_marker("network")


@pytest.fixture(autouse=True)
def _this_machine_alone(request, monkeypatch):
    """A test without the marker `network` reaches this machine alone."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def local(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise ConnectionError(f"a test that is not marked `network` asks for {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """XLA maps memory for every program that it keeps, and a process may map only so much."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def smollm2():
    """The real default model."""
    import hydra_jax

    return hydra_jax.load("smollm2-135m")
