"""Prompts in tables on disk, and the names of columns and keys."""

import contextlib
import csv
import gzip
import io

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_jax.errors import UserError
from hydra_jax.text import files, prompts
from hydra_jax.text.prompts import Prompt
from tests.helpers import checkpoints

ROWS = """prompt,answer,foil,source,position,id,relation
"The mother, said ""he"", is ", French ,English,"The
father is",-2,x,tongue

a b,,,,he,,
"""
READ = [
    Prompt("x", 'The mother, said "he", is ', " French", "tongue", "English", "The\nfather is", -2),
    Prompt("1", "a b", position="he"),
]


def refusal(path):
    with pytest.raises(UserError) as raised:
        prompts.read(str(path))
    message = str(raised.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path))


@pytest.mark.parametrize("text", [ROWS, "\ufeff" + ROWS, ROWS.replace("\n", "\r\n").replace("The\r\n", "The\n")])
@pytest.mark.parametrize("name", ["p.csv", "p.CSV", "p.csv.gz"])
def test_csv_is_read(tmp_path, name, text):
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert prompts.read(str(tmp_path / name)) == READ
    assert prompts.as_prompts(tmp_path / name) == READ


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")).filter(str.strip), min_size=1)
)
def test_what_is_written_as_csv_is_read_as_it_was(tmp_path_factory, texts):
    path, file = tmp_path_factory.mktemp("csv") / "p.csv", io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerows([("source", "prompt"), *((text[::-1], text) for text in texts)])
    path.write_text(file.getvalue(), "utf-8", newline="")
    assert [(prompt.text, prompt.source) for prompt in prompts.read(str(path))] == [(t, t[::-1]) for t in texts]


BAD = {
    "unknown column": ("prompt,anser\na,b\n", ":1:", "'anser' is unknown; did you mean answer?"),
    "column of nothing": ("prompt,\na,b\n", ":1:", "'' is unknown; known are prompt, answer"),
    "no prompts": ("answer\nb\n", ":1:", "no column prompt"),
    "column twice": ("prompt,prompt\na,b\n", ":1:", "occurs twice"),
    "too many fields": ("prompt,answer\na,b\nc, d, e\n", ":3:", "has 3 fields, the header 2"),
    "too few fields": ("prompt,answer\na\n", ":2:", "has 1 fields, the header 2"),
    "quote left open": ('prompt,answer\na,"b\n', ":2:", "is not CSV"),
    "quote inside": ('prompt,answer\na,"b" c\n', ":2:", "is not CSV"),
    "huge field": ("prompt\n" + "x" * 200_000 + "\n", ":2:", "is not CSV (field larger"),
    "header alone": ("prompt\n", "", "has no prompts"),
    "nothing": ("", "", "has no prompts"),
    "empty prompt": ("prompt,answer\na,b\n,c\n", "", "prompt '1' is empty"),
    "latin-1": (b"prompt\ncaf\xe9\n", ":2:", "is not UTF-8"),
}


@pytest.mark.parametrize(("content", "place", "reason"), BAD.values(), ids=BAD)
def test_bad_csv_is_refused_with_place_and_reason(tmp_path, content, place, reason):
    path = tmp_path / "bad.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(path)
    assert message.startswith(place)
    assert reason in message


FRAME = pd.DataFrame(
    {
        "prompt": ["a ", "b"],
        "answer": [" c", None],
        "foil": pd.Categorical(["d", None]),
        "position": [1, None],
        "id": ["x", None],
    },
    index=[3, 4],
)


@pytest.mark.parametrize("options", [{}, {"index": True}, {"compression": "gzip"}], ids=["plain", "index", "gzip"])
def test_parquet_is_read(tmp_path, options):
    FRAME.to_parquet(tmp_path / "p.parquet", **options)
    expected = [Prompt("x", "a ", " c", "", "d", position=1), Prompt("1", "b")]
    assert prompts.read(str(tmp_path / "p.parquet")) == prompts.as_prompts(FRAME) == expected


