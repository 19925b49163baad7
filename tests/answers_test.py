"""Answers to questions against whole forward passes, other sweeps, and sums done by hand."""

import numpy as np
import pytest

import hydra_jax as hj
from hydra_jax.core.edits import all_components
from hydra_jax.store.variables import EFFECTS
from tests.helpers import questions
from tests.helpers.questions import RECORDS, SOURCES, TEXTS, assert_same, centred, logits, writes
from tests.helpers.speed import few

METRICS = ["log_probability", "kl", "rank", "top_changed"]
SMALL = dict(replacements=2, edges=False)
BLOCKS = few(["llama 3", "gpt-2", "pythia", "gemma 2"], "llama 3")


@pytest.fixture(scope="module")
def model():
    return questions.model()


def log_softmax(row):
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


def assert_read(one, clean, cut, target, foil=None, capped=False):
    """Effects, of logits that are not capped, and metrics of one replacement are those of two rows of logits."""
    drop = centred(clean)[target] - centred(cut)[target]
    if foil is not None:
        drop = clean[target] - clean[foil] - cut[target] + cut[foil]
    if not capped:
        np.testing.assert_allclose(one["total_effect"], drop, atol=2e-5)
    before, after = log_softmax(clean), log_softmax(cut)
    np.testing.assert_allclose(one["log_probability_drop"], before[target] - after[target], atol=2e-5)
    np.testing.assert_allclose(one["kl"], (np.exp(before) * (before - after)).sum(), atol=2e-5)
    assert one["target_rank"] == (cut > cut[target]).sum()
    assert one["top_changed"] == (clean.argmax() != cut.argmax())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("foil", few(["w7", ""], ""))
def test_effects_and_metrics_are_those_of_forward_passes(block, foil):
    """In which a set is zero, and what is frozen writes what it does in the clean run."""
    made = questions.model(block)
    told = dict(components=[["attn 1", "mlp 2"], "layer 0"], kind="zero", metrics=METRICS, edges=False, target="w3")
    free, held = (hj.sweep(made, TEXTS, **told, foil=foil, freeze=freeze) for freeze in (None, ["attn 2", "mlp 3"]))
    nothing = np.zeros(made.config.width)
    for number, text in enumerate(TEXTS):
        clean, own = logits(made, text), writes(made, text)
        for place, names in enumerate((["attn 1", "mlp 2"], ["attn 0", "mlp 0"])):
            cut = dict.fromkeys(names, nothing)
            kept = {name: own[name] for name in ("attn 2", "mlp 3")}
            for found, values in ((free, cut), (held, cut | kept)):
                one = found.isel(prompt=number, ablated=place, replacement=0)
                assert_read(one, clean, logits(made, text, values), 3, 7 if foil else None, block == "gemma 2")


@pytest.mark.parametrize("block", BLOCKS)
def test_a_counterfactuals_writes_are_its_own(block):
    made = questions.model(block)
    told = dict(components=[["attn 0", "mlp 2"], "mlp 1"], paired=True, metrics=METRICS, edges=False)
    found = hj.sweep(made, RECORDS, **told, target="w3", foil="")
    assert found.sizes["replacement"] == 1
    assert (found["source"] == -1).all()
    assert list(found["source_text"].values) == SOURCES
    for number, (text, source) in enumerate(zip(TEXTS, SOURCES, strict=True)):
        theirs = writes(made, source)
        for place, names in enumerate((["attn 0", "mlp 2"], ["mlp 1"])):
            cut = logits(made, text, {name: theirs[name] for name in names})
            one = found.isel(prompt=number, ablated=place, replacement=0)
            assert_read(one, logits(made, text), cut, 3, capped=block == "gemma 2")


@pytest.mark.slow
def test_a_counterfactual_is_the_only_source(model):
    told = dict(components=["attn 1.2", ["mlp 0", "attn 2"]], freeze="mlp 3", metrics=METRICS, responders="heads")
    paired = hj.sweep(model, RECORDS, paired=True, **told)
    for number, source in enumerate(SOURCES):
        alone = hj.sweep(model, [RECORDS[number]], sources=[source], replacements=1, **told)
        assert_same(alone, paired.isel(prompt=[number]), atol=1e-5, without=["source_text"])
    unnamed = [{name: value for name, value in one.items() if name != "source"} for one in RECORDS]
    assert_same(hj.sweep(model, unnamed, paired=SOURCES, **told), paired)


