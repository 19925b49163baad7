"""Prompts as callers have them: one or many, and what is refused because it could be read wrong."""

import array
import io
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_jax.errors import UserError
from hydra_jax.text.prompts import Prompt, as_prompts
from tests.helpers import checkpoints

IDS = Prompt("tokens 504 414 46682", "", tokens=(504, 414, 46682))
RECORD = {"prompt": "a b ", "answer": " c", "foil": "d", "source": "a e", "position": 1, "id": "x", "relation": "r"}
MADE = Prompt("x", "a b ", " c", "r", "d", "a e", 1)


class Column:
    """A column of a `datasets` table."""

    def __init__(self, *values):
        self.values = values

    def __iter__(self):
        return iter(self.values)


class Table(Column):
    """A `datasets` table: its rows are dicts, and it knows its columns' names."""

    column_names = ("prompt", "answer")


TAKEN = {
    "text": ("a b", [Prompt("a b", "a b")]),
    "numpy text": (np.str_("a b"), [Prompt("a b", "a b")]),
    "prompt": (MADE, [MADE]),
    "record": (RECORD, [MADE]),
    "record without an id": ({"prompt": "a"}, [Prompt("0", "a")]),
    "ids": ([504, 414, 46682], [IDS]),
    "tuple of ids": ((504, 414, 46682), [IDS]),
    "range": (range(2), [Prompt("tokens 0 1", "", tokens=(0, 1))]),
    "numpy ids": (np.array([504, 414, 46682]), [IDS]),
    "JAX ids": (jnp.array([504, 414, 46682]), [IDS]),
    "list of numpy ids": (list(np.array([504, 414, 46682])), [IDS]),
    "list of JAX ids": (list(jnp.array([504, 414, 46682])), [IDS]),
    "array of the standard library": (array.array("i", [504, 414, 46682]), [IDS]),
    "several ids": ([[1, 2], (3,)], [Prompt("tokens 1 2", "", tokens=(1, 2)), Prompt("tokens 3", "", tokens=(3,))]),
    "rows of ids": (np.array([[1], [3]]), [Prompt("tokens 1", "", tokens=(1,)), Prompt("tokens 3", "", tokens=(3,))]),
    "arrays of ids": (
        [np.array([1, 2]), jnp.array([3])],
        [Prompt("tokens 1 2", "", tokens=(1, 2)), Prompt("tokens 3", "", tokens=(3,))],
    ),
    "of every kind": (
        ["a", MADE, {"prompt": "b"}, [1, 2]],
        [Prompt("a", "a"), MADE, Prompt("2", "b"), Prompt("tokens 1 2", "", tokens=(1, 2))],
    ),
    "generator": ((text for text in "ab"), [Prompt("a", "a"), Prompt("b", "b")]),
    "dict's keys": ({"a": 1, "b": 2}.keys(), [Prompt("a", "a"), Prompt("b", "b")]),
    "numpy texts": (np.array(["a", "b"]), [Prompt("a", "a"), Prompt("b", "b")]),
    "none": ([], []),
    "series": (pd.Series(["a", "b"], index=[7, 7]), [Prompt("a", "a"), Prompt("b", "b")]),
    "series of categories": (pd.Series(["a", "b"], dtype="category"), [Prompt("a", "a"), Prompt("b", "b")]),
    "series of objects": (pd.Series(["a", "b"], dtype=object), [Prompt("a", "a"), Prompt("b", "b")]),
    "frame": (pd.DataFrame([RECORD], index=["i"]), [MADE]),
    "frame without ids": (
        pd.DataFrame({"prompt": ["a", "b"], "answer": ["c", None]}, index=[5, 9]),
        [Prompt("0", "a", "c"), Prompt("1", "b")],
    ),
    "frame with gaps": (
        pd.DataFrame(
            {
                "prompt": ["a", "b"],
                "answer": ["c", float("nan")],
                "position": [1, None],
                "id": [None, 7],
                "foil": pd.array([pd.NA, "d"], dtype="string"),
            }
        ),
        [Prompt("0", "a", "c", position=1), Prompt("7", "b", foil="d")],
    ),
    "frame of objects": (
        pd.DataFrame({"prompt": ["a", "b"], "position": ["a", -1]}, dtype=object),
        [Prompt("0", "a", position="a"), Prompt("1", "b", position=-1)],
    ),
    "rows of a frame": (pd.DataFrame([RECORD]).to_dict("records"), [MADE]),
    "column": (Column("a", "b"), [Prompt("a", "a"), Prompt("b", "b")]),
    "table": (
        Table({"prompt": "a", "answer": None}, {"prompt": "b", "answer": "c"}),
        [Prompt("0", "a"), Prompt("1", "b", "c")],
    ),
}


