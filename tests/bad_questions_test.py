"""Questions that no sweep can answer: each is refused in a line that names the argument, and leaves nothing behind."""

import re

import numpy as np
import pandas as pd
import pytest

import hydra_jax as hj
from hydra_jax.config import sweep_config
from hydra_jax.core.edits import Component
from hydra_jax.errors import UserError
from hydra_jax.sweep.protocol import Given, protocol
from tests.helpers import questions
from tests.helpers.questions import RECORDS, TEXTS

TWO = ["attn 1", "mlp 2"]
EVERYTHING = [f"layer {number}" for number in range(4)]
NO_NAME = "is no name, nor a list of names; give e.g. 'attn 23'"
NOT_ONE = "is not a component; give e.g. 'attn 23'"

REFUSED = {
    # What is read.
    "a target of two tokens": (dict(target="w1 w2"), "target: 'w1 w2' is 2 tokens of tiny"),
    "no token": (dict(target="Paris"), "target: 'Paris' is no token of tiny; give one token, as in ' Paris', or an id"),
    "an empty target": (dict(target=""), "target: '' is no token"),
    "a word for foils": (dict(target="foil"), "target: 'foil' is no token"),
    "an id past the vocabulary": (dict(target=61), "target: 61 is no token of tiny; give an id from 0 to 60"),
    "a negative id": (dict(foil=-1), "foil: -1 is no token of tiny; give an id from 0 to 60"),
    "a target that is a switch": (dict(target=True), "target: True is no token"),
    "a number with a point": (dict(target=[1.0, 2, 3, 4, 5, 6]), "target: 1.0 is no token"),
    "a target too few": (dict(target=["w1", "w2"]), "target: is 2 of them for 6 prompts; give one for all, or one"),
    "foils too many": (dict(foil=[1] * 7), "foil: is 7 of them for 6 prompts; give one for all, or one for each"),
    "the target as its foil": (dict(target="w1", foil="w1"), "has 'w1' as target and foil; give it two tokens that"),
    "one of the targets as its foil": (
        dict(target=[1, 2, 3, 4, 5, 6], foil=[2, 3, 4, 5, 6, "w6"]),
        "foil: prompt 'w2 w7 w1 w8 w2' has 'w6' as target and foil",
    ),
    "answers that are not there": (dict(target="answer"), "target: prompt 'w1 w5 w3' has no answer to read; give it"),
    "an answer as a foil that is not there": (dict(foil="answer"), "foil: prompt 'w1 w5 w3' has no answer to read"),
    "foils that are not there": (dict(foil="foil"), "foil: prompt 'w1 w5 w3' has no foil of its own; give it one"),
    "an answer after the last token": (dict(target="answer", positions="all"), "target: prompt 'w1 w5 w3@2' has no"),
    "a metric": (dict(metrics=["kl", "ranks"]), "metrics: 'ranks' is unknown; did you mean 'rank'?"),
    "metrics of no kind": (dict(metrics=3), "metrics: is 3; give names, or a list of them"),
    "responders": (dict(responders="neurons"), "responders: 'neurons' is unknown; give one of layers, heads"),
    "responders of no kind": (dict(responders=True), "responders: True is not of type str"),
    # What is ablated, and what is frozen.
    "twice in a set": (dict(components=[["attn 1", "attn 1"]]), "components: attn 1 is named twice in 'attn 1 + attn"),
    "twice as a text": (dict(components="mlp 0, attn 1+attn 1"), "components: attn 1 is named twice in"),
    "a head in its attention": (dict(components=[["attn 1.2", "attn 1"]]), "components: attn 1 is named twice in"),
    "an entry twice": (dict(components=["attn 1", "attn 1"]), "components: attn 1 is named twice; name it once"),
    "an entry from either end": (dict(components=["attn -1", "attn 3"]), "components: attn 3 is named twice"),
    "a set twice": (dict(components=[TWO, TWO[::-1]]), "components: attn 1 + mlp 2 is named twice; name it once"),
    "a layer and its writes": (dict(components=["layer 3", ["attn 3", "mlp 3"]]), "components: layer 3 is named twice"),
    "a layer with its attention": (dict(components=[["layer 3", "attn 3"]]), "components: attn 3 is named twice in"),
    "ablated and frozen": (dict(components=TWO, freeze="mlp 2"), "freeze: mlp 2 is both ablated and frozen; leave it"),
    "a head of what is frozen": (dict(components="attn 2.1", freeze="attn 2"), "freeze: attn 2.1 is both ablated and"),
    "frozen by a head": (dict(components="attn 2", freeze="attn 2.1"), "freeze: attn 2 is both ablated and frozen"),
    "frozen twice": (dict(components="attn 1", freeze=["attn 2", "layer 2"]), "freeze: attn 2 is named twice; name it"),
    "everything frozen": (dict(freeze=EVERYTHING), "freeze: freezes all that would be ablated; leave something free"),
    "frozen numbers": (dict(freeze=3), "freeze: is 3; give names, or a list of them"),
    "a layer that is not there": (dict(components="attn 4"), "component attn 4: the model has layers 0-3"),
    "a layer before the first": (dict(components="mlp -5"), "component mlp -5: the model has layers 0-3"),
    "a head that is not there": (
        dict(components="attn 3.4"),
        "component attn 3.4: the model has layers 0-3, and heads",
    ),
    "a component's head": (dict(components=Component(1, 0, 9)), "component attn 1.9: the model has layers 0-3"),
    "a site": (dict(components="resid 3"), f"component 'resid 3': {NOT_ONE}"),
    "a head of an MLP": (dict(components="mlp 3.1"), f"component 'mlp 3.1': {NOT_ONE}"),
    "the norm": (dict(components="norm"), f"component 'norm': {NOT_ONE}"),
    "a comma too many": (dict(components="attn 1,"), f"component '': {NOT_ONE}"),
    "a plus too many": (dict(components="attn 1 +"), f"component '': {NOT_ONE}"),
    "an empty set": (dict(components=[[]]), f"components: [] {NO_NAME}"),
    "a set of sets": (dict(components=[[["attn 1"]]]), f"components: [['attn 1']] {NO_NAME}"),
    "numbers": (dict(components=3), "components: is 3; give names, or a list of them"),
    "a list of numbers": (dict(components=[3]), f"components: 3 {NO_NAME}"),
    "numbers in a set": (dict(components=[["attn 1", 3]]), f"components: ['attn 1', 3] {NO_NAME}"),
    "nothing in a list": (dict(components=[None]), f"components: None {NO_NAME}"),
    "a mapping": (dict(components={"attn 1": 1}), "components: is {'attn 1': 1}; give names, or a list of them"),
    "components and sites": (dict(components="attn 1", sites="mlp"), "components: says what is ablated, and so do"),
    "components and layers": (dict(components="attn 1", layers="1"), "components: says what is ablated, and so do"),
    "pairs that overlap": (
        dict(components=["attn 1", "attn 1.2"], interactions=True),
        "interactions: attn 1 and attn 1.2 have a component in common; name others",
    ),
    "a pair that overlaps itself": (
        dict(components=["layer 1", "mlp 1"], interactions=True),
        "interactions: layer 1 and mlp 1 have a component in common",
    ),
    "fewer cuts than none": (dict(cascade=-1), "cascade: is -1; give 0 or more"),
    "cuts that are a switch": (dict(cascade=True), "cascade: True is not of type int"),
    "too many cuts": (dict(cascade=10**6), "cascade: is 1000000; give 1000 or less"),
    # Whose writes are taken.
    "no counterfactuals": (dict(paired=True), "prompt 'w1 w5 w3': has no source; give each the counterfactual text"),
    "an empty counterfactual": (dict(paired=["w1", " ", *TEXTS[:4]]), "prompt 'w3 w1 w4 w0 w5': has no source"),
    "itself as counterfactual": (dict(paired=TEXTS), "prompt 'w1 w5 w3': its source is the prompt itself; give it"),
    "counterfactuals too few": (dict(paired=["w1", "w2"]), "paired: is 2 texts for 6 prompts; give a text for each"),
    "one counterfactual": (dict(paired="w1"), "paired: is 'w1' for 6 prompts; give a text for each, or True"),
    "no counterfactual at all": (dict(paired=[]), "paired: is 0 texts for 6 prompts"),
    "neither paired nor not": (dict(paired=None), "paired: is None for 6 prompts"),
    "a number as counterfactual": (dict(paired=["w1", 1, "w1", "w1", "w1", "w1"]), "paired: 1 is no text; give a text"),
    "a long counterfactual": (dict(paired=["w1 " * 65, *["w1"] * 5]), "prompt 'w1 w5 w3 (source)': has 65 tokens"),
    "zeros of counterfactuals": (dict(paired=["w1"] * 6, kind="zero"), "paired: says whose writes are taken, a zero"),
    "means of counterfactuals": (dict(paired=["w1"] * 6, kind="mean"), "paired: says whose writes are taken, a mean"),
    "counterfactuals and sources": (
        dict(paired=["w1"] * 6, sources=["w2"]),
        "sources: are not drawn from where prompts",
    ),
    "no likeness": (dict(match="size"), "match: 'size' is unknown; give one of relation, length"),
    "a likeness of no kind": (dict(match=True), "match: True is not of type str"),
    "counterfactuals alike": (dict(match="length", paired=["w1"] * 6), "match: nothing is drawn where prompts are"),
    "zeros alike": (dict(match="length", kind="zero"), "match: says whose writes are taken, a zero ablation takes"),
    "nobody alike": (dict(match="length", replacements=3), "match: no prompt has 3 others of its length to draw from"),
    "no source alike": (
        dict(match="length", sources=["w1", "w2", "w3"]),
        "match: no prompt has 2 others of its length",
    ),
    "too few prompts": (dict(replacements=6), "prompts: 6 in the sweep, but 6 replacements need 7; give more prompts"),
    "no sources": (dict(sources=[]), "sources: there are none; give one or more, or None for the prompts themselves"),
    "sources of no kind": (dict(sources=3), "is int 3; give a text, a Prompt, a record"),
    "no replacements": (dict(replacements=0), "replacements: is 0; give 1 or more"),
    # Where.
    "past the end": (dict(positions=[3]), "prompt 'w1 w5 w3': position 3 is past its end; it has tokens 0-2"),
    "before the beginning": (dict(positions=[-4]), "prompt 'w1 w5 w3': position -4 is before its beginning; it has"),
    "a substring that is not there": (dict(positions="w15"), "prompt 'w1 w5 w3': position 'w15' is not in its text"),
    "a substring that is there twice": (dict(positions="w"), "prompt 'w1 w5 w3': position 'w' occurs 3 times in its"),
    "no places": (dict(positions=[]), "positions: are none; give 'last', 'all', a list of places, or a substring"),
    "no places in one": (dict(positions=[[0], [], *[[0]] * 4]), "positions: are none; give 'last', 'all'"),
    "places of other prompts": (dict(positions=[[0], [1]]), "positions: are given for 2 prompts of 6; give a list"),
    "a place twice": (dict(positions=[2, -1]), "positions: mean a token of prompt 'w1 w5 w3' twice; give each once"),
    "a number": (dict(positions=1.5), "positions: is 1.5; give 'last', 'all'"),
    "a place that is a switch": (dict(positions=[True]), "prompt 'w1 w5 w3': position True is no position; give an"),
    # The prompts.
    "an empty prompt": (dict(prompts=["w1", " "]), "prompts: prompt ' ' is empty; remove it or write its text"),
    "the only source": (
        dict(prompts=TEXTS[:1], sources=TEXTS[:1] * 2),
        "sources: have nothing beside prompt 'w1 w5 w3' itself to draw from; give others",
    ),
    "the only source, of a mean": (dict(prompts=TEXTS[:1], sources=TEXTS[:1], kind="mean"), "sources: have nothing"),
    "the only source, by another id": (
        dict(prompts=TEXTS[:1], sources=[{"id": "other", "prompt": TEXTS[0]}]),
        "sources: have nothing beside prompt 'w1 w5 w3'",
    ),
    "a mean over one prompt": (dict(prompts=TEXTS[:1], kind="mean"), "prompts: a mean over one prompt says nothing"),
    "a column": (
        dict(prompts=pd.DataFrame({"prompt": TEXTS, "anwser": TEXTS})),
        "prompts: column 'anwser' is unknown; did you mean answer?",
    ),
    "a switch that is a text": (dict(edges="yes"), "edges: 'yes' is not of type bool"),
}


