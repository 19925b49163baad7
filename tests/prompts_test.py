import gzip
import json
import random
import re
import tomllib
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_jax.errors import UserError
from hydra_jax.text import files, prompts
from hydra_jax.text.prompts import Prompt
from tests.helpers import checkpoints

DATA = Path(__file__).parent.parent.parent / "shared" / "data"

KNOWN = {
    "known_id": 7,
    "subject": "Vinson Massif",
    "attribute": "Antarctica",
    "template": "{} is located in the continent",
    "prediction": " of Antarctica.",
    "prompt": "Vinson Massif is located in the continent of",
    "relation_id": "P30",
}
NESTED = {
    "case_id": 3,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native"],
}
FLAT = {
    "case_id": 3,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "target_new": "English",
    "subject": "Danielle Darrieux",
    "ground_truth": "French",
}
PLAIN = {"prompt": "The mother tongue of Danielle Darrieux is ", "answer": " French ", "id": "x", "relation": "tongue"}

LAYOUTS = {
    "known_1000": (KNOWN, Prompt("7", "Vinson Massif is located in the continent of", "Antarctica", "P30")),
    "CounterFact nested": (
        NESTED,
        Prompt("3", "The mother tongue of Danielle Darrieux is", "French", "P103", "English"),
    ),
    "CounterFact flat": (FLAT, Prompt("3", "The mother tongue of Danielle Darrieux is", "French", foil="English")),
    "plain": (PLAIN, Prompt("x", "The mother tongue of Danielle Darrieux is ", " French", "tongue")),
    "every key": (
        PLAIN | {"foil": " English\n", "source": "The mother tongue of Bob is", "position": "Darrieux", "more": 3},
        Prompt(
            "x",
            "The mother tongue of Danielle Darrieux is ",
            " French",
            "tongue",
            " English",
            "The mother tongue of Bob is",
            "Darrieux",
        ),
    ),
    "prompt alone": ({"prompt": "Once upon a"}, Prompt("0", "Once upon a")),
}


def refusal(path):
    with pytest.raises(UserError) as raised:
        prompts.read(str(path))
    message = str(raised.value)
    assert "\n" not in message
    return message


def facts():
    return tomllib.loads(resources.files("hydra_jax.text").joinpath("facts.toml").read_text("utf-8"))


def test_there_are_many_builtin_facts_of_many_relations():
    built_in = prompts.read("")
    assert len(built_in) >= 1200
    assert len({prompt.relation for prompt in built_in}) >= 20


def test_builtin_ids_and_texts_are_unique():
    built_in = prompts.builtin()
    for field in ("id", "text"):
        assert [v for v, n in Counter(getattr(prompt, field) for prompt in built_in).items() if n > 1] == []


def test_no_builtin_prompt_gives_its_answer_away():
    assert [prompt.text for prompt in prompts.builtin() if prompt.answer.lower() in prompt.text.lower()] == []


def test_builtin_texts_and_answers_have_no_outer_space():
    for prompt in prompts.builtin():
        assert prompt.text == prompt.text.strip()
        assert prompt.answer == prompt.answer.strip() != ""


def test_every_template_has_one_place_for_its_subject():
    for table in facts().values():
        assert table["template"].count("{}") == 1
        assert re.findall("[{}]", table["template"]) == ["{", "}"]


@pytest.mark.parametrize(("record", "prompt"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ["prompts.json", "prompts.jsonl", "prompts.json.gz", "prompts.jsonl.gz"])
def test_every_layout_is_read(tmp_path, name, record, prompt):
    text = json.dumps([record], indent=2) if ".jsonl" not in name else json.dumps(record) + "\n"
    assert prompts.read(str(checkpoints.text_file(tmp_path / name, text))) == [prompt]


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("known_1000.json", 1209, LAYOUTS["known_1000"][1].text),
        ("counterfact_flat.jsonl.gz", 21_919, LAYOUTS["CounterFact flat"][1].text),
    ],
)
def test_the_published_files_are_read_whole(name, count, first):
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is not here")
    found = prompts.read(str(DATA / name))
    assert len(found) == count
    assert found[0].text == first
    assert all(prompt.answer for prompt in found)


def test_prompts_without_ids_are_numbered(tmp_path):
    path = checkpoints.json_lines(
        tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", "id": "own"}, {"prompt": "c"}]
    )
    assert [prompt.id for prompt in prompts.read(str(path))] == ["0", "own", "2"]


