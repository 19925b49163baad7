"""The engine's walk: rows of many texts in blocks, on meshes, against the definition of one row of one text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydra_jax.config import MeshConfig
from hydra_jax.core.edits import ATTN, WHOLE, Component, Kind, all_components, replacement
from hydra_jax.core.effects import delta_unembed, effects, head_unembed
from hydra_jax.core.prefill import Clean, LayerClean, Reading, read
from hydra_jax.core.programs import Word, program
from hydra_jax.core.row import Values, Words
from hydra_jax.core.row import walk as walk_one
from hydra_jax.engine import blocks, mesh
from hydra_jax.engine.blocks import Layout
from hydra_jax.engine.layers import Resident
from hydra_jax.engine.rows import Draws, Rows
from hydra_jax.engine.walk import Sizes, Texts, forward
from hydra_jax.models import transformer
from hydra_jax.models.layers import positions
from hydra_jax.models.pieces import LayerParams
from tests.helpers import models as toy_models
from tests.helpers import walks
from tests.helpers.speed import few

LAYERS, HEADS = 4, 4
TOKENS = np.stack([np.asarray(toy_models.tokens(9, seed)) for seed in range(8)])
PLACES = np.array([[8, 3], [4, 0], [7, 7], [8, 5], [2, 1], [6, 8], [5, 4], [0, 2]])
PROGRAMS = {
    "a write": dict(clamp=["attn 0"]),
    "a head, and one that is frozen where nothing has changed": dict(clamp=["attn 0.1"], freeze=["attn 0.3"]),
    "writes and a head that sees one": dict(clamp=["mlp 0", "attn 2.1", "mlp 2"], probe=["attn 3"]),
    "direct edges": dict(clamp=["attn 1"], rest=Word.PROBE),
    "frozen heads and norm": dict(clamp=["attn 1.1", "attn 1.2", "mlp 3"], freeze=["attn 2.0", "norm"]),
    "a path": dict(clamp=["mlp 1", "attn 2"], freeze=["mlp 2", "attn 3"]),
    "a frozen norm": dict(clamp=["mlp 2"], freeze=["norm"]),
    "the last write": dict(clamp=["mlp 3"]),
    "nothing": dict(),
}
"""In order of their first clamps."""


def programs(config):
    return [program(config, **words) for words in PROGRAMS.values()]


def ablations(config):
    return [program(config, clamp=[component]) for component in all_components(config.layers)]


def clean_run(params, tokens, place, contrast):
    _, trace = transformer.forward(params, tokens, only=place)
    reading = read(params, trace.resid_post[-1], place, contrast)
    return Clean(**{name: getattr(reading, name) for name in Reading.__dataclass_fields__}, layers=LayerClean.of(trace))


@functools.cache
def clean_runs(block):
    """Every text's at each of its places, one by one, [P, Q]."""
    over_places = jax.vmap(clean_run, (None, None, 0, 0))
    every = jax.jit(jax.vmap(over_places, (None, 0, 0, 0)))
    return every(toy_models.block(block), TOKENS, PLACES, walks.contrasts(range(len(TOKENS)), PLACES.shape[1]))


@functools.cache
def defined(block):
    """The effects of every row by `core.row.walk`, [P, G, Q, R]."""
    params = toy_models.block(block)
    c, every = params.config, programs(params.config)
    layers = LayerParams(params.weights["layers"], positions(c), c)
    parts = zip(*((p.writes, p.heads, p.living(c.parallel)) for p in every), strict=True)
    words = Words(*map(np.stack, parts))
    frozen = np.array([p.norm == Word.FREEZE for p in every])
    probed = np.stack([(p.writes == Word.PROBE) & p.living(c.parallel) for p in every])
    writes = np.zeros((len(TOKENS), walks.DRAWS, LAYERS, 2, c.width), np.float32)
    mixed = np.zeros((len(TOKENS), walks.DRAWS, LAYERS, HEADS, c.head_dim), np.float32)
    for name in range(len(TOKENS)):
        for component in all_components(LAYERS):
            writes[name, :, component.layer, component.site] = walks.source(c, name, component)
        for layer in range(LAYERS):
            for head in range(HEADS):
                mixed[name, :, layer, head] = walks.source(c, name, Component(layer, ATTN, head))

    def row(clean, values, words, frozen, probed):
        return effects(params, clean, walk_one(layers, clean, words, values), frozen, probed)

    over_draws = jax.vmap(row, (None, 0, None, None, None))
    over_readings = jax.vmap(over_draws, (0, None, None, None, None))
    over_programs = jax.vmap(over_readings, (None, None, 0, 0, 0))
    over_texts = jax.jit(jax.vmap(over_programs, (0, 0, None, None, None)))
    return jax.device_get(over_texts(clean_runs(block), Values(writes, mixed), words, frozen, probed))