@pytest.fixture(scope="module")
def model():
    return questions.model()


def complaint(refused):
    message = str(refused.value)
    assert "\n" not in message
    assert "config." not in message
    assert not re.search(r"\b(ablation|readout|prompts)\.[a-z]", message)
    return message


def asked(model, prompts=TEXTS, **told):
    return hj.sweep(model, prompts, **dict(replacements=2, edges=False) | told)


@pytest.mark.parametrize("case", REFUSED)
def test_a_question_is_refused_in_a_line_and_leaves_nothing(model, tmp_path, case):
    told, words = REFUSED[case]
    for where in ({}, {"workdir": tmp_path / "new" / "deeper"}, {"workdir": tmp_path}):
        with pytest.raises(UserError) as refused:
            asked(model, **told, **where)
        assert words in complaint(refused)
        assert list(tmp_path.iterdir()) == []


OF_CASCADES = {
    "no cuts": (dict(steps=0), "steps: is 0; give 1 or more"),
    "a head": (dict(start="attn 1.2"), "start: attn 1.2 is a head; give attention or an MLP, as in 'attn 1'"),
    "a layer": (dict(start="layer 1"), "component 'layer 1': is both writes of a layer; name one, as in 'attn 23'"),
    "no component": (dict(start="attn 9"), "component attn 9: the model has layers 0-3"),
    "an empty name": (dict(start=""), f"component '': {NOT_ONE}"),
    "everything frozen": (dict(freeze=EVERYTHING), "freeze: freezes all that would be ablated; leave something free"),
    "the target as its foil": (dict(target="w1", foil="w1"), "as target and foil; give it two tokens that differ"),
    "counterfactuals too few": (dict(paired=["w1"]), "paired: is 1 texts for 6 prompts; give a text for each"),
    "a place": (dict(positions=[7]), "prompt 'w1 w5 w3': position 7 is past its end; it has tokens 0-2"),
}