@pytest.mark.parametrize("text", ['{"prompt": "é"}', '\n{"prompt": "é"}\n\n', '\ufeff{"prompt": "é"}\r\n'])
def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_no_matter(tmp_path, text):
    assert prompts.read(str(checkpoints.text_file(tmp_path / "p.jsonl", text))) == [Prompt("0", "é")]


def test_plain_texts_are_their_own_ids():
    assert prompts.as_prompts(["a b", Prompt("1", "c")]) == [Prompt("a b", "a b"), Prompt("1", "c")]


@pytest.mark.parametrize(
    "texts", [["same", "same"], [" "], ["half a pair \ud800"]], ids=["twice", "empty", "surrogate"]
)
def test_plain_texts_are_checked(texts):
    with pytest.raises(UserError, match="prompt"):
        prompts.as_prompts(texts)


@given(st.lists(st.builds(Prompt, *[st.text()] * 6, st.none() | st.integers() | st.text()), max_size=8), st.randoms())
def test_the_hash_does_not_depend_on_order(some, chance):
    shuffled = random.Random(chance.random()).sample(some, len(some))
    assert prompts.content_hash(some) == prompts.content_hash(shuffled)


@pytest.mark.parametrize(
    ("field", "other"),
    [
        *((field, "other") for field in ("id", "text", "answer", "relation", "foil", "source", "position")),
        ("position", 0),
        ("tokens", (0,)),
    ],
)
def test_the_hash_depends_on_every_field(field, other):
    prompt = dict(id="i", text="t", answer="a", relation="r")
    hashes = {prompts.content_hash([Prompt(**prompt)]), prompts.content_hash([Prompt(**prompt | {field: other})])}
    assert len(hashes) == 2
    elsewhere = "source" if field == "foil" else "foil"
    hashes.add(prompts.content_hash([Prompt(**prompt | {elsewhere: "other"})]))
    assert len(hashes) == 3


def test_the_hash_of_what_has_only_a_text_and_an_answer_stays_as_it_was():
    rows = [Prompt("b", "t", "a", "r"), Prompt("a", "é")]
    assert prompts.content_hash(rows) == "8cfbb802ec9f18c52b826ee27ca343fe17e7684631060202303dbce8f2198048"


def test_every_field_is_written_and_read_again(tmp_path):
    some = [
        Prompt("a", "some text ", " x", "r", "y", "other text", -2),
        Prompt("b", "some text", position=0),
        Prompt("c", "some text", position="4"),
        Prompt("tokens 5 6", "", "x", tokens=(5, 6)),
        Prompt("e", "some text"),
    ]
    text = prompts.json_lines(some)
    assert prompts.read(checkpoints.text_file(tmp_path / "p.jsonl", text)) == some
    assert json.loads(text.splitlines()[-1]) == {"id": "e", "prompt": "some text", "answer": "", "relation": ""}


GOOD = '{"prompt": "a"}\n{"prompt": "b"}\n'
BAD = {
    "empty": (b"", "", "no prompts"),
    "blank": (b" \n\t\n", "", "no prompts"),
    "no records": (b"[]", "", "no prompts"),
    "latin-1": (GOOD.encode() + b'{"prompt": "caf\xe9"}', ":3:", "UTF-8"),
    "UTF-16": (GOOD.encode("utf-16"), ":1:", "UTF-8"),
    "bytes": (b"\0\1\2", ":1:", "JSON"),
    "csv": (b"prompt,answer\na,b\n", ":1:", "JSON"),
    "not JSON": (GOOD + '{"prompt": "c"\n', ":3:", "JSON"),
    "not JSON after a blank line": (GOOD + "\n{}{}\n", ":4:", "JSON"),
    "array not JSON": ('[{"prompt": "a"},\n{"prompt": "b"},\n{"prompt" "c"}]', ":3:", "JSON"),
    "array cut": ('[{"prompt": "a"},\n{"prompt": "b"', ":2:", "JSON"),
    "deeply nested": (GOOD + '{"prompt": ' + "[" * 100_000, ":3:", "JSON"),
    "deeply nested array": ("[" * 100_000, ":1:", "JSON"),
    "huge number": (GOOD + '{"prompt": "c", "id": ' + "9" * 5000 + "}", ":3:", "JSON"),
    "string": (GOOD + '"c"', ":3:", "no prompt"),
    "array of strings": ('["a", "b"]', "record 1:", "no prompt"),
    "no prompt": (GOOD + '{"text": "c"}', ":3:", "no prompt"),
    "no prompt in an array": ('[{"prompt": "a"}, {"text": "c"}]', "record 2:", "no prompt"),
    "prompt a number": (GOOD + '{"prompt": 3}', ":3:", "prompt is int"),
    "prompt null": (GOOD + '{"prompt": null}', ":3:", "prompt is NoneType"),
    "answer a list": (GOOD + '{"prompt": "c", "answer": ["d"]}', ":3:", "answer is list"),
    "relation a number": (GOOD + '{"prompt": "c", "relation": 3}', ":3:", "relation is int"),
    "id a list": (GOOD + '{"prompt": "c", "id": [3]}', ":3:", "id is list"),
    "id twice": (GOOD + '{"prompt": "c", "id": 1}', "'1'", "twice"),
    "empty prompt": (GOOD + '{"prompt": " "}', "'2'", "empty"),
    "half a surrogate pair": (GOOD + '{"prompt": "\\ud800"}', "'2'", "Unicode"),
    "known_1000 without its answer": (json.dumps([KNOWN, {"known_id": 8, "prompt": "c"}]), "record 2:", "attribute"),
    "CounterFact without its rewrite": ('[{"requested_rewrite": []}]', "record 1:", "malformed"),
    "CounterFact of a number": (
        json.dumps([NESTED | {"requested_rewrite": NESTED["requested_rewrite"] | {"subject": 3}}]),
        "record 1:",
        "malformed",
    ),
    "CounterFact flat without its prompt": (GOOD + '{"ground_truth": "c"}', ":3:", "prompt"),
}


