"""Programs against their definition: a plain loop over components, in which each runs the whole model once."""

import functools
import inspect
from typing import NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hydra_jax.core.edits import ATTN, WHOLE, Component, all_components
from hydra_jax.core.programs import Program, Word, checked, from_words, program
from hydra_jax.errors import UserError
from hydra_jax.models.transformer import Contrast, Edits, forward
from tests.helpers import models as toy_models
from tests.helpers import programs
from tests.helpers.speed import few

LAYERS, HEADS, TOKENS = 4, 4, 7
TEXTS = np.stack([np.asarray(toy_models.tokens(TOKENS, seed)) for seed in range(2)])
ENDS = np.full((2, 1), TOKENS - 1)
READ = Contrast(np.array([[[3, 10]], [[44, 5]]], np.int32), np.array([[[1, -1]], [[1, -0.5]]], np.float32))
PROGRAMS = 6
BLOCKS = few(toy_models.BLOCKS, "llama 3", "pythia", "gemma 2")
COMPONENTS = all_components(LAYERS)
CONFIG = toy_models.config()

jit_forward = jax.jit(forward)


def value(config, component):
    """What a component's clamps take in each text, [P, R = 1, E]."""
    size = config.width if component.head == WHOLE else config.head_dim
    random = np.random.default_rng([component.index, component.head + 1])
    return random.normal(size=(len(TEXTS), 1, size)).astype(np.float32)


class Plain(NamedTuple):
    """A row's effects, and the changes of components, [L, 2], and of heads, [L, H]."""

    total_effect: float
    direct_effect: float
    norm_compensation: float
    compensation: np.ndarray
    head_changes: np.ndarray


class Unembedding:
    """The final norm and the unembedding of a model, in NumPy."""

    def __init__(self, params, tokens, weights):
        norm, self._rms = params.weights["final_norm"], params.config.norm == "rms"
        self._gain, self._bias = (np.asarray(norm.get(name, 0), np.float64) for name in ("scale", "bias"))
        embedding = params.weights["embedding"].T if params.config.tied else params.weights["unembedding"]
        self._matrix = np.asarray(embedding, np.float64)
        self._tokens, self._weights, self._eps = tokens, weights, params.config.norm_eps

    def centred(self, vector):
        return vector if self._rms else vector - vector.mean(axis=-1, keepdims=True)

    def divisor(self, final):
        return np.sqrt(np.square(self.centred(final)).mean() + self._eps)

    def logits(self, final, divisor):
        return (self.centred(final) / divisor * self._gain + self._bias) @ self._matrix

    def of(self, logits):
        return (self._weights * (logits[..., self._tokens] - logits.mean(axis=-1, keepdims=True))).sum(axis=-1)

    def adds(self, vector, divisor):
        return self.of(self.centred(vector) / divisor * self._gain @ self._matrix)


def shares(params, layer, mixed):
    """What each head adds to attention's write, [H, D], and what its output bias does."""
    c = params.config
    weights = jax.tree.map(lambda leaf: np.asarray(leaf[layer], np.float64), params.weights["layers"])
    kernel = weights["attn"]["out"]["kernel"].reshape(c.heads, c.head_dim, c.width)
    of_heads, bias = np.einsum("hi,hid->hd", mixed, kernel), weights["attn"]["out"].get("bias", np.zeros(c.width))
    if not c.post_norm:
        return of_heads, bias
    whole = of_heads.sum(axis=0) + bias
    factor = weights["attn_post_norm"]["scale"] / np.sqrt(np.square(whole).mean() + c.norm_eps)
    return of_heads * factor, bias * factor


def projected(params, layer, mixed):
    of_heads, bias = shares(params, layer, mixed)
    return of_heads.sum(axis=0) + bias


@functools.cache
def clean_pass(params_of, text):
    logits, trace = jit_forward(toy_models.block(params_of), TEXTS[text])
    return jax.device_get((logits[-1], trace))