@pytest.mark.parametrize("case", OF_CASCADES)
def test_a_cascade_is_refused_in_a_line(model, case):
    told, words = OF_CASCADES[case]
    with pytest.raises(UserError) as refused:
        hj.cascade(model, TEXTS, **dict(replacements=2) | told)
    assert words in complaint(refused)


OF_PAIRS = {
    "none": ([], "components: are fewer than two; give a list of those to pair"),
    "one": (["attn 1"], "components: are fewer than two; give a list of those to pair"),
    "a name": ("attn 1", "components: are fewer than two; give a list of those to pair"),
    "the same": (["mlp 1", "mlp 1"], "interactions: mlp 1 and mlp 1 have a component in common; name others"),
    "a head of the other": (["attn 1", "attn 1.2"], "interactions: attn 1 and attn 1.2 have a component in common"),
    "a member of the other": ([TWO, "mlp 2"], "interactions: attn 1 + mlp 2 and mlp 2 have a component in common"),
    "no component": (["attn 1", "attn 9"], "component attn 9: the model has layers 0-3"),
    "numbers": ([1, 2], f"components: 1 {NO_NAME}"),
}


@pytest.mark.parametrize("case", OF_PAIRS)
def test_pairs_are_refused_in_a_line(model, case):
    components, words = OF_PAIRS[case]
    with pytest.raises(UserError) as refused:
        hj.interactions(model, TEXTS, components, replacements=2)
    assert words in complaint(refused)


