import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydra_jax.config import MeshConfig
from hydra_jax.core.edits import all_components
from hydra_jax.core.programs import program, together
from hydra_jax.engine import memory, mesh
from hydra_jax.engine.layers import Resident
from hydra_jax.engine.rows import Rows
from hydra_jax.engine.walk import PREFILL_TOKENS, Texts, clean_program, forward, read_program
from hydra_jax.errors import UserError
from hydra_jax.models.transformer import Contrast, layout
from tests.helpers import models as toy_models
from tests.helpers.speed import few

SHAPE = toy_models.config(width=256, heads=8, kv_heads=4, head_dim=32, mlp_width=1024, vocab_size=4000, layers=6)
DEEP = toy_models.config(width=32, heads=4, kv_heads=4, head_dim=8, mlp_width=64, vocab_size=400, layers=24)
ASKED = memory.Asked(programs=24, draws=3, least=2)


def sizer(free, rows=0, data=4, **changes):
    asked = dataclasses.replace(ASKED, rows=rows, **changes)
    return memory.BatchSizer(SHAPE, mesh.make(MeshConfig(data)), asked, free)


class Measured:
    """A compiled program that is measured before it runs: the bytes that it takes besides its arguments."""

    def __init__(self, made, taken):
        self.made, self.taken = made, taken

    def __call__(self, *operands):
        needs = self.made.lower(*operands).compile().memory_analysis()
        self.taken.append(needs.temp_size_in_bytes + needs.output_size_in_bytes - needs.alias_size_in_bytes)
        return self.made(*operands)


@pytest.fixture
def taken(monkeypatch):
    """Bytes besides its arguments that each program of the rows takes."""
    bytes_of, program_of = [], Rows._program
    monkeypatch.setattr(
        Rows, "_program", lambda self, *of, **switches: Measured(program_of(self, *of, **switches), bytes_of)
    )
    return bytes_of


@pytest.mark.parametrize(
    ("config", "texts", "length", "readings", "free"),
    few(
        [
            *((SHAPE, texts, length, 1, free) for texts in (8, 64) for length in (8, 64) for free in (math.inf, 1e6)),
            *((DEEP, 64, length, readings, 1e6) for length, readings in ((64, 1), (64, 3), (8, 2))),
        ],
        (SHAPE, 64, 64, 1, math.inf),
        (DEEP, 64, 8, 2, 1e6),
    ),
    ids=lambda value: f"{value.layers} layers" if value in (SHAPE, DEEP) else str(value),
)
def test_what_is_planned_with_is_what_the_compiled_programs_take(taken, config, texts, length, readings, free):
    """What a walk keeps and what its largest program takes beside that, besides the parameters, on one device."""
    params = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), layout(config))
    sizes = memory.sizes(config, length, 1, free)
    places, read = np.full((texts, readings), length - 1), np.zeros((texts, readings, 1), np.int32)
    contrast = Contrast(read, read.astype(np.float32))
    walked = Texts(params, np.zeros((texts, length), np.int32), places, sizes)
    programs = [program(config, clamp=[component]) for component in all_components(config.layers)]
    asked = memory.Asked(len(programs), 3, readings, rows=128)
    rows = Rows(walked, together(programs), asked.draws, contrast, asked.at_once)
    values = jnp.zeros((texts, rows.layout.of_program, config.width))
    clean_run = Measured(clean_program(params, sizes.tokens), taken)
    for number, layer in enumerate(forward(config, Resident(params))):
        if not number:
            clean_run(layer, walked.stream, walked.positions)
        clean = walked.through(layer)
        rows.through(number, layer, clean, lambda component: values)
    reading = walked.read(contrast)
    rows.effects(reading)
    Measured(read_program(params, sizes.logits), taken)(params, walked.stream, walked.positions, contrast)
    kept = layer.weights, walked.stream, clean, reading, rows.shift, rows.direct, rows._changes, values
    used = sum(leaf.nbytes for leaf in jax.tree.leaves(kept)) + max(taken)
    need = memory.needs(config, length, asked, 1, free)
    planned = need.fixed + texts * (need.text + len(programs) * asked.draws * readings * need.row)
    assert used < planned
    assert planned < 4 * used or (math.isinf(free) and texts * length < PREFILL_TOKENS)


def test_a_chunk_is_what_fills_the_device_or_what_fits():
    assert sizer(1e12).prompts(64) == 4 * (512 // 3)
    assert sizer(1e12, rows=30).prompts(64) == 40
    assert sizer(1e12).prompts(64, clean=True) == 4 * (512 // memory.SHORT)  # those without rows
    for free in (3e7, 4e7, 6e7):
        need = memory.needs(SHAPE, 64, ASKED, 1, free)
        prompts, text = sizer(free).prompts(64) // 4, need.text + 2 * 3 * need.row
        assert 1 <= prompts < 512 // 3
        assert need.fixed + prompts * text <= memory.SHARE * free < need.fixed + (prompts + 1) * text
    assert sizer(4e7).prompts(8) > sizer(4e7).prompts(64)  # short prompts take less
    with pytest.raises(UserError, match=r"^memory: a prompt of 64 tokens .* set --config.mesh.model"):
        sizer(need.fixed / 2).prompts(64)


def test_programs_that_do_not_fit_together_are_walked_apart():
    assert sizer(1e12).programs(64, 40) == ASKED.programs
    seen = set()
    for free in np.linspace(2.5e7, 2.9e7, 9).tolist():
        together = sizer(free).programs(64, 40)
        need = memory.needs(SHAPE, 64, ASKED, 1, free)
        fixed, of_program = need.fixed + 10 * need.text, 10 * ASKED.draws * need.row
        assert ASKED.least <= together <= ASKED.programs
        assert together % ASKED.least == 0
        assert together == ASKED.least or fixed + together * of_program <= memory.SHARE * free
        assert together == ASKED.programs or memory.SHARE * free < fixed + (together + ASKED.least) * of_program
        seen.add(together)
    assert len(seen) > 2


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