def plain(block, text, asked, values):
    """Make a row component by component: each computes in a whole pass in which all others write what the row has."""
    params = toy_models.block(block)
    c = params.config
    logits, trace = clean_pass(block, text)
    clean = np.stack([trace.attn_out[:, -1], trace.mlp_out[:, -1]], axis=1)
    final = (trace.resid_pre[-1, -1] + clean[-1].sum(axis=0)).astype(np.float64)
    unembedding = Unembedding(params, READ.tokens[text, 0], READ.weights[text, 0])
    sigma = unembedding.divisor(final)
    uncapped = unembedding.logits(final, sigma)
    capped = c.final_softcap * np.tanh(uncapped / c.final_softcap) if c.final_softcap else uncapped
    np.testing.assert_allclose(capped, logits, atol=1e-5)

    written, changes, of_heads, direct = clean.copy(), np.zeros((LAYERS, 2)), np.zeros((LAYERS, HEADS)), 0.0
    for layer, site in np.ndindex(LAYERS, 2):
        here, word = (layer, site), asked.writes[layer, site]
        mask = np.zeros((LAYERS, 2, TOKENS), bool)
        mask[:, :, -1] = True
        mask[layer, site, -1] = False
        _, seen = jit_forward(params, TEXTS[text], Edits(mask, written[:, :, None]))
        computed = (seen.attn_out, seen.mlp_out)[site][layer, -1]
        if word == Word.CLAMP:
            written[here] = values(Component(layer, site))[text, 0]
            direct -= unembedding.adds(written[here] - clean[here], sigma)
        elif site == ATTN and (asked.heads[layer] != Word.FOLLOW).any():
            before = trace.mixed[layer, -1]
            mixed, alone = np.array(seen.mixed[layer, -1]), before.copy()
            for head, of_head in enumerate(asked.heads[layer]):
                if of_head == Word.CLAMP:
                    mixed[head] = alone[head] = values(Component(layer, ATTN, head))[text, 0]
                elif of_head == Word.FREEZE:
                    mixed[head] = before[head]
            written[here] = projected(params, layer, mixed)
            part = unembedding.adds(projected(params, layer, alone) - clean[here], sigma)
            changes[here] = unembedding.adds(written[here] - clean[here], sigma) - part
            direct -= part
            after, before = (shares(params, layer, one)[0] for one in (mixed, alone))
            of_heads[layer] = unembedding.adds(after - before, sigma) * (asked.heads[layer] == Word.FOLLOW)
        elif word in (Word.FOLLOW, Word.PROBE):
            changes[here] = unembedding.adds(computed - clean[here], sigma)
            if word == Word.FOLLOW:
                written[here] = computed
            if site == ATTN:
                after, before = (shares(params, layer, one.mixed[layer, -1])[0] for one in (seen, trace))
                of_heads[layer] = unembedding.adds(after - before, sigma)
    moved = final + (written - clean).sum(axis=(0, 1))
    own, held = (unembedding.of(unembedding.logits(moved, divisor)) for divisor in (unembedding.divisor(moved), sigma))
    said = held if asked.norm == Word.FREEZE else own
    return Plain(unembedding.of(uncapped) - said, direct, said - held, changes, of_heads)


def run(block, asked, values=None, **changes):
    """The effects by the engine, [P, G], and the changes of heads, [P, G, L, H]."""
    params = toy_models.block(block)
    arguments = dict(tokens=TEXTS, places=ENDS, read=READ, draws=1) | changes
    ran = programs.run(params, programs=asked, values=values or functools.partial(value, params.config), **arguments)
    return jax.tree.map(lambda leaf: leaf[:, :, 0, 0], (ran.effects, ran.head_changes))


def words(count, *among):
    return st.lists(st.sampled_from([int(word) for word in among]), min_size=count, max_size=count)


WRITES = words(2 * LAYERS, *[Word.FOLLOW] * 4, Word.CLAMP, Word.FREEZE, Word.PROBE)
OF_HEADS = st.dictionaries(
    st.integers(0, LAYERS - 1), words(HEADS, Word.FOLLOW, Word.FOLLOW, Word.CLAMP, Word.FREEZE), max_size=2
)
RANDOM = st.tuples(WRITES, words(1, Word.FOLLOW, Word.FREEZE), OF_HEADS)


def made(writes, norm, of_heads):
    """A program of words of writes, of the norm, and of some layers' heads."""
    asked = from_words(CONFIG, writes + norm)
    for layer, heads in of_heads.items():
        asked.heads[layer] = heads
        asked.writes[layer, ATTN] = Word.FOLLOW
    return checked(CONFIG, asked)