OF_ONE = {
    "nothing": ({}, "components: say what is ablated; give a name, as in 'attn 23', or a list of names"),
    "two names": (dict(site="attn 1", components="mlp 1"), "components: say what is ablated; give a name"),
    "an empty list": (dict(site=[]), f"components: [] {NO_NAME}"),
    "several": (dict(site="attn 1, mlp 1"), "components: are 2 ablations; give one, or sweep them"),
    "sites of a list": (dict(site=["attn", "mlp"], layer=1), "site ['attn', 'mlp']: says the layer itself; give it"),
    "several tokens": (dict(site="attn 1", positions="all"), "positions: are 3 of the prompt; give one, or sweep it"),
    "several prompts": (dict(prompt=TEXTS, site="attn 1"), "prompt: is 6 prompts; give one, or sweep them"),
    "an empty counterfactual": (dict(site="attn 1", paired=""), "prompt 'w1 w5 w3': has no source"),
    "several targets": (dict(site="attn 1", target=["w1", "w2"]), "target: is 2 of them for 1 prompts"),
    "itself as a source": (dict(site="attn 1", sources=TEXTS[:1]), "sources: have nothing beside prompt 'w1 w5 w3'"),
    "ablated and frozen": (dict(site="attn 1", freeze="layer 1"), "freeze: attn 1 is both ablated and frozen"),
}


