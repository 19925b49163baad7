"""Programs against PyTorch: whole passes of `transformers` models whose hooks set the last token's writes and heads."""

import functools

import numpy as np
import pytest

from hydra_jax.core.edits import WHOLE, Kind
from hydra_jax.core.programs import Word, program
from hydra_jax.models.transformer import Contrast
from hydra_jax.text.tokenizer import encode
from hydra_jax.weights.load import load

pytest.importorskip("torch", reason="tests/parity/requirements.txt is not installed")
pytest.importorskip("transformers", reason="tests/parity/requirements.txt is not installed")

from tests.helpers import families, hooks, programs

TEXTS = [list(range(5, 60, 4)), list(range(40, 13, -3)), list(range(100, 177, 7))]
TARGETS, FOILS = np.array([7, 120, 33]), np.array([201, 8, 55])
PROGRAMS = {
    "one": dict(clamp=["attn 0"]),
    "two": dict(clamp=["attn 1", "mlp 2"]),
    "five": dict(clamp=["attn 0", "mlp 0", "attn 1", "mlp 2", "attn 3"]),
    "heads of two layers": dict(clamp=["attn 1.0", "attn 1.3", "attn 2.1"]),
    "heads and writes": dict(clamp=["mlp 0", "attn 1.2", "mlp 2"], freeze=["attn 1.1", "attn 3.0", "norm"]),
    "what if": dict(clamp=["attn 1"], freeze=["mlp 2"]),
    "a path": dict(clamp=["attn 0"], freeze=["mlp 0", "attn 1", "mlp 1", "attn 2"]),
    "direct edges": dict(clamp=["attn 0"], rest=Word.PROBE),
    "direct edges of a head": dict(clamp=["attn 1.2"], rest=Word.PROBE),
    "one edge": dict(clamp=["mlp 0"], probe=["attn 2"], freeze=["attn 3.1"]),
    "a frozen norm": dict(clamp=["mlp 1"], freeze=["norm"]),
    "the last": dict(clamp=["mlp 3"]),
}
TOLERANCE = 2e-5
"""In logits; differences were at most 3e-6."""
REAL_TOLERANCE = 1e-3
"""In logits, of which some programs move 20; differences were at most 1.2e-4."""

REAL_TEXTS = {
    "The Eiffel Tower is located in the city of": " Paris",
    "The mother tongue of Danielle Darrieux is": " French",
}
KNOWN = {
    "attention 23": (dict(clamp=["attn 23"]), -0.36),
    "where mlp 29 could not repair": (dict(clamp=["attn 23"], freeze=["mlp 29"]), 3.51),
    "where none of three could": (dict(clamp=["attn 23"], freeze=["attn 24", "attn 29", "mlp 29"]), 9.88),
}
"""Programs that clamp to zero on SmolLM2-135M, and how far " Paris" drops by other hooks than these."""
REAL = {
    "heads": dict(clamp=["attn 20.3", "attn 23.1", "attn 23.8"], freeze=["attn 26.2", "norm"]),
    "five": dict(clamp=["mlp 0", "attn 12", "mlp 20", "attn 23", "mlp 28"]),
    "a path": dict(clamp=["attn 23"], follow=["mlp 29"], rest=Word.FREEZE),
    "direct edges": dict(clamp=["attn 23"], rest=Word.PROBE),
}


def values_of(every, kind):
    """What clamps take, of PyTorch's clean runs alone: a function of component, text and draw."""

    def value(component, text, draw):
        of = [one.written if component.head == WHOLE else one.mixed for one in every]
        place = component.layer, (component.site if component.head == WHOLE else component.head)
        match kind:
            case Kind.ZERO:
                return np.zeros_like(of[0][place])
            case Kind.MEAN:
                return np.mean([one[place] for one in of], axis=0)
        return of[(text + 1 + draw) % len(of)][place]

    return value


def sources_of(params, tokens, places, kind):
    """What clamps take, by the engine's clean runs: a function of the component, [P, R, E], and R."""
    writes, mixed = programs.clean_runs(params, tokens, places)
    draws = len(places) - 1 if kind is Kind.RESAMPLE else 1

    def values(component):
        if component.head == WHOLE:
            of = writes[:, 0, component.layer, component.site]
        else:
            of = mixed[:, 0, component.layer, component.head]
        if kind is Kind.MEAN:
            return np.broadcast_to(of.mean(axis=0), of[:, None].shape)
        return np.stack([np.roll(of, -1 - draw, axis=0) for draw in range(draws)], axis=1)

    return values, draws