def walked(block, at_once=8, data=1, model=1, **changes):
    params = mesh.lay(mesh.make(MeshConfig(data, model)), toy_models.block(block))
    asked = dict(tokens=TOKENS, places=PLACES, programs=programs(params.config)) | changes
    return walks.walk(params, at_once=at_once, **asked)


def assert_same(found, expected, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=1e-5), found, expected)


def of_clean(reading):
    """A clean run's `Reading`."""
    return Reading(**{name: getattr(reading, name) for name in Reading.__dataclass_fields__})


CASES = [
    *((block, 8, 1, 1) for block in toy_models.BLOCKS),
    *(("gemma 2", at_once, 1, 1) for at_once in (1, 4, 7, 100, 512)),
    *(("mistral", at_once, data, model) for at_once in (4, 64) for data, model in ((2, 1), (4, 1), (1, 2), (2, 2))),
    ("pythia", 512, 2, 2),
    ("gpt-2", 7, 1, 4),
]


@pytest.mark.parametrize(
    ("block", "at_once", "data", "model"), few(CASES, ("gemma 2", 8, 1, 1), ("gemma 2", 512, 1, 1), ("pythia", 8, 1, 1))
)
def test_rows_are_those_of_the_definition(block, at_once, data, model):
    found = walked(block, at_once, data, model)
    expected = defined(block)
    assert_same(found.effects, expected)
    assert_same(found.reading, of_clean(clean_runs(block)))
    np.testing.assert_allclose(found.effects.residual, 0, atol=2e-5)
    moved = np.abs(expected.total_effect).mean(axis=(0, 2, 3))
    assert (moved[:-1] > 1e-2).all()
    assert moved[-1] < 1e-5


def test_blocks_are_cut_in_every_way():
    """By the sizes above: a row of a text; some, the last block filled up; and programs and texts together."""
    of = [Layout.of(8, 2, walks.DRAWS, len(PROGRAMS), at_once) for at_once in (1, 4, 7, 100, 512)]
    assert [(one.rows, one.texts_at_once) for one in of] == [(1, 1), (3, 1), (6, 1), (18, 4), (18, 8)]
    assert [one.of_program for one in of] == [6] * 5
    assert [one.total for one in of] == [54] * 5
    uneven = Layout.of(8, 1, 5, 4, 4)
    assert (uneven.rows, uneven.of_program, uneven.total) == (3, 6, 24)
    assert Layout.of(8, 1, 3, 10, 512).total == 36


@pytest.mark.parametrize("at_once", [2, 64])
def test_rows_that_only_fill_a_block_are_in_no_result(at_once):
    params = toy_models.block("llama 3")
    chosen = programs(params.config)[:4]
    found = walks.walk(params, TOKENS, PLACES[:, :1], chosen, at_once)
    assert found.rows.layout.total > 4 * walks.DRAWS
    assert_same(found.effects, walks.walk(params, TOKENS, PLACES[:, :1], chosen, walks.DRAWS).effects)


def test_the_order_of_texts_changes_nothing():
    order = np.array([3, 7, 0, 1, 6, 5, 2, 4])
    found = walked("gemma 2", 16, tokens=TOKENS[order], places=PLACES[order], names=order)
    assert_same(found.effects, jax.tree.map(lambda leaf: leaf[order], walked("gemma 2", 16).effects))


def test_padding_changes_nothing():
    padded = np.pad(TOKENS, ((0, 0), (0, 4)), constant_values=17)
    assert_same(walked("gemma 2", tokens=padded).effects, walked("gemma 2").effects)


