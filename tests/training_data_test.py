import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_jax.errors import UserError
from hydra_jax.text.tokenizer import encode
from hydra_jax.training import biographies, data
from tests.helpers import checkpoints
from tests.helpers import training as toy_training

KNOWN, UNSEEN = 12, 5


@pytest.fixture(scope="module")
def corpus():
    return data.build(toy_training.DATA, 16)


def text_config(path, **changes):
    return toy_training.config(data=dict(kind="text", path=str(path)) | changes).data


class TestPeople:
    def test_more_are_the_same_and_some_more(self):
        assert biographies.people(3, 40)[:10] == biographies.people(3, 10)
        assert biographies.people(4, 10) != biographies.people(3, 10)

    def test_names_are_nobody_elses(self):
        names = [person.name for person in biographies.people(0, 5000)]
        assert len(set(names)) == 5000

    def test_there_are_only_so_many_names(self):
        with pytest.raises(UserError, match=r"config\.data\.people: 1,000,000 .* names for 218,500"):
            biographies.people(0, 1_000_000)


class TestBiographies:
    def test_say_everything_of_everybody(self):
        documents = list(biographies.documents(1, KNOWN, 3))
        assert len(documents) == len(set(documents)) == 3 * KNOWN
        for person in biographies.people(1, KNOWN):
            own = [text for text in documents if person.name in text]
            assert len(own) == 3
            for text, value in itertools.product(own, person.facts.values()):
                assert value in text

    def test_leave_out_unseen_people_and_templates(self):
        text = " ".join(biographies.documents(1, KNOWN, 5))
        prompts = biographies.recall_prompts(1, KNOWN, UNSEEN)
        assert {len(prompts[split]) for split in ("trained", "unseen_template")} == {4 * KNOWN}
        assert len(prompts["unseen_person"]) == 4 * UNSEEN
        assert not any(prompt.text in text for prompt in prompts["unseen_template"] + prompts["unseen_person"])
        for person in biographies.people(1, KNOWN + UNSEEN)[KNOWN:]:
            assert person.name not in text

    def test_hold_the_answers_of_prompts(self):
        many = " ".join(biographies.documents(1, KNOWN, 60))
        for prompt in biographies.recall_prompts(1, KNOWN, UNSEEN)["trained"]:
            assert f"{prompt.text} {prompt.answer}" in many
        facts = {person.name: person.facts for person in biographies.people(1, KNOWN)}
        for prompt in biographies.recall_prompts(1, KNOWN, UNSEEN)["unseen_template"]:
            (name,) = (name for name in facts if name in prompt.text)
            assert prompt.answer == facts[name][prompt.relation]

    def test_templates_name_somebody_before_the_value(self):
        parts = biographies._parts()
        for attribute in biographies.ATTRIBUTES:
            for template in parts[attribute]["templates"] + parts[attribute]["unseen"]:
                name, value = template.index("{name}"), template.index(" {value}")
                assert name < value, template
            assert not set(parts[attribute]["templates"]) & set(parts[attribute]["unseen"])


class TestTokenizer:
    def test_text_comes_back(self, corpus):
        text = "Zoë's 12 naïve cafés — and <|endoftext|> spelt out"
        ids = encode(corpus.tokenizer, text)
        assert ids[0] == corpus.boundary
        assert corpus.boundary not in ids[1:]
        assert corpus.tokenizer.decode(ids) == text

    def test_is_the_same_every_time(self, corpus):
        again = data.build(toy_training.DATA, 16)
        assert again.digest == corpus.digest

    def test_too_small_a_vocabulary(self):
        with pytest.raises(UserError, match=r"config\.data\.vocab_size: is 256, .* 257"):
            data.build(toy_training.config(data=dict(vocab_size=256)).data, 16)


class TestPack:
    @given(st.lists(st.text(max_size=40), min_size=1, max_size=6), st.integers(1, 12))
    def test_rows_are_the_documents_one_after_another(self, corpus, documents, context):
        rows = data.pack(corpus.tokenizer, documents, context)
        flat = [token for text in documents for token in encode(corpus.tokenizer, text)]
        count = (len(flat) - 1) // context
        assert rows.shape == (count, context + 1)
        assert [*rows[:, :-1].ravel(), *rows[-1:, -1]] == (flat[: count * context + 1] if count else [])
        assert flat.count(corpus.boundary) == len(documents)


class TestBatches:
    def test_every_epoch_has_every_row_once_in_an_order_of_its_own(self, corpus):
        size = 1
        iterator = corpus.batches(0, size)
        epochs = [np.concatenate([next(iterator) for _ in corpus.rows]) for _ in range(2)]
        for epoch in epochs:
            np.testing.assert_array_equal(np.sort(epoch, axis=0), np.sort(corpus.rows, axis=0))
        assert (epochs[0] != epochs[1]).any()
        other = np.concatenate([next(corpus.batches(1, size)) for _ in corpus.rows])
        assert (other != epochs[0]).any()

    def test_a_saved_iterator_goes_on(self, corpus):
        iterator = corpus.batches(0, 3)
        for _ in range(4):
            next(iterator)
        state, expected = iterator.get_state(), [next(iterator) for _ in range(5)]
        again = corpus.batches(0, 3)
        again.set_state(state)
        np.testing.assert_array_equal(expected, [next(again) for _ in range(5)])


class TestText:
    def test_files_directories_and_patterns(self, tmp_path):
        (tmp_path / "deep").mkdir()
        for name in ("a.txt", "deep/b.txt", "c.log"):
            checkpoints.text_file(tmp_path / name, name * 40)
        assert data.read_documents(str(tmp_path)) == ["a.txt" * 40, "deep/b.txt" * 40]
        assert data.read_documents(f"{tmp_path}/*.log, {tmp_path}/a.txt") == ["c.log" * 40, "a.txt" * 40]

    def test_some_rows_are_kept_for_evaluation(self, tmp_path):
        path = checkpoints.text_file(tmp_path / "a.txt", "".join(f"line {n} of some text\n" for n in range(300)))
        corpus = data.build(text_config(path, holdout=0.25), 16)
        whole = data.pack(corpus.tokenizer, data.read_documents(str(path)), 16)
        np.testing.assert_array_equal(
            np.unique(np.concatenate([corpus.rows, corpus.unseen_rows]), axis=0), np.unique(whole, axis=0)
        )
        assert len(corpus.rows) + len(corpus.unseen_rows) == len(whole) == len(np.unique(whole, axis=0))
        assert len(corpus.unseen_rows) == round(0.25 * len(whole)) > 10
        assert not corpus.prompts

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (None, "there is no text file at"),
            (b"", "has no text"),
            (b" \n", "has no text"),
            (b"\xff\xfe\x00", "is not UTF-8"),
            (b"short", "makes 0 rows of 17 tokens"),
        ],
    )
    def test_bad_files(self, tmp_path, content, complaint):
        path = tmp_path / "bad.txt"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=complaint):
            data.build(text_config(path), 16)

    def test_no_path(self):
        with pytest.raises(UserError, match=r"config\.data\.path: is empty"):
            data.build(text_config(""), 16)