@pytest.mark.parametrize("match", ["relation", "length"])
def test_every_source_is_alike(model, match):
    found = hj.sweep(model, RECORDS, match=match, **SMALL, components="mlp 1")
    kinds = found["relation" if match == "relation" else "length"].values
    for number, row in enumerate(found["source"].values):
        assert number not in row
        assert len(set(row)) == 2
        assert {kinds[source] for source in row} == {kinds[number]}
    others = [
        {"id": f"q{n}", "prompt": text, "relation": "xy"[n]} for n, text in enumerate(["w9 w9 w8", "w9 w8 w8 w9 w7"])
    ]
    matched = hj.sweep(model, RECORDS, match=match, sources=others, replacements=1, edges=False, components="mlp 1")
    for number, kind in enumerate(kinds):
        source = others[int(kind in ("y", 5))]
        one = hj.sweep(model, [RECORDS[number]], sources=[source], replacements=1, edges=False, components="mlp 1")
        np.testing.assert_allclose(one["total_effect"][0], matched["total_effect"][number], atol=1e-5)


def test_few_alike_are_left_out(model, capsys):
    texts = [*TEXTS, "w9 w9"]
    found = hj.sweep(model, texts, match="length", **SMALL, components="mlp 1")
    assert list(found["text"].values) == TEXTS
    assert "1 of 7 prompts have too few others of their length to draw 2 replacements from" in capsys.readouterr().err


@pytest.mark.slow
def test_of_few_sources_each_is_used_once(model):
    told = dict(components="mlp 1", edges=False)
    sources = SOURCES[:3]
    found = hj.sweep(model, RECORDS, sources=sources, **told)
    assert found.sizes["replacement"] == 3
    each = [hj.sweep(model, RECORDS, sources=[one], **told)["total_effect"].values for one in sources]
    ordered = np.sort(np.concatenate(each, axis=2), axis=2)
    np.testing.assert_allclose(np.sort(found["total_effect"].values, axis=2), ordered, atol=1e-5)
    # A prompt among them is not its own source, and so all have one less.
    assert hj.sweep(model, RECORDS, sources=[*sources, TEXTS[0]], **told).sizes["replacement"] == 3
    assert hj.sweep(model, RECORDS, sources=[*sources, sources[0]], **told).sizes["replacement"] == 3
    assert hj.sweep(model, RECORDS, sources=sources, replacements=2, **told).sizes["replacement"] == 2


def test_a_mean_over_sources_leaves_the_prompt_itself_out(model):
    told = dict(components="mlp 1", kind="mean", edges=False, target="w3", foil="")
    theirs = {text: writes(model, text)["mlp 1"] for text in TEXTS}
    for sources, left_out in ((TEXTS, True), (None, False)):
        found = hj.sweep(model, RECORDS, sources=sources, **told)["total_effect"].values.ravel()
        for number, text in enumerate(TEXTS):
            mean = np.mean([theirs[other] for other in TEXTS if other != text or not left_out], axis=0)
            cut = logits(model, text, {"mlp 1": mean})
            drop = centred(logits(model, text))[3] - centred(cut)[3]
            np.testing.assert_allclose(found[number], drop, atol=1e-5)


EVERY = [(number, place) for number, text in enumerate(TEXTS) for place in range(len(text.split()))]