def test_a_text_alone_has_the_rows_that_it_has_beside_others():
    together = walked("gemma 2", 64)
    for text in (0, 5):
        alone = walked("gemma 2", 64, tokens=TOKENS[[text]], places=PLACES[[text]], names=[text])
        assert_same(alone.effects, jax.tree.map(lambda leaf, text=text: leaf[[text]], together.effects))


def test_another_text_changes_its_own_rows_alone():
    tokens, names = TOKENS.copy(), np.arange(8)
    tokens[2], names[2] = tokens[2, ::-1], 20
    before, after = (walked("gemma 2", 64, **changes).effects for changes in ({}, dict(tokens=tokens, names=names)))
    others = np.arange(8) != 2
    assert_same(*(jax.tree.map(lambda leaf: leaf[others], one) for one in (before, after)), tolerance=1e-6)
    assert (np.abs(before.total_effect - after.total_effect)[2, :-1] > 1e-4).mean() > 0.9


def test_several_readings_of_a_text_are_those_of_as_many_texts():
    both, every = walked("gemma 2", 64), walks.contrasts(range(8), 2)
    for place in ([0], [1]):
        read_there = jax.tree.map(lambda leaf, place=place: leaf[:, place], every)
        one = walked("gemma 2", places=PLACES[:, place], read=read_there)
        assert_same(one.reading, jax.tree.map(lambda leaf, place=place: leaf[:, place], both.reading))
        assert_same(one.effects, jax.tree.map(lambda leaf, place=place: leaf[:, :, place], both.effects))


@pytest.mark.parametrize("at_once", [2, 8])
@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("component", [Component(1, 0), Component(2, 1), Component(2, 0, 3)], ids=str)
def test_values_are_replacements_drawn_by_text_and_component(kind, component, at_once):
    c, count = toy_models.config(), 2 * walks.DRAWS
    layout = Layout.of(3, 2, walks.DRAWS, 5, at_once)
    keys = jax.random.split(jax.random.key(1), 3)
    sources = jnp.stack([walks.source(c, name, component) for name in range(3)])
    spread = jax.tree.map(lambda part: jnp.tile(jnp.asarray(part, jnp.float32), (3, 1)), walks.statistics(c, component))
    found = Draws(mesh.mesh_of(toy_models.params()), layout, kind, keys, lambda _: sources, lambda _: spread)(component)
    for text in range(3):
        own = jax.random.fold_in(keys[text], component.index)
        own = own if component.head == WHOLE else jax.random.fold_in(own, component.head)
        for row, key in enumerate(jax.random.split(own, count)):
            own_spread = jax.tree.map(lambda part, text=text: part[text], spread)
            expected = replacement(kind, sources[text, row % walks.DRAWS], own_spread, key)
            np.testing.assert_allclose(found[text, row], expected, atol=1e-6)


@pytest.mark.parametrize("block", ["llama 3", "pythia", "gemma 2"])
@pytest.mark.parametrize("at_once", [3, 8, 64])
def test_texts_may_differ_in_what_one_program_clamps(block, at_once):
    """Each text's rows are those of a program of its own."""
    params = toy_models.block(block)
    clamps = np.random.default_rng(at_once).random((len(TOKENS), LAYERS, 2)) < 0.3
    clamps[0] = False

    def cut(flags):
        return [one for one in all_components(LAYERS) if flags[one.layer, one.site]]

    asked = program(params.config, cut(clamps.any(axis=0)), freeze=["norm"])
    together = walks.walk(params, TOKENS, PLACES, [asked], at_once, clamps=clamps)
    for text, flags in enumerate(clamps):
        alone = program(params.config, cut(flags), freeze=["norm"])
        here = slice(text, text + 1)
        expected = walks.walk(params, TOKENS[here], PLACES[here], [alone], at_once, names=[text])
        of_text = jax.tree.map(lambda leaf, here=here: np.asarray(leaf)[here], together.effects)
        assert_same(of_text, expected.effects)


def test_what_heads_change_adds_up_to_what_attention_does():
    params = toy_models.block("gemma 2")
    found = walks.walk(params, TOKENS, PLACES, ablations(params.config), by_head=True)
    of_heads = jax.device_get(found.rows.head_changes(found.reading))
    assert of_heads.shape == (*found.effects.total_effect.shape, LAYERS, HEADS)
    np.testing.assert_allclose(of_heads.sum(axis=-1), found.effects.compensation[..., ATTN], atol=2e-5)
    living = np.array([[layer > component.layer for layer in range(LAYERS)] for component in all_components(LAYERS)])
    assert ((np.abs(of_heads).max(axis=(0, 2, 3)) > 1e-3) == living[..., None]).all()