@pytest.mark.parametrize("case", OF_ONE)
def test_one_ablation_is_refused_in_a_line(model, case):
    told, words = OF_ONE[case]
    with pytest.raises(UserError) as refused:
        hj.ablate(model, **dict(prompt=TEXTS[0]) | told)
    assert words in complaint(refused)


CHANGED = {
    "components": dict(components=["mlp 2", "attn 1"]),
    "freeze": dict(freeze="norm"),
    "interactions": dict(interactions=True),
    "cascade": dict(cascade=2),
    "metrics": dict(metrics="kl"),
    "responders": dict(responders="heads"),
    "target": dict(target=[1, 2, 3, 4, 5, 6]),
    "foil": dict(foil="w9"),
    "positions": dict(positions=[0]),
    "paired": dict(paired=True),
    "match": dict(match="relation"),
}


def test_another_question_is_refused_where_one_is_answered(model, tmp_path):
    asked(model, RECORDS, components=TWO, workdir=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, told in CHANGED.items():
        with pytest.raises(
            UserError, match=rf"holds results of another protocol .*\b{name} was .*; give another"
        ) as no:
            asked(model, RECORDS, **dict(components=TWO) | told, workdir=tmp_path)
        complaint(no)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def wrong(name, call, words):
    """A question that is refused, by a name."""
    return pytest.param(call, words, id=name)


MORE_REFUSED = [
    *(
        wrong(f"components {given!r}", lambda m, w, c=given: asked(m, components=c, **w), "components: ")
        for given in ([], (), "", [""])
    ),
    wrong(
        "a comma inside a set: makes two ablations of it",
        lambda m, w: asked(m, components=[["attn 1, mlp 1", "attn 0"]], **w),
        "components: ",
    ),
    wrong("no prompts", lambda m, w: asked(m, [], kind="zero", **w), r"^prompts: (are none|there are none)"),
    wrong("no prompts, means", lambda m, w: asked(m, [], kind="mean", **w), "^prompts: "),
    wrong("no prompts, paired", lambda m, w: asked(m, [], paired=True, **w), "^prompts: "),
    wrong("no prompts, sources", lambda m, w: asked(m, [], sources=TEXTS, **w), "^prompts: "),
    wrong("no prompts, cascade", lambda m, w: hj.cascade(m, []), "^prompts: "),
    wrong("a start in a list", lambda m, w: hj.cascade(m, TEXTS, ["attn 1"]), "start: "),
    wrong("a start that is a number", lambda m, w: hj.cascade(m, TEXTS, 1), "start: "),
    wrong(
        "a start that is frozen: nothing is cut, in silence",
        lambda m, w: hj.cascade(m, TEXTS, "attn 1", freeze="layer 1", replacements=2),
        "(start|freeze): attn 1 is both",
    ),
    wrong("pairs of None", lambda m, w: hj.interactions(m, TEXTS, None), "components: "),
    wrong("pairs of a number", lambda m, w: hj.interactions(m, TEXTS, 3), "components: "),
    wrong(
        "pairs of one component: none, in silence",
        lambda m, w: asked(m, components=["attn 1"], interactions=True, **w),
        "(components|interactions): ",
    ),
    wrong("a site that is a number", lambda m, w: hj.ablate(m, TEXTS[0], 3, kind="zero"), "3"),
    wrong(
        "components beside layer and head: these two are not read",
        lambda m, w: hj.ablate(m, TEXTS[0], components="attn 1", layer=2, head=3, kind="zero"),
        "(components|layer|head)",
    ),
    wrong(
        "one prompt alike to few: speaks of prompts of a sweep",
        lambda m, w: hj.ablate(m, TEXTS[0], "attn 1", match="relation"),
        "match: ",
    ),
    wrong("a component of no site", lambda m, w: asked(m, components=Component(1, 5), **w), "component"),
    wrong(
        "counterfactuals in an array",
        lambda m, w: asked(m, paired=np.array(["w1"] * 5), **w),
        "paired: is 5 texts for 6 prompts",
    ),
    wrong("an unknown component frozen", lambda m, w: asked(m, freeze="attn 9", **w), "freeze"),
    wrong("the norm frozen twice", lambda m, w: asked(m, freeze=["norm"] * 2, **w), "^freeze: "),
    wrong("frozen beside its head", lambda m, w: asked(m, freeze=["attn 2", "attn 2.1"], **w), "^freeze: "),
    wrong("an empty source", lambda m, w: asked(m, sources=["w1", " "], **w), "^sources"),
    wrong("negative steps", lambda m, w: hj.cascade(m, TEXTS, steps=-1), "^steps: is -1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("call", "words"), MORE_REFUSED)
def test_a_question_is_refused(model, tmp_path, call, words):
    """In a line, and before anything is computed: a directory stays empty."""
    for where in ({}, {"workdir": tmp_path}):
        with pytest.raises(UserError, match=words) as refused:
            call(model, where)
        complaint(refused)
        assert list(tmp_path.iterdir()) == []


def test_another_list_of_targets_is_another_question(model):
    """However long, and whatever holds it."""
    first = np.arange(2000) % 61
    second = np.where(np.arange(2000) == 1000, 0, first)
    told = [protocol(sweep_config({}), model, [], Given(model, [], target=one)) for one in (first, second)]
    assert told[0] != told[1]


def test_other_sources_are_told_by_their_name(model, tmp_path):
    asked(model, kind="zero", sources=["w1", "w2"], workdir=tmp_path)
    with pytest.raises(UserError, match=r"another protocol .*\bsources") as refused:
        asked(model, kind="zero", sources=["w1", "w3"], workdir=tmp_path)
    complaint(refused)


def test_what_is_taken_in_memory_is_taken_in_a_directory(model, tmp_path):
    told = dict(kind="zero", components="attn 3", positions=None)
    asked(model, **told)
    asked(model, **told, workdir=tmp_path)