@pytest.mark.parametrize("type", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_parquet_has_texts_of_every_type(tmp_path, type):
    table = pa.table({"prompt": pa.array(["a", "b", "b"]).cast(type), "id": [5, 6, 7]})
    pq.write_table(table, tmp_path / "p.parquet")
    assert prompts.read(str(tmp_path / "p.parquet")) == [Prompt("5", "a"), Prompt("6", "b"), Prompt("7", "b")]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["a"], "text": ["b"]}, ": column 'text' is unknown; known are prompt"),
        ({"answer": ["a"]}, ": has no column prompt"),
        ({"prompt": [1]}, ": column prompt is of type int64, not of strings"),
        ({"prompt": ["a"], "answer": [b"b"]}, ": column answer is of type binary, not of strings"),
        ({"prompt": ["a"], "answer": [["b"]]}, ": column answer is of type list"),
        ({"prompt": ["a"], "position": [True]}, ": column position is of type bool, not of strings or whole numbers"),
        ({"prompt": ["a"], "position": [0.5]}, ": record 1: position is float"),
        ({"prompt": ["a", None]}, ": prompt '1' is empty"),
        ({"prompt": pa.array([], pa.string())}, ": has no prompts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # the names of arrays are addresses
)
def test_bad_parquet_is_refused(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    assert refusal(tmp_path / "p.parquet").startswith(message)


def whole_parquet():
    file = io.BytesIO()
    pq.write_table(pa.table({"prompt": [f"prompt {number * number}" for number in range(50)]}), file)
    return file.getvalue()


PARQUET = whole_parquet()


@given(st.integers(0, len(PARQUET) - 1))
def test_a_truncated_parquet_file_is_refused(tmp_path_factory, length):
    path = tmp_path_factory.mktemp("cut") / "p.parquet"
    path.write_bytes(PARQUET[:length])
    assert "is not a whole Parquet file" in refusal(path)


@given(st.integers(0, len(PARQUET) - 1), st.integers(1, 255))
def test_a_corrupted_parquet_file_is_read_or_refused(tmp_path_factory, place, change):
    path = tmp_path_factory.mktemp("flipped") / "p.parquet"
    path.write_bytes(PARQUET[:place] + bytes([PARQUET[place] ^ change]) + PARQUET[place + 1 :])
    with contextlib.suppress(UserError):
        assert prompts.read(str(path))


@pytest.mark.parametrize("rows", [["x" * 1000] * 2000, [str(n) * 200 for n in range(2000)], [None] * 40_000])
def test_more_than_can_be_prompts_is_refused_before_it_fills_memory(tmp_path, monkeypatch, rows):
    pq.write_table(pa.table({"prompt": pa.array(rows, pa.string())}), tmp_path / "p.parquet", compression="zstd")
    monkeypatch.setattr(files, "MOST_BYTES", 1 << 20)
    assert (tmp_path / "p.parquet").stat().st_size < 1 << 20
    assert "more than 1 MiB" in refusal(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("Prompt", None),  # without a prompt, below
        ("awnser", "answer"),
        ("Answer", "answer"),
        ("answers", "answer"),
        ("fiol", "foil"),
        ("sorce", "source"),
        ("postion", "position"),
        ("ID", "id"),
        ("relation ", "relation"),
    ],
)
def test_a_key_that_looks_misspelled_is_refused(tmp_path, key, meant):
    record = {"prompt": "a"} if meant else {}
    path = checkpoints.json_lines(tmp_path / "p.jsonl", [record | {key: "b"}])
    assert refusal(path) == f':1: key {key!r} is unknown; did you mean "{meant or "prompt"}"?'


@pytest.mark.parametrize(
    "key", ["subject", "relation_id", "prompt_id", "answer_text", "idx", "text", "template", "file", "score", "tokens"]
)
def test_other_keys_are_no_matter(tmp_path, key):
    path = checkpoints.json_lines(tmp_path / "p.jsonl", [{"prompt": "a", key: "b"}])
    assert prompts.read(str(path)) == [Prompt("0", "a")]


def test_a_key_like_one_that_is_there_is_no_matter(tmp_path):
    path = checkpoints.json_lines(tmp_path / "p.jsonl", [{"prompt": "a", "answer": "b", "answers": ["b", "c"]}])
    assert prompts.read(str(path)) == [Prompt("0", "a", "b")]


def test_values_that_are_none_are_missing(tmp_path):
    record = dict.fromkeys(("answer", "foil", "source", "position", "id", "relation"))
    assert prompts.read(str(checkpoints.json_lines(tmp_path / "p.jsonl", [{"prompt": "a"} | record]))) == [
        Prompt("0", "a")
    ]


def test_a_number_as_position_in_json_is_an_index_and_text_is_text(tmp_path):
    path = checkpoints.json_lines(
        tmp_path / "p.jsonl", [{"prompt": "a 4", "position": 0}, {"prompt": "b 4", "position": "4"}]
    )
    assert [prompt.position for prompt in prompts.read(str(path))] == [0, "4"]


@pytest.mark.parametrize("position", [True, 0.5, [1], {"a": 1}])
def test_a_position_of_another_type_is_refused(tmp_path, position):
    path = checkpoints.json_lines(tmp_path / "p.jsonl", [{"prompt": "a", "position": position}])
    assert f":1: position is {type(position).__name__}" in refusal(path)


def test_a_table_and_its_frame_are_the_same_prompts(tmp_path):
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"prompt": [f"p {n}" for n in range(20)], "answer": random.choice(["a", "b"], 20)})
    frame.to_csv(tmp_path / "p.csv", index=False)
    frame.to_parquet(tmp_path / "p.parquet")
    assert prompts.as_prompts(frame) == prompts.read(tmp_path / "p.csv") == prompts.read(tmp_path / "p.parquet")