@pytest.mark.parametrize("sizes", [None, Sizes(tokens=1, logits=1), Sizes(tokens=20, logits=3)])
@pytest.mark.parametrize("block", few(toy_models.BLOCKS, "gemma 2"))
def test_texts_run_as_each_alone(block, sizes):
    params, expected = toy_models.block(block), clean_runs(block)
    read_of = walks.contrasts(range(len(TOKENS)), PLACES.shape[1])
    texts = Texts(params, TOKENS, PLACES, sizes)
    readout, constant = texts.contrast(read_of)
    assert_same((readout, constant), (expected.readout, expected.constant))
    added = []
    for number, layer in enumerate(forward(params.config, Resident(params))):
        clean = texts.through(layer)
        here = jax.tree.map(lambda leaf, number=number: leaf[:, :, number], expected.layers)
        assert_same((clean.resid_pre, clean.writes, clean.mixed), (here.resid_pre, here.writes, here.mixed))
        assert_same((clean.keys, clean.values), (here.keys[:, 0], here.values[:, 0]))
        added.append(texts.contributions(layer, clean, readout, by_head=True))
    assert_same(texts.read(read_of), of_clean(expected))
    scale = expected.final_scale[..., None, None]
    writes, heads = (np.stack(parts, axis=2) / scale for parts in zip(*added, strict=True))
    of_each = jax.vmap(jax.vmap(delta_unembed)), jax.vmap(jax.vmap(lambda clean: head_unembed(params, clean)))
    assert_same((writes, heads), tuple(of(expected) for of in of_each))


@pytest.fixture
def computed(monkeypatch):
    """Numbers of blocks that were computed, stage by stage."""
    counts, program_of = [], Rows._program

    def counted(self, run, *arguments, **switches):
        made = program_of(self, run, *arguments, **switches)
        if run is not blocks.advance:
            return made

        def call(*operands):
            counts.append(int(operands[6]))
            return made(*operands)

        return call

    monkeypatch.setattr(Rows, "_program", counted)
    return counts


@pytest.mark.parametrize(
    ("block", "at_once", "expected"),
    [
        ("llama 3", 6, [8 * downstream for downstream in range(8)]),  # of every text the rows of a program
        ("llama 3", 512, [0, 1, 1, 1, 2, 2, 2, 3]),  # of all texts the rows of three programs
        ("pythia", 6, [0, 16, 32, 48]),  # attention and MLP together
    ],
)
def test_what_is_upstream_of_a_clamp_is_not_computed(computed, block, at_once, expected):
    params = toy_models.block(block)
    found = walks.walk(params, TOKENS, PLACES, ablations(params.config), at_once)
    assert computed == expected
    work = [found.rows.work(layer) for layer in range(LAYERS)]
    components = [0 + 1, 2 + 3, 4 + 5, 6 + 7] if block == "llama 3" else [0, 4, 8, 12]
    assert work == [2 * walks.DRAWS * count for count in components]


def test_what_is_frozen_or_clamped_is_not_computed(computed):
    params = toy_models.block("llama 3")
    path = program(params.config, clamp=["attn 0", "attn 2"], follow=["mlp 1", "mlp 3"], rest=Word.FREEZE)
    heads = program(params.config, clamp=["attn 1", "attn 2.1"], probe=["mlp 2"])
    found = walks.walk(params, TOKENS, PLACES, [path, heads], 6)
    assert computed == [8 * programs for programs in (0, 0, 0, 1 + 1, 0, 1, 1, 1 + 1)]
    assert (found.effects.compensation[:, 0, ..., 0, 1] == 0).all()


def test_where_nothing_is_clamped_nothing_is_computed(computed):
    params = toy_models.block("llama 3")
    found = walks.walk(params, TOKENS, PLACES, [program(params.config)] * 2)
    assert computed == [0] * 8
    jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf, 0, atol=1e-5), found.effects)