@pytest.mark.parametrize("block", BLOCKS)
@settings(max_examples=5, phases=[Phase.explicit, Phase.generate])  # a smaller program would take minutes to find
@given(st.lists(RANDOM, min_size=PROGRAMS, max_size=PROGRAMS))
def test_random_programs_are_the_plain_loop(block, drawn):
    asked = [made(*one) for one in drawn]
    found, of_heads = run(block, asked)
    values = functools.partial(value, CONFIG)
    for text, which in np.ndindex(len(TEXTS), PROGRAMS):
        expected = plain(block, text, asked[which], values)
        row = {name: getattr(found, name)[text, which] for name in Plain._fields if name != "head_changes"}
        row["head_changes"] = of_heads[text, which]
        for name, number in row.items():
            np.testing.assert_allclose(number, getattr(expected, name), atol=1e-5, rtol=1e-5, err_msg=name)
        followed = np.where(asked[which].writes == Word.PROBE, 0, row["compensation"]).sum()
        identity = row["direct_effect"] - followed - row["norm_compensation"]
        np.testing.assert_allclose(expected.total_effect, identity, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(found.residual[text, which], 0, atol=1e-5)
        by_whole = ~asked[which].by_heads
        of_writes = row["compensation"][by_whole, ATTN]
        np.testing.assert_allclose(row["head_changes"][by_whole].sum(axis=1), of_writes, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_component_whose_downstream_is_held_has_its_direct_effect_alone(block):
    """Held by FREEZE or by PROBE: what is probed is recorded and moves nothing."""
    every = [
        [program(CONFIG, clamp=[component], rest=rest) for component in (*COMPONENTS, Component(1, ATTN, 2))]
        for rest in (Word.FREEZE, Word.PROBE, Word.FOLLOW)
    ]
    (frozen, _), (probed, _), (followed, _) = (run(block, asked) for asked in every)
    direct = frozen.direct_effect - frozen.norm_compensation
    np.testing.assert_allclose(frozen.total_effect, direct, atol=1e-5)
    assert np.abs(frozen.direct_effect).min() > 1e-3
    np.testing.assert_allclose(frozen.compensation, 0, atol=1e-5)
    for name in ("total_effect", "direct_effect", "norm_compensation"):
        np.testing.assert_allclose(getattr(probed, name), getattr(frozen, name), atol=1e-6, rtol=1e-6)
    assert (np.abs(probed.attn_compensation) + np.abs(probed.mlp_compensation) < 1e-5).all()
    living = np.stack([one.living(toy_models.block(block).config.parallel) for one in every[1]])
    np.testing.assert_array_equal((probed.compensation != 0).any(axis=0), living)
    assert (np.abs(probed.compensation[:, living]) > 1e-4).mean() > 0.9
    assert (np.abs(followed.total_effect - frozen.total_effect)[:, :5] > 1e-3).any(axis=0).all()


@pytest.mark.parametrize("block", BLOCKS)
def test_a_program_without_clamps_is_the_clean_run(block):
    asked = [
        program(CONFIG),
        program(CONFIG, rest=Word.FREEZE),
        program(CONFIG, rest=Word.PROBE),
        program(CONFIG, freeze=["norm"]),
        program(CONFIG, freeze=["attn 1.0", "attn 1.3", "mlp 2"], probe=["attn 3"]),
        from_words(CONFIG, [0] * 9),
    ]
    found, of_heads = run(block, asked)
    for recorded in (found.direct_effect, found.compensation, of_heads):
        np.testing.assert_array_equal(recorded, 0)
    # Read of the same stream, but in another order of sums.
    np.testing.assert_allclose([found.total_effect, found.norm_compensation, found.residual], 0, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_clamp_to_the_clean_write_has_no_effect(block):
    writes, mixed = programs.clean_runs(toy_models.block(block), TEXTS, ENDS)

    def clean(component):
        if component.head == WHOLE:
            return writes[:, :, component.layer, component.site]
        return mixed[:, :, component.layer, component.head]

    asked = [program(CONFIG, clamp=[component]) for component in COMPONENTS[::3]]
    asked += [program(CONFIG, clamp=["attn 0.1", "attn 2.3"]), program(CONFIG, clamp=["attn 0", "mlp 1", "attn 2.0"])]
    jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf, 0, atol=1e-5), run(block, asked, clean))


@pytest.mark.parametrize("block", few(["llama 3", "pythia", "mistral"], "mistral"))
def test_every_reading_of_a_text_is_that_of_a_text_cut_there(block):
    """One walk of 24 readings, and one of 24 texts that go on with other tokens after theirs."""
    length, params = 24, toy_models.block(block)
    text = np.asarray(toy_models.tokens(length, 3))[None]
    places = np.arange(length)
    others = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (length, length), np.int32)
    cut = np.where(places <= places[:, None], text, others)
    targets = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (1, length, 1), np.int32)
    read = Contrast(targets, np.ones(targets.shape, np.float32))
    asked = [
        program(CONFIG, clamp=["attn 0"]),
        program(CONFIG, clamp=["mlp 1", "attn 2.1"], freeze=["mlp 2"]),
        program(CONFIG, clamp=["attn 1"], rest=Word.PROBE),
        program(CONFIG, clamp=["attn 0.2", "attn 0.3"], freeze=["norm", "attn 3.0"]),
    ]

    def values(texts, component):
        return np.repeat(value(CONFIG, component)[:1].repeat(2, axis=1) * [[[1], [-2]]], texts, axis=0).astype("f")

    one, many = (
        programs.run(params, tokens, where, asked, contrasts, functools.partial(values, len(tokens)), 2, at_once=64)
        for tokens, where, contrasts in (
            (text, places[None], read),
            (cut, places[:, None], jax.tree.map(lambda leaf: np.swapaxes(leaf, 0, 1), read)),
        )
    )
    # [1, G, Q, R] and [Q, G, 1, R]
    for found, expected in ((one.effects, many.effects), (one.head_changes, many.head_changes)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, np.swapaxes(b, 0, 2), atol=1e-5, rtol=1e-5), found, expected
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, np.swapaxes(b, 0, 1), atol=1e-5, rtol=1e-5),
        one.reading,
        many.reading,
    )
    assert np.abs(one.effects.total_effect).min(axis=(0, 2, 3)).min() > 1e-5
    assert np.abs(np.diff(one.effects.total_effect, axis=2)).min() > 1e-6


