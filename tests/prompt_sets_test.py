"""The sets of prompts that come with the package."""

import re
from collections import Counter

import pytest

from hydra_jax.errors import UserError
from hydra_jax.text import prompts
from hydra_jax.text.builtin import ENDINGS, SETS

WITH_SOURCES = ("ioi", "ioi_abc", "greater_than")


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_read_by_its_name(name):
    found = prompts.read(f"builtin:{name}")
    assert found == prompts.builtin(name) == prompts.as_prompts(found)
    assert len({prompt.id for prompt in found}) == len({prompt.text for prompt in found}) == len(found) >= 200


def test_the_facts_are_there_if_nothing_else_is_asked_for():
    assert prompts.read("") == prompts.builtin() == prompts.builtin("facts")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("iio", "builtin:iio: 'iio' is no built-in set; did you mean ioi? There are facts, ioi, ioi_abc, greater_than"),
        ("", "builtin:: '' is no built-in set; there are facts"),
    ],
)
def test_a_set_that_is_not_there_is_refused(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        prompts.read(f"builtin:{name}")
    with pytest.raises(UserError, match=re.escape(message)):
        prompts.builtin(name)


@pytest.mark.parametrize("name", WITH_SOURCES)
def test_answers_foils_and_sources_differ_from_what_they_are_compared_with(name):
    for prompt in prompts.builtin(name):
        assert prompt.answer != prompt.foil
        assert prompt.answer
        assert prompt.foil
        assert prompt.relation
        assert prompt.text == prompt.text.strip()
        differing = [
            pair for pair in zip(prompt.text.split(), prompt.source.split(), strict=True) if pair[0] != pair[1]
        ]
        assert len(differing) == 1
        assert not re.search(r"[{}]|\s\s", prompt.text + prompt.source)


def names_in(text, names):
    return [word for word in re.findall(r"\w+", text) if word in names]


@pytest.mark.parametrize("name", ["ioi", "ioi_abc"])
def test_one_of_two_people_is_named_again_and_the_other_is_the_answer(name):
    found = prompts.builtin(name)
    names = {prompt.answer for prompt in found}
    assert len(names) >= 40
    for prompt in found:
        first, second, again = names_in(prompt.text, names)
        assert {first, second} == {prompt.answer, prompt.foil}
        assert again == prompt.foil
        assert prompt.relation == ("ABBA" if second == again else "BABA")
        *same, swapped = names_in(prompt.source, names)
        assert same == [first, second]
        if name == "ioi":
            assert swapped == prompt.answer
        else:
            assert swapped not in same


def test_every_template_is_there_in_both_orders_with_the_same_names():
    orders = {}
    for prompt in prompts.builtin("ioi"):
        _, template, order, number = prompt.id.split("/")
        assert order == prompt.relation
        orders.setdefault((template, number), {})[order] = prompt
    assert len({template for template, _ in orders}) >= 15
    for both in orders.values():
        assert set(both) == {"ABBA", "BABA"}
        assert {(prompt.answer, prompt.foil) for prompt in both.values()} == {(both["ABBA"].answer, both["ABBA"].foil)}
        assert both["ABBA"].text != both["BABA"].text


def test_every_name_is_the_answer_and_the_foil_equally_often():
    found = prompts.builtin("ioi")
    answers, foils = Counter(p.answer for p in found), Counter(p.foil for p in found)
    assert answers == foils
    assert len(set(answers.values())) == 1


def test_a_third_name_changes_nothing_but_the_source():
    pairs = zip(prompts.builtin("ioi"), prompts.builtin("ioi_abc"), strict=True)
    for one, other in pairs:
        assert one.source != other.source
        assert one.__dict__ | {"source": ""} == other.__dict__ | {"source": ""}


def test_years_end_later_in_their_century():
    found = prompts.builtin("greater_than")
    for prompt in found:
        (year,) = re.findall(r"\b\d{4}\b", prompt.text)
        assert prompt.text.endswith(f" {year[:2]}")
        assert int(prompt.foil) < int(year[2:]) < int(prompt.answer)
        assert int(year[2:]) in ENDINGS
        assert len(prompt.answer) == len(prompt.foil) == 2
        assert prompt.foil[0] < year[2] < prompt.answer[0]
        assert prompt.source == prompt.text.replace(year, f"{year[:2]}01")
        assert prompt.id == f"greater_than/{prompt.relation}/{year}"
    for counts in (Counter(p.id[-4:-2] for p in found), Counter(p.relation for p in found)):
        assert max(counts.values()) <= 1.2 * min(counts.values())