@pytest.mark.slow
@pytest.mark.parametrize("told", [dict(kind="zero"), dict(sources=SOURCES[:1]), dict(kind="mean", sources=SOURCES)])
def test_every_token_is_the_text_cut_there(model, told):
    told = dict(components=["attn 1", ["mlp 2", "attn 0.3"]], freeze="norm", metrics=METRICS, edges=False) | told
    found = hj.sweep(model, TEXTS, positions="all", **told)
    assert list(zip(found["text_id"].values, found["position"].values, strict=True)) == [
        (TEXTS[number], place) for number, place in EVERY
    ]
    ids = [questions.tokens(TEXTS[number])[: place + 1] for number, place in EVERY]
    assert list(found["token_text"].values) == [f"w{one[-1]}" for one in ids]
    assert list(found["length"].values) == [len(one) for one in ids]
    unique = list(dict.fromkeys(map(tuple, ids)))
    cut = hj.sweep(model, [list(one) for one in unique], **told)
    there = cut.isel(prompt=[unique.index(tuple(one)) for one in ids])
    for name in (*EFFECTS, "compensation", "clean_logit", "kl", "target_rank", "target_id", "free_total_effect"):
        np.testing.assert_allclose(found[name], there[name], atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_places_are_spelt_in_many_ways(model):
    """From either end, as a part of the text, for all texts and for each."""
    told = dict(components=["attn 1", "mlp 2"], kind="zero", edges=False)
    every = hj.sweep(model, TEXTS, positions="all", **told)
    for positions, places in (
        ([0, -1], [[0, len(text.split()) - 1] for text in TEXTS]),
        ([-2], [[len(text.split()) - 2] for text in TEXTS]),
        ("w1", None),
        ([["w3"], ["w3", "w5"], [2], [0], ["w6 w2"], [-5, 4]], [[2], [0, 4], [2], [0], [1], [0, 4]]),
    ):
        texts = TEXTS
        if places is None:
            texts = [text for text in TEXTS if "w1" in text.split()]
            places = [[text.split().index("w1")] for text in texts]
        found = hj.sweep(model, texts, positions=positions, **told)
        expected = [(text, place) for text, several in zip(texts, places, strict=True) for place in several]
        assert list(zip(found["text_id"].values, found["position"].values, strict=True)) == expected
        indices = [EVERY.index((TEXTS.index(text), place)) for text, place in expected]
        for name in ("total_effect", "compensation", "target_id"):
            np.testing.assert_allclose(found[name], every[name].isel(prompt=indices), atol=1e-5, err_msg=name)
    own = [{"prompt": text, "position": 0} for text in TEXTS]
    first = hj.sweep(model, own, **told)
    np.testing.assert_allclose(first["total_effect"], hj.sweep(model, TEXTS, positions=[0], **told)["total_effect"])


def test_before_the_last_token_the_next_one_is_the_answer(model):
    found = hj.sweep(model, RECORDS, positions="all", target="answer", foil="", kind="zero", edges=False)
    following = [[*questions.tokens(text)[1:], 3] for text in TEXTS]
    assert list(found["target_id"].values) == [following[number][place] for number, place in EVERY]


@pytest.mark.slow
def test_no_source_of_a_token_is_another_of_its_text(model):
    found = hj.sweep(model, RECORDS, positions="all", replacements=15, edges=False, components="mlp 1")
    texts = found["text_id"].values
    assert (texts[found["source"].values] != texts[:, None]).all()
    assert all(len(set(row)) == 15 for row in found["source"].values)
    again = [*RECORDS, {"id": "again", "prompt": TEXTS[0]}]
    drawn = hj.sweep(model, again, replacements=5, edges=False, components="mlp 1")
    words = drawn["text"].values
    assert (words[drawn["source"].values] != words[:, None]).all()


CASCADES = {
    "plain": {},
    "frozen": dict(freeze=["mlp 3", "attn 2", "norm"]),
    "a head is frozen": dict(freeze="attn 2.1"),
    "begun": dict(start="attn 1"),
    "begun before what is frozen": dict(start="mlp 0", freeze="layer 3"),
    "paired": dict(paired=True),
    "zero, without a foil": dict(kind="zero", foil=""),
    "everywhere": dict(positions=[0, -1]),
}


@pytest.mark.parametrize("case", few(CASCADES, "frozen"))
def test_each_cut_is_of_what_repaired_most(model, case):
    told = dict(replacements=2) | CASCADES[case]
    found = hj.cascade(model, RECORDS, steps=9, **told)
    start, names = told.pop("start", None), [str(one) for one in all_components(4)]
    assert found.sizes["ablated"] == 0
    held = [names.index(name) for name in names if _frozen(name, told.get("freeze", ()))]
    for number in range(found.sizes["prompt"]):
        one = found.isel(prompt=number)
        rising, cuts = np.array(one["delta_unembed"].values), []
        rising[1::2] = -np.inf  # an MLP is not the first
        for step, cut in enumerate(one["cut_component"].values.tolist()):
            rising = np.array(rising)
            rising[held] = -np.inf
            if cut < 0:
                assert rising.max() <= 0
                for name in ("cut_logit", "cut_probability", "cut_rank", "cut_compensation"):
                    assert one[name][step:].isnull().all()
                assert set(one["cut_component"].values[step:].tolist()) == {-1}
                assert set(one["cut_name"].values[step:]) == {""}
                break
            assert cut == (names.index(start) if start and not step else rising.argmax())
            assert one["cut_name"][step] == names[cut]
            assert cut not in cuts
            cuts.append(cut)
            rising = one["cut_compensation"].values[step]
        assert 0 < len(cuts) < 9
        sets = [[names[cut] for cut in cuts[: step + 1]] for step in range(len(cuts))]
        swept = hj.sweep(model, RECORDS, components=sets, edges=False, metrics=METRICS, **told).isel(prompt=number)
        assert swept["prompt_id"] == one["prompt_id"]
        for name in ("clean_logit", "clean_probability", "delta_unembed"):
            np.testing.assert_allclose(one[name], swept[name], atol=1e-5)
        some = one.isel(cut=slice(len(cuts)))
        np.testing.assert_allclose(some["cut_logit"], swept["clean_logit"] - swept["total_effect"], atol=2e-5)
        probability = swept["clean_probability"] * np.exp(-swept["log_probability_drop"])
        np.testing.assert_allclose(some["cut_probability"], probability, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(some["cut_rank"], swept["target_rank"])
        np.testing.assert_allclose(some["cut_compensation"], swept["compensation"], atol=2e-5)
        kept = [(some["cut_rank"].values[step] == 0).mean() > 1 / 2 for step in range(len(cuts))]
        assert one["survived"] == [*kept, False].index(False)
    beside = hj.sweep(model, RECORDS, components="attn 1.2", cascade=9, edges=False, **told)
    if start is None and "attn 1.2" not in told.get("freeze", ()):
        for name in ("cut_component", "cut_logit", "cut_rank", "cut_compensation"):
            np.testing.assert_allclose(beside[name], found[name], atol=1e-5, err_msg=name)


def test_a_counterfactual_is_read_where_its_prompt_is_asked_about(model):
    """As it is where the prompt says the place itself."""
    told = dict(paired=["w9 w8 w2 w4"], components="mlp 1", edges=False)
    asked = hj.sweep(model, TEXTS[:1], positions=[1], **told)
    own = hj.sweep(model, [{"prompt": TEXTS[0], "position": 1}], **told)
    np.testing.assert_allclose(asked["total_effect"], own["total_effect"], atol=1e-5)


def test_the_answer_is_the_same_however_the_place_is_spelt(model):
    told = dict(target="answer", foil="", kind="zero", components="mlp 1", edges=False)
    by_part, by_number = (hj.sweep(model, RECORDS[3:4], positions=place, **told) for place in ("w8", [1]))
    assert by_part["position"] == by_number["position"]
    assert by_part["target_text"] == by_number["target_text"]


def _frozen(name, freeze):
    """Whether a write, or a head of it, is among what is frozen."""
    given = [freeze] if isinstance(freeze, str) else freeze
    both = {f"{site} {one.split()[1]}" for one in given if one.startswith("layer") for site in ("attn", "mlp")}
    return name in both | {one.split(".")[0] for one in given}


@pytest.mark.slow
@pytest.mark.parametrize("told", few([{}, dict(paired=True), dict(positions="all", freeze="mlp 3")]))
def test_interactions_are_the_joint_effect_less_both(model, told):
    components = ["attn 1", ["mlp 0", "attn 2.1"], "attn 3.2", "mlp 2"]
    told = SMALL | told
    found = hj.interactions(model, RECORDS, components, responders="heads", **told)
    single = hj.sweep(model, RECORDS, components=components, responders="heads", **told)
    names = list(single["ablated_name"].values)
    assert list(found["first"].values) == list(found["second"].values) == names
    assert list(found["prompt_id"].values) == list(single["prompt_id"].values)
    alone = single["total_effect"].values
    for first in range(4):
        np.testing.assert_allclose(found["single_effect"][:, first], alone[:, first], atol=1e-5)
        for second in range(4):
            pair = found.isel(first=first, second=second)
            if first == second:
                assert pair["interaction"].isnull().all()
                continue
            joint = hj.sweep(model, RECORDS, components=[f"{names[first]} + {names[second]}"], **told)
            together = joint["total_effect"].values[:, 0]
            np.testing.assert_allclose(pair["joint_effect"], together, atol=1e-5)
            np.testing.assert_allclose(pair["interaction"], together - alone[:, first] - alone[:, second], atol=2e-5)
            np.testing.assert_allclose(pair["effect_after"], together - alone[:, first], atol=2e-5)
    woken = found["woken"].sel(first="attn 1")
    np.testing.assert_allclose(woken.sel(second="mlp 2"), single["compensation"][:, 0, 5], atol=1e-5)
    np.testing.assert_allclose(woken.sel(second="attn 3.2"), single["head_compensation"][:, 0, 3, 2], atol=1e-5)


@pytest.mark.slow
def test_a_source_that_is_not_swept_itself_is_drawn_from(model):
    """Whether the model answers it right or not, and wherever the prompt of the same text is read."""
    told = dict(components="mlp 1", edges=False, replacements=1)
    tops = hj.sweep(model, TEXTS, kind="zero", **told)["target_text"].values
    records = [one | {"answer": tops[number] if number % 2 else "w9"} for number, one in enumerate(RECORDS)]
    for more in (dict(correct_only=True), dict(positions=[1])):
        some = hj.sweep(model, records, sources=[one["prompt"] for one in RECORDS], **told, **more)
        where = {name: value for name, value in more.items() if name == "positions"}
        for number in range(some.sizes["prompt"]):
            one = some.isel(prompt=number)
            (record,) = (record for record in records if record["id"] == one["prompt_id"])
            others = [text for text in TEXTS if text != record["prompt"]]
            every = [hj.ablate(model, record, "mlp 1", replacements=1, sources=[text], **where) for text in others]
            differences = [abs(float(each["total_effect"][0] - one["total_effect"].values.item())) for each in every]
            assert min(differences) < 1e-5