REFUSED = {
    "too few words": ([0] * 8, "has 8 words, a model of 4 layers has 9"),
    "too many words": ([0] * 10, "has 10 words, a model of 4 layers has 9"),
    "no words": ([], "has 0 words, a model of 4 layers has 9"),
    "an unknown word": ([0, 0, 0, 4, *[0] * 5], r"mlp 1 has the word 4; give one of 0 \(FOLLOW\), 1 \(CLAMP\), 2 \(FR"),
    "a negative word": ([*[0] * 4, -1, *[0] * 4], "attn 2 has the word -1; give"),
    "a huge word": ([10**30, *[0] * 8], "attn 0 has the word 1000"),
    "an unknown word of the norm": ([*[0] * 8, 1], r"norm has the word 1; give one of 0 \(FOLLOW\), 2 \(FREEZE\)$"),
}
"""Words, and what is said of them."""
REFUSED_NAMES = {
    "twice the same": (dict(clamp=["attn 1", "attn 1"]), "attn 1 is named twice; name it once"),
    "twice the same, as text and not": (dict(clamp=["mlp 1", Component(1, 1)]), "mlp 1 is named twice"),
    "two words": (dict(clamp="attn 1", freeze="attn 1"), "attn 1 is named twice"),
    "two words, of a head": (dict(clamp="attn 1.2", freeze="attn 1.2"), r"attn 1\.2 is named twice"),
    "twice the norm": (dict(freeze=["norm", "norm"]), "norm is named twice"),
    "a head beside the whole": (dict(clamp=["attn 1", "attn 1.0"]), "attn 1 and some of its heads are named; name the"),
    "a head before the whole": (dict(clamp=["attn 1.0"], probe=["attn 1"]), "attn 1 and some of its heads are named"),
    "a head beside the whole that follows": (dict(clamp=["attn 1.0"], follow=["attn 1"]), "attn 1 and some of its"),
    "a head that is probed": (
        dict(probe=["attn 1.0"]),
        r"attn 1\.0 is a head, which can be clamped or frozen, not PROBE",
    ),
    "a head that follows": (
        dict(follow="attn 1.0"),
        r"attn 1\.0 is a head, which can be clamped or frozen, not FOLLOW",
    ),
    "a norm that is clamped": (dict(clamp=["norm"]), "the norm can be frozen or follow, not CLAMP"),
    "a norm that is probed": (dict(probe="norm"), "the norm can be frozen or follow, not PROBE"),
    "no such layer": (dict(clamp=["attn 4"]), "component attn 4: the model has layers 0-3, and heads 0-3 of attention"),
    "no such head": (dict(freeze=["attn 1.4"]), r"component attn 1\.4: the model has layers 0-3, and heads 0-3"),
    "a layer before the first": (dict(clamp=[Component(-5, 0)]), "component attn -5: the model has layers 0-3"),
    "a head of an MLP": (dict(clamp=[Component(1, 1, 2)]), r"component mlp 1\.2: the model has layers"),
    "no component": (dict(clamp=["resid 3"]), r"component 'resid 3': is not a component; give e\.g\. 'attn 23'"),
    "letters of a name": (dict(clamp=list("mlp 1")), "component 'm': is not a component; give"),
}


