"""Sweeps of sets, with repairers frozen, foils, metrics, heads: what may change nothing, and what is the same."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hydra_jax as hj
from hydra_jax.config import MeshConfig
from hydra_jax.engine import mesh
from hydra_jax.store import effects as store
from hydra_jax.store.variables import EFFECTS
from tests.helpers import questions
from tests.helpers.questions import RECORDS, SOURCES, TEXTS, assert_same
from tests.helpers.speed import few

METRICS = ["log_probability", "kl", "rank", "top_changed"]
RICH = dict(
    components=["attn 1", ["mlp 0", "attn 2.1"], "layer 1", "attn 0.3", ["attn 0.1", "attn 0.2", "mlp 2"]],
    freeze=["mlp 3", "attn 3.2", "norm"],
    metrics=METRICS,
    responders="heads",
    replacements=2,
)
QUESTIONS = {
    "drawn": {},
    "paired": dict(paired=True),
    "alike": dict(match="relation"),
    "everywhere": dict(positions="all"),
    "of others": dict(sources=[*SOURCES, TEXTS[0]]),
    "mean": dict(kind="mean"),
    "noise": dict(kind="noise"),
    "pairs": dict(components=["attn 1", "mlp 2", "attn 2.3"], interactions=True),
    "cascade": dict(components=["attn 1"], freeze="mlp 3", cascade=3),
}
every_question = pytest.mark.parametrize("question", few(QUESTIONS, "drawn"))


@pytest.fixture(scope="module")
def model():
    return questions.model()


def asked(model, question="drawn", prompts=RECORDS, **changed):
    return hj.sweep(model, prompts, **RICH | QUESTIONS[question] | changed)


@pytest.fixture(scope="module")
def answers(model):
    """The answer to each question, computed once."""
    made = {}

    def answer(question):
        if question not in made:
            made[question] = asked(model, question)
        return made[question]

    return answer


@every_question
def test_something_is_asked(answers, question):
    found = answers(question)
    for name, variable in found.data_vars.items():
        if variable.dtype.kind == "f" and not name.startswith("cut"):
            assert np.isfinite(variable).all(), name
    assert (np.abs(found["total_effect"]).max("replacement") > 1e-4).any("prompt").all()


@every_question
@settings(max_examples=4)
@given(order=st.permutations(range(len(RECORDS))))
def test_order_of_prompts_changes_nothing_and_is_that_of_the_answer(model, answers, question, order):
    found = asked(model, question, [RECORDS[n] for n in order])
    assert_same(found, answers(question))
    assert list(dict.fromkeys(found["text_id"].values)) == [f"p{n}" for n in order]
    if question == "everywhere":
        lengths = [len(TEXTS[n].split()) for n in order]
        assert found["position"].values.tolist() == [place for length in lengths for place in range(length)]


@every_question
@settings(max_examples=4)
@given(random=st.randoms(use_true_random=False))
def test_order_of_components_changes_nothing_and_is_that_of_the_answer(model, answers, question, random):
    components = list((RICH | QUESTIONS[question])["components"])
    random.shuffle(components)
    found = asked(model, question, components=components)
    assert_same(found, answers(question), atol=1e-5)
    names = [name if isinstance(name, str) else sorted(name) for name in components]
    sets = [sorted(name.split(" + ")) for name in found["ablated_name"].values]
    assert sets[: len(names)] == [[name] if isinstance(name, str) else name for name in names]


@every_question
@pytest.mark.parametrize("rows", few([1, 2, 7, 64], 2))
def test_chunks_change_nothing(model, answers, question, rows):
    assert_same(asked(model, question, rows=rows), answers(question), atol=1e-5)


class Killed(BaseException):
    """As a signal ends a process."""


@every_question
def test_a_sweep_into_a_directory_is_that_in_memory_bit_for_bit(model, tmp_path, monkeypatch, question):
    expected = asked(model, question, rows=2)
    stored = asked(model, question, rows=2, workdir=tmp_path / "whole")
    assert_same(stored, expected)
    assert stored.attrs.items() >= expected.attrs.items()
    assert list(stored["prompt_id"].values) == list(expected["prompt_id"].values)

    written, write = [], store.write

    def once(workdir, chunk, arrays):
        if written:
            raise Killed
        written.append(chunk)
        write(workdir, chunk, arrays)

    monkeypatch.setattr(store, "write", once)
    with pytest.raises(Killed):
        asked(model, question, rows=2, workdir=tmp_path / "killed")
    monkeypatch.undo()
    half = store.open_effects(tmp_path / "killed")["finished"].values
    assert half.any()
    assert not half.all()
    assert_same(asked(model, question, rows=2, workdir=tmp_path / "killed"), expected)
    assert_same(asked(model, question, rows=2, workdir=tmp_path / "killed"), expected)
    names = [sorted(path.name for path in (tmp_path / one).iterdir()) for one in ("whole", "killed")]
    assert names[0] == names[1]


@pytest.mark.slow
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("shape", [(0, 1), (2, 2), (1, 4)], ids=str)
def test_devices_change_nothing(model, answers, question, shape):
    laid = dataclasses.replace(model, params=mesh.lay(mesh.make(MeshConfig(*shape)), model.params))
    assert_same(asked(laid, question), answers(question), atol=3e-5)


@pytest.mark.parametrize("question", few(["drawn", "of others", "mean"], "drawn"))
def test_fewer_prompts_are_answered_in_the_order_of_the_input(model, question):
    tops = hj.sweep(model, TEXTS, kind="zero", edges=False, foil="")["target_text"].values
    records = [
        {**one, "answer": top if n != 2 else "w3"} for n, (one, top) in enumerate(zip(RECORDS, tops, strict=True))
    ]
    records = [{name: value for name, value in one.items() if name != "foil"} for one in reversed(records)]
    right = asked(model, question, records, correct_only=True, edges=False)
    assert list(right["prompt_id"].values) == ["p5", "p4", "p3", "p1", "p0"]
    some = asked(model, question, records, limit=4, edges=False)
    kept = list(some["prompt_id"].values)
    assert len(kept) == 4
    assert kept == sorted(kept, reverse=True)
    assert (some["source"].values < 4).all()


@pytest.mark.parametrize("question", few(sorted(QUESTIONS.keys() - {"pairs", "cascade"}), "drawn"))
def test_an_ablation_among_others_is_the_same_alone(model, answers, question):
    whole = answers(question)
    for place, components in enumerate(RICH["components"]):
        alone = asked(model, question, components=[components])
        assert_same(alone, whole.isel(ablated=[place]), atol=1e-5)


@pytest.mark.parametrize("question", few(["drawn", "paired", "mean", "noise"], "drawn"))
def test_one_ablation_of_one_prompt_is_that_of_the_sweep(model, question):
    """Of whatever kind, where replacements come from the same other prompts."""
    others = {} if question == "paired" else {"sources": TEXTS}
    whole = asked(model, question, edges=False, **others)
    for place, components in ((1, RICH["components"][1]), (3, "attn 0.3")):
        one = {name: value for name, value in (RICH | QUESTIONS[question] | others).items() if name != "components"}
        alone = hj.ablate(model, RECORDS[2], components, **one)
        there = whole.isel(prompt=2, ablated=place)
        for name in (*EFFECTS, "free_total_effect", "log_probability_drop", "kl", "target_rank", "top_changed"):
            np.testing.assert_allclose(alone[name], there[name], atol=1e-5, err_msg=name)
        for name in ("compensation", "head_compensation"):
            np.testing.assert_allclose(alone[name].mean("replacement"), there[name], atol=1e-5, err_msg=name)


TOGETHER = ["attn 1", "mlp 0", "attn 2.1", "mlp 3"]


@settings(max_examples=6)
@given(order=st.permutations(TOGETHER))
def test_a_set_does_not_depend_on_the_order_of_its_names(model, order):
    told = dict(replacements=2, edges=False)
    expected = hj.sweep(model, RECORDS, components=[TOGETHER], **told)
    assert expected["ablated_name"].values == ["mlp 0 + attn 1 + attn 2.1 + mlp 3"]
    for components in ([order], [tuple(order)], " + ".join(order), ["+".join(order)]):
        assert_same(hj.sweep(model, RECORDS, components=components, **told), expected)


def test_names_of_the_same_are_the_same(model):
    told = dict(replacements=2, edges=False)
    expected = hj.sweep(model, RECORDS, components=["layer 3", "attn 2.1", "mlp 0"], **told)
    spelt = [["layer -1", "attn -2.1", "mlp -4"], [["attn 3", "mlp 3"], "attn 2.1", "mlp 0"]]
    spelt += [[["mlp -1", "attn 3"], " attn  2.1", "mlp 0 "], "layer 3, attn 2.1,mlp 0"]
    for components in spelt:
        found = hj.sweep(model, RECORDS, components=components, **told)
        assert_same(found, expected)
        assert list(found["ablated_name"].values) == ["layer 3", "attn 2.1", "mlp 0"]
    frozen = [hj.sweep(model, RECORDS, components="mlp 0", freeze=f, **told) for f in ("layer 3", ["mlp -1", "attn 3"])]
    assert_same(*frozen)


def test_everywhere_but_what_is_frozen_is_swept_without_names(model):
    found = hj.sweep(model, RECORDS, freeze=["layer 1", "attn 2.3", "norm"], replacements=2, edges=False)
    assert list(found["ablated_name"].values) == ["attn 0", "mlp 0", "mlp 2", "attn 3", "mlp 3"]


@pytest.mark.parametrize("question", few(["drawn", "everywhere", "paired", "mean", "noise"], "drawn"))
def test_what_is_frozen_repairs_nothing_and_what_is_free_is_as_without(model, question):
    """Whole writes, heads and the norm, each for itself and together."""
    told = dict(components=["attn 0", ["mlp 0", "attn 1.2"]], edges=False)
    free = asked(model, question, freeze=None, **told)
    assert "free_total_effect" not in free
    for freeze in (["attn 2"], ["layer 2", "norm"], ["attn 2.1", "attn 2.3"], ["norm"], ["attn 1.1", "mlp 3"]):
        found = asked(model, question, freeze=freeze, **told)
        np.testing.assert_allclose(found["free_total_effect"], free["total_effect"], rtol=0, atol=2e-6)
        np.testing.assert_allclose(found["direct_effect"], free["direct_effect"], atol=2e-6)
        if "norm" in freeze:
            np.testing.assert_allclose(found["norm_compensation"], 0, atol=1e-6)
        for name in freeze:
            if name in ("attn 2", "layer 2"):
                assert (found["compensation"].isel(component=4) == 0).all()
            if name == "layer 2":
                assert (found["compensation"].isel(component=5) == 0).all()
            if "." in name and name != "attn 1.1":
                assert (found["head_compensation"].isel(attn_layer=2, head=int(name[-1])) == 0).all()
        assert np.abs(found["total_effect"] - found["free_total_effect"]).max() > 1e-3


def test_with_all_downstream_frozen_the_direct_effect_is_left(model):
    downstream = ["mlp 1", "layer 2", "layer 3"]
    told = dict(components=["attn 1", "attn 1.2"], replacements=2, edges=False)
    for freeze in (downstream, [*downstream, "norm"]):
        found = hj.sweep(model, RECORDS, freeze=freeze, **told)
        assert (found["compensation"] == 0).all()
        left = found["direct_effect"] - found["norm_compensation"]
        np.testing.assert_allclose(found["total_effect"], left, atol=1e-5)
    np.testing.assert_allclose(found["total_effect"], found["direct_effect"], atol=1e-5)


@pytest.mark.parametrize("question", few(sorted(QUESTIONS.keys() - {"cascade"}), "drawn"))
def test_with_a_foil_the_effects_are_those_of_the_target_less_the_foils(model, question):
    both, target, foil = (
        asked(model, question, **told)
        for told in (dict(target="w3", foil="w7"), dict(target="w3", foil=""), dict(target="w7", foil=""))
    )
    linear = [*EFFECTS, "free_total_effect", "compensation", "head_compensation", "direct_edge", "clean_logit"]
    for name in (*linear, "delta_unembed", "ablated_delta_unembed"):
        np.testing.assert_allclose(both[name], target[name] - foil[name], atol=2e-5, err_msg=name)
    for name in ("kl", "target_rank", "log_probability_drop", "top_changed", "clean_probability"):  # of the target
        np.testing.assert_allclose(both[name], target[name], atol=1e-5, err_msg=name)
    assert set(both["foil_text"].values) == {"w7"}
    by_prompt = asked(model, question, target=["w3"] * len(RECORDS), foil=[7] * len(RECORDS))
    assert_same(by_prompt, both)


@pytest.mark.parametrize("block", few(["llama 3", "gpt-2", "pythia"], "gpt-2"))
def test_heads_answer_as_much_as_their_attention(block):
    """Where no head of the layer is clamped or frozen, and no norm comes after attention."""
    found = asked(questions.model(block), freeze=["mlp 3", "norm"])
    heads, whole = found["head_compensation"].sum("head").values, found["compensation"].values[..., ::2]
    held = np.zeros((5, 4), bool)
    held[[1, 3, 4], [2, 0, 0]] = True  # attn 2.1, attn 0.3, and attn 0.1 with attn 0.2
    np.testing.assert_allclose(heads[:, ~held], whole[:, ~held], atol=1e-5)
    assert np.abs(whole).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("question", QUESTIONS)
def test_what_is_a_variable_in_memory_is_one_in_a_directory(model, answers, tmp_path, question):
    found, expected = asked(model, question, workdir=tmp_path), answers(question)
    assert found.data_vars.keys() == expected.data_vars.keys()
    assert found.coords.keys() == expected.coords.keys()
    for name in expected.variables:
        assert found[name].dims == expected[name].dims, name
        assert found[name].attrs == expected[name].attrs, name
        if expected[name].dtype != object:  # text, which stores have in a type of its own
            assert found[name].dtype == expected[name].dtype, name
