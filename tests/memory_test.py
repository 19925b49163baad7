import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydra_jax.config import MeshConfig
from hydra_jax.core.edits import Kind, WriteStatistics
from hydra_jax.engine import batched, memory, mesh
from hydra_jax.errors import UserError
from hydra_jax.models.transformer import layout
from tests.helpers import models as toy_models
from tests.helpers.speed import few

SHAPE = toy_models.config(width=256, heads=8, kv_heads=4, head_dim=32, mlp_width=1024, vocab_size=4000, layers=6)


def sizer(free, rows=0, data=4, config=SHAPE):
    return memory.BatchSizer(config, mesh.make(MeshConfig(data)), 3, False, rows, free)


@pytest.mark.parametrize("length", few([8, 64], 64))
@pytest.mark.parametrize("prompts", few([8, 64], 8))
def test_what_is_planned_with_is_what_the_compiled_programs_take(prompts, length):
    """Temporaries, arguments and results of both programs on one device, besides the parameters."""
    of = jax.ShapeDtypeStruct
    params = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), layout(SHAPE))
    numbers = of((prompts,), jnp.int32)
    prefill = batched.prefill_program(params).lower(params, of((prompts, length), jnp.int32), numbers, numbers)
    clean = jax.eval_shape(batched.prefill_program(params), params, of((prompts, length), jnp.int32), numbers, numbers)
    edits = of((), jnp.int32), of((), jnp.int32), None
    width = of((SHAPE.width,), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), prompts))
    others = of((prompts, 3, SHAPE.width), jnp.float32), WriteStatistics(width, width), keys
    ablate = batched.ablate_program(params, Kind.RESAMPLE, False).lower(params, clean, edits, *others)
    kept = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(clean))
    taken = max(kept + each.compile().memory_analysis().temp_size_in_bytes for each in (prefill, ablate))
    need = memory.needs(SHAPE, length, draws=3)
    planned = need.fixed + prompts * need.prompt
    assert taken < planned
    assert prompts * length < batched.PREFILL_TOKENS or planned < 6 * taken


def test_a_chunk_is_what_fills_the_device_or_what_fits():
    assert sizer(1e12).prompts(64) == 4 * (512 // 3)
    assert sizer(1e12, rows=30).prompts(64) == 40
    need = memory.needs(SHAPE, 64, 3)
    for each in (1, 5):
        assert sizer((need.fixed + each * need.prompt + 1) / memory.SHARE).prompts(64) == 4 * each
    assert sizer(2e8).prompts(8) > sizer(2e8).prompts(64)  # short prompts take less
    with pytest.raises(UserError, match=r"^memory: a prompt of 64 tokens .* set --config.mesh.model"):
        sizer(need.fixed).prompts(64)


def test_half_as_many_are_tried_where_memory_is_exhausted():
    made, said, tried = sizer(1e12, rows=30), [], []

    def call(size):
        tried.append(size)
        if size > 12:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
        return size

    assert made.run(call, 40, said.append) == 8
    assert tried == [40, 20, 8]
    assert said == [
        "out of memory with 40 prompts at once: going on with 20",
        "out of memory with 20 prompts at once: going on with 8",
    ]
    assert made.prompts(8) == 8  # and so for what comes after
    with pytest.raises(UserError, match="not even one prompt a device fits"):
        made.run(lambda size: call(13), 8, said.append)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        made.run(lambda size: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL")), 8, said.append)


def test_a_model_that_does_not_fit_is_refused_before_it_is_read():
    whole = mesh.bytes_a_device(SHAPE, 1)
    memory.check_model(SHAPE, 1, whole)
    with pytest.raises(UserError, match=r"set --config.mesh.model to 4 or more"):
        memory.check_model(SHAPE, 1, whole / 3.5)
    memory.check_model(SHAPE, 4, whole / 3.5)


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    for name, text in (
        ("max", "3000000"),
        ("current", "1000000"),
        ("stat", "anon 5\nactive_file 70\ninactive_file 30"),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "CGROUP", (tmp_path / "max", tmp_path / "current", tmp_path / "stat"))
    assert memory.host_bytes() == 2_000_100
    (tmp_path / "current").write_text("4000000")
    assert memory.host_bytes() == 1
    (tmp_path / "max").write_text("max")
    assert memory.host_bytes() > 1e8