def assert_equal(found, by_hooks, tolerance):
    for name, value in found.items():
        np.testing.assert_allclose(value, getattr(by_hooks, name), atol=tolerance, rtol=1e-5, err_msg=name)


def compare(params, model, texts, asked, kind, targets, foils, tolerance):
    """Compare every row of the engine, and of `core.row.walk`, with hooks, and return those of the hooks."""
    tokens, places = programs.padded(texts)
    read = Contrast.target(targets[:, None], None if foils is None else foils[:, None])
    values, draws = sources_of(params, tokens, places, kind)
    ran = programs.run(params, tokens, places, asked, read, values, draws, kind)
    every = [hooks.watched(model, ids)[0] for ids in texts]
    value = values_of(every, kind)
    rows = {}
    for text, which, draw in np.ndindex(len(texts), len(asked), draws):
        foil = None if foils is None else foils[text]
        at = functools.partial(value, text=text, draw=draw)
        [by_hooks] = hooks.expected(model, texts[text], every[text], [(asked[which], at)], targets[text], foil)
        row = text, which, 0, draw
        found = {
            name: getattr(where, name)[row]
            for where, names in (
                (ran.effects, ("total_effect", "direct_effect", "norm_compensation", "compensation")),
                (ran.metrics, ("log_probability_drop", "kl")),
            )
            for name in names
        }
        assert_equal(found | dict(head_changes=ran.head_changes[row]), by_hooks, tolerance)
        contrast = Contrast(*(leaf[text, 0] for leaf in (read.tokens, read.weights)))
        clean = programs.clean_run(params, tokens[text], places[text, 0], contrast)
        one = programs.defined(params, clean, asked[which], at)
        names = "total_effect", "direct_effect", "norm_compensation", "compensation"
        assert_equal({name: getattr(one, name) for name in names}, by_hooks, tolerance)
        followed = np.where(asked[which].writes == Word.PROBE, 0, by_hooks.compensation).sum()
        identity = by_hooks.direct_effect - followed - by_hooks.norm_compensation
        np.testing.assert_allclose(by_hooks.total_effect, identity, atol=tolerance)
        rows[row] = by_hooks
    return rows


@pytest.fixture(scope="module", params=["llama", "gpt2", "pythia", "gemma2"])
def both(request, tmp_path_factory):
    """A family's model of ours, and that of `transformers`."""
    model = families.made(request.param)
    path = families.saved(model, tmp_path_factory.mktemp("saved"))
    return load(str(path)).params, model


@pytest.mark.parametrize(
    ("kind", "foils"), [(Kind.ZERO, None), (Kind.RESAMPLE, FOILS), (Kind.MEAN, FOILS)], ids=["zero", "resample", "mean"]
)
def test_programs_equal_hooks(both, kind, foils):
    params, model = both
    asked = [program(params.config, **words) for words in PROGRAMS.values()]
    rows = compare(params, model, TEXTS, asked, kind, TARGETS, foils, TOLERANCE)
    for which, name in enumerate(PROGRAMS):
        of_program = [row for place, row in rows.items() if place[1] == which]
        assert max(abs(row.total_effect) for row in of_program) > 0.02, name
        assert (max(np.abs(row.compensation).max() for row in of_program) > 1e-3) == (name != "the last"), name
        frozen = "norm" in PROGRAMS[name].get("freeze", ())
        assert (max(abs(row.norm_compensation) for row in of_program) > 1e-3) != frozen, name


@pytest.fixture(scope="module")
def hugging_face(smollm2):
    from hydra_jax.benchmarks.peers import llama

    return llama(smollm2.params)


@pytest.mark.parametrize("kind", [Kind.ZERO, Kind.RESAMPLE])
def test_programs_on_the_real_model_equal_hooks(smollm2, hugging_face, kind):
    texts = [encode(smollm2.tokenizer, text) for text in REAL_TEXTS]
    targets = np.array([encode(smollm2.tokenizer, target)[0] for target in REAL_TEXTS.values()])
    every = [words for words, _ in KNOWN.values()] + list(REAL.values())
    asked = [program(smollm2.config, **words) for words in every]
    rows = compare(smollm2.params, hugging_face, texts, asked, kind, targets, None, REAL_TOLERANCE)
    for which in range(len(asked)):
        assert max(abs(row.total_effect) for place, row in rows.items() if place[1] == which) > 0.1
    if kind is Kind.ZERO:
        drops = [rows[0, which, 0, 0].total_effect for which in range(len(KNOWN))]
        np.testing.assert_allclose(drops, [drop for _, drop in KNOWN.values()], atol=0.006)