@pytest.mark.parametrize(("prompts", "made"), TAKEN.values(), ids=TAKEN)
def test_prompts_are_taken_as_callers_have_them(prompts, made):
    found = as_prompts(prompts)
    assert found == made
    for prompt in found:
        assert type(prompt.text) is str
        assert type(prompt.position) in (int, str, type(None))
        assert type(prompt.tokens) is tuple
        assert {type(token) for token in prompt.tokens} <= {int}


REFUSED = {
    "bytes": (b"a b", "prompts: is bytes b'a b'; give a text"),
    "bytearray": (bytearray(b"ab"), "prompts: is bytearray"),
    "number": (1.5, r"prompts: is float 1\.5; give a text"),
    "whole number": (5, "prompts: is int 5; give a text"),
    "None": (None, "prompts: is NoneType None"),
    "file": (io.StringIO("a\nb\n"), "prompts: is _io.StringIO"),
    "columns": ({"prompt": ["a", "b"]}, "prompts: prompt is list, not a string"),
    "texts as keys": ({"a": None}, "prompts: has no prompt"),
    "misspelled": ({"promt": "a"}, "'promt' is unknown; did you mean \"prompt\"?"),
    "misspelled answer": ([{"prompt": "a", "awnser": "b"}], r"prompts\[0\]: key 'awnser' .*\"answer\""),
    "lists of texts": ([["a", "b"]], r"prompts\[0\]: is list \['a', 'b'\]; give each as"),
    "element": (["a", 5.0], r"prompts\[1\]: is float 5\.0"),
    "text among ids": ([1, 2, "a"], r"prompts\[0\]: is int 1"),
    "id among texts": (["a", 2], r"prompts\[1\]: is int 2"),
    "missing text": (["a", None], r"prompts\[1\]: is missing"),
    "missing text of a series": (pd.Series(["a", None]), r"prompts\[1\]: is missing"),
    "truths": ([True, False], r"prompts\[0\]: is bool True"),
    "array of truths": (np.array([True]), "prompts: is an array of bool"),
    "list of numpy truths": ([np.True_], r"prompts\[0\]: is numpy\.bool"),
    "array of numbers": (np.array([1.0]), r"prompts: is an array of float64 of shape \(1,\)"),
    "one number": (np.array(5), r"prompts: is an array of int64 of shape \(\)"),
    "texts in rows": (np.array([["a"]]), r"prompts: is an array of <U1 of shape \(1, 1\)"),
    "ids in blocks": (np.zeros((1, 2, 3), int), r"prompts\[0\]: is numpy\.ndarray"),
    "no ids": ([[1], []], r"prompts\[1\]: has no tokens"),
    "ids below zero": ([3, -1], r"tokens of prompt 'tokens 3 -1' are \(3, -1\); give ids from 0"),
    "set of ids": ({3, 5}, "prompts: is a set of numbers"),
    "series of ids": (pd.Series([3, 5]), "prompts: is a Series of int64; give one of texts"),
    "series of truths": (pd.Series([True]), "prompts: is a Series of bool"),
    "frame of other columns": (
        pd.DataFrame({"prompt": ["a"], "anser": ["b"]}),
        "prompts: column 'anser' is unknown; did you mean answer[?] Known are prompt, answer, foil, source",
    ),
    "frame of numbered columns": (pd.DataFrame([["a"]]), "prompts: column 0 is unknown; known are prompt"),
    "frame without prompts": (pd.DataFrame({"answer": ["a"]}), "prompts: has no column prompt"),
    "frame with a column twice": (
        pd.DataFrame([["a", "b"]], columns=["prompt", "prompt"]),
        "prompts: column prompt occurs twice",
    ),
    "frame of numbers": (pd.DataFrame({"prompt": ["a", 3]}), r"prompts\.iloc\[1\]: prompt is int, not a string"),
    "frame with a gap": (pd.DataFrame({"prompt": ["a", None]}), "prompt '1' is empty"),
    "frame of half positions": (
        pd.DataFrame({"prompt": ["a"], "position": [0.5]}),
        r"prompts\.iloc\[0\]: position is float, not a string or a whole number",
    ),
    "prompt of a number": (Prompt("a", 5), "prompts: text of prompt 'a' is 5; give a string"),
    "prompt of a number as id": (Prompt(5, "a"), "prompts: id of prompt 5 is 5; give a string"),
    "prompt at half a token": (Prompt("a", "b", position=1.5), "position of prompt 'a' is 1.5"),
    "prompt of tokens in a text": (Prompt("a", "", tokens="12"), "tokens of prompt 'a' are '12'"),
    "prompt of nothing": (Prompt("a", ""), "prompt 'a' is empty"),
    "record of tokens in a text": ({"tokens": "12"}, "prompts: tokens are '12', not a list of token ids"),
}