def assert_refused(message, make):
    with pytest.raises(UserError, match=message) as raised:
        make()
    text = str(raised.value)
    assert len(text) < 250
    assert "\n" not in text


@pytest.mark.parametrize("case", REFUSED)
def test_words_that_are_none_are_refused(case):
    words, message = REFUSED[case]
    assert_refused(message, lambda: from_words(CONFIG, words))


@pytest.mark.parametrize("case", REFUSED_NAMES)
def test_names_that_make_no_program_are_refused(case):
    names, message = REFUSED_NAMES[case]
    assert_refused(message, lambda: program(CONFIG, **names))


@pytest.mark.parametrize("word", [1.0, "CLAMP", True, None, [1]], ids=repr)
def test_a_word_of_another_type_is_refused(word):
    """By the function itself, whose annotation the tests check before it."""
    assert_refused(
        "attn 1 has the word .*; give one of 0", lambda: inspect.unwrap(from_words)(CONFIG, [0, 0, word, *[0] * 6])
    )


def test_a_program_of_another_model_is_refused():
    other = program(toy_models.config(layers=3), clamp=["attn 1"])
    assert_refused(
        "is of another shape than the model's 4 layers; make it for this model", lambda: checked(CONFIG, other)
    )


@pytest.mark.parametrize(
    ("place", "word", "message"),
    [
        (("writes", (3, 1)), 9, "mlp 3 has the word 9"),
        (
            ("heads", (2, 1)),
            Word.PROBE,
            r"attn 2\.1 has the word 3; give one of 0 \(FOLLOW\), 1 \(CLAMP\), 2 \(FREEZE\)$",
        ),
        (("norm", ()), Word.PROBE, "norm has the word 3"),
        (("writes", (1, 0)), Word.FREEZE, "attn 1 and some of its heads are named"),
    ],
)
def test_programs_made_by_hand_are_checked(place, word, message):
    asked = program(CONFIG, clamp=["attn 1.0"])
    getattr(asked, place[0])[place[1]] = word
    assert_refused(message, lambda: checked(CONFIG, asked))


def test_words_in_forward_order_are_those_that_names_make():
    words = [0, 1, 2, 3, 0, 0, 1, 3, 2]
    named = program(CONFIG, clamp=["mlp 0", "attn 3"], freeze=["norm", "attn 1"], probe=["mlp 1", Component(3, 1)])
    jax.tree.map(np.testing.assert_array_equal, from_words(CONFIG, words), named)
    rest = program(CONFIG, clamp=["mlp 0", "attn 2.3"], follow=["attn 3", "norm"], rest=Word.FREEZE)
    heads = np.zeros((LAYERS, HEADS))
    heads[2, 3] = Word.CLAMP
    expected = Program(np.array([[2, 1], [2, 2], [0, 2], [0, 2]]), heads, np.array(0))
    jax.tree.map(np.testing.assert_array_equal, rest, expected)