@pytest.mark.parametrize(("content", "place", "reason"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_with_place_and_reason(tmp_path, content, place, reason):
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(path)
    assert message.startswith(str(path))
    assert place in message.removeprefix(str(path))
    assert reason in message


@pytest.mark.parametrize("name", ["missing.jsonl", "missing/p.jsonl", "", "x" * 5000], ids=lambda name: name[:20])
def test_a_path_that_is_no_file_is_refused(tmp_path, name):
    assert str(tmp_path / name) in refusal(tmp_path / name)


def test_a_home_that_is_not_there_is_refused():
    assert "~nobody-of-this-name/p.jsonl" in refusal("~nobody-of-this-name/p.jsonl")


PACKED = gzip.compress("".join(f'{{"prompt": "prompt {i * i}"}}\n' for i in range(50)).encode(), mtime=0)


@given(st.integers(1, len(PACKED) - 1))
def test_a_truncated_gzip_file_is_refused(tmp_path_factory, length):
    path = tmp_path_factory.mktemp("cut") / "p.jsonl.gz"
    path.write_bytes(PACKED[:length])
    message = refusal(path)
    assert str(path) in message
    assert "gzip" in message


@given(st.integers(10, len(PACKED) - 1), st.integers(1, 255))
def test_a_corrupted_gzip_file_is_refused(tmp_path_factory, place, change):
    path = tmp_path_factory.mktemp("flipped") / "p.jsonl.gz"
    path.write_bytes(PACKED[:place] + bytes([PACKED[place] ^ change]) + PACKED[place + 1 :])
    assert str(path) in refusal(path)


def test_plain_text_named_gz_is_refused(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    path.write_text(GOOD)
    message = refusal(path)
    assert str(path) in message
    assert "gzip" in message


TEXT = "\n".join(f"Word{number} and  some more\twords of line {number}." for number in range(60))


def test_prompts_cut_from_text_stand_in_it_before_their_answers(tmp_path):
    path = checkpoints.text_file(tmp_path / "text.txt", TEXT)
    cuts = prompts.read(str(path), "text", 40, seed=1)
    assert len(cuts) == len({cut.id for cut in cuts}) == 40
    for cut in cuts:
        end = int(cut.id.split()[1])
        assert TEXT[:end].endswith(cut.text)
        assert TEXT[end:].split()[0] == cut.answer
        assert prompts.WORDS[0] <= len(cut.text.split()) <= prompts.WORDS[1]
    assert cuts == prompts.read(str(path), "text", 40, seed=1)
    assert cuts != prompts.read(str(path), "text", 40, seed=2)


def test_a_text_that_is_too_short_is_refused(tmp_path):
    path = checkpoints.text_file(tmp_path / "text.txt", "a few words")
    with pytest.raises(UserError, match="3 words") as raised:
        prompts.read(str(path), "text", 5)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("name", ["huge.jsonl", "huge.jsonl.gz"])
def test_more_than_can_be_prompts_is_refused_before_it_fills_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "MOST_BYTES", 1 << 20)
    assert "more than 1 MiB" in refusal(checkpoints.text_file(tmp_path / name, "x" * (1 << 20 | 1)))


@pytest.mark.parametrize("name", ["\0", "\ud800", "a\nb"])
def test_what_is_no_path_is_refused(name):
    refusal(name)