@pytest.mark.parametrize(("prompts", "message"), REFUSED.values(), ids=REFUSED)
def test_what_could_be_read_wrong_is_refused(prompts, message):
    with pytest.raises(UserError, match=message) as raised:
        as_prompts(prompts)
    assert "\n" not in str(raised.value)


def test_a_table_of_another_library_is_not_taken_for_its_columns():
    class Frame(list):
        columns = ("prompt", "answer")

    with pytest.raises(UserError, match="give it as a pandas DataFrame"):
        as_prompts(Frame(["prompt", "answer"]))


def test_a_path_is_read(tmp_path):
    path = checkpoints.text_file(tmp_path / "p.jsonl", '{"prompt": "a"}\n')
    assert as_prompts(pathlib.Path(path)) == [Prompt("0", "a")]
    with pytest.raises(UserError, match=r"missing\.jsonl: No such file"):
        as_prompts(tmp_path / "missing.jsonl")


def test_numbers_of_libraries_in_a_prompt_are_made_pythons():
    (made,) = as_prompts(Prompt("a", "b", position=np.int64(0), tokens=[np.int32(3)]))
    assert made == Prompt("a", "b", position=0, tokens=(3,))
    assert hash(made) == hash(Prompt("a", "b", position=0, tokens=(3,)))


def test_a_long_prompt_of_tokens_has_a_name_that_is_cut():
    (made,) = as_prompts(range(1000))
    assert len(made.name) < 70
    assert made.id.endswith(" 999")


@given(st.lists(st.text(min_size=1).filter(str.strip), unique=True))
def test_texts_keep_their_order_and_are_their_ids(texts):
    for form in (texts, tuple(texts), iter(texts), np.array(texts, object), pd.Series(texts, dtype=object)):
        assert [(prompt.id, prompt.text) for prompt in as_prompts(form)] == [(text, text) for text in texts]


@given(st.lists(st.lists(st.integers(0, 2**31), min_size=1), min_size=1, unique_by=tuple))
def test_token_ids_are_kept(rows):
    assert [list(prompt.tokens) for prompt in as_prompts(rows)] == rows
    assert [list(prompt.tokens) for prompt in as_prompts(map(np.array, rows))] == rows


def test_pandas_is_not_imported_for_texts():
    code = (
        "import sys; from hydra_jax.text.prompts import as_prompts; as_prompts(['a']); print('pandas' in sys.modules)"
    )
    root = pathlib.Path(__file__).parent.parent
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).strip() == "False"
