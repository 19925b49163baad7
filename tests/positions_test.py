import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers, processors

from hydra_jax.errors import UserError
from hydra_jax.text.positions import place_of
from hydra_jax.text.prompt import Prompt
from hydra_jax.text.tokenizer import encode, from_gguf
from tests.tokenizer_test import by_scores, byte_level

TEXT = "of the of in é the in"
BYTES = from_gguf(byte_level("gpt-2"), "x.gguf")
BYTES_BOS = from_gguf(byte_level("llama-bpe"), "x.gguf")
PIECES = from_gguf(by_scores(), "x.gguf")


def trimmed():
    """A byte-level tokenizer whose tokens do not count the space before them as theirs."""
    built = from_gguf(byte_level("gpt-2"), "x.gguf")
    built.post_processor = processors.ByteLevel(trim_offsets=True)
    return built


TRIMMED = trimmed()


def place(tokenizer, text, position):
    prompt = Prompt("p", text, position=position)
    tokens = encode(tokenizer, text)
    return place_of(tokenizer, prompt, tokens), len(tokens)


def refusal(position, text="of the of", tokenizer=BYTES, **fields):
    with pytest.raises(UserError) as raised:
        place_of(tokenizer, Prompt("p", text, position=position, **fields), encode(tokenizer, text))
    return str(raised.value)


@pytest.mark.parametrize(("position", "index"), [(None, 9), (0, 0), (9, 9), (-1, 9), (-10, 0)])
def test_an_index_counts_from_either_end(position, index):
    prompt = Prompt("p", "", tokens=tuple(range(10)), position=position)
    assert place_of(BYTES, prompt, prompt.tokens) == index


@pytest.mark.parametrize("position", [10, 40, -11, True, 1.5])
def test_an_index_that_is_not_there_is_refused(position):
    prompt = Prompt("x", "", tokens=tuple(range(10)), position=position)
    with pytest.raises(UserError, match="prompt 'x': position"):
        place_of(BYTES, prompt, prompt.tokens)


def test_an_index_past_the_end_is_told_the_tokens():
    prompt = Prompt("x", "", tokens=tuple(range(10)), position=40)
    with pytest.raises(UserError, match="prompt 'x': position 40 is past its end; it has tokens 0-9"):
        place_of(BYTES, prompt, prompt.tokens)


@pytest.mark.parametrize("tokenizer", [BYTES, BYTES_BOS, TRIMMED, PIECES], ids=["bytes", "bos", "trimmed", "pieces"])
@pytest.mark.parametrize("part", ["of the", "he of", "of in", "é", "é the", TEXT])
def test_a_part_of_the_text_means_its_last_token(tokenizer, part):
    index, count = place(tokenizer, TEXT, part)
    end = TEXT.index(part) + len(part)
    # The tokens up to it say the part, and those before it do not.
    tokens = encode(tokenizer, TEXT)
    assert tokenizer.decode(tokens[: index + 1]).strip().startswith(TEXT[:end])
    assert not tokenizer.decode(tokens[:index]).strip().startswith(TEXT[:end])
    assert index < count
    if part == TEXT:
        assert index == count - 1


@given(st.lists(st.sampled_from(["of", "the", "in", "é", "ab", "x", "法国"]), min_size=1, max_size=8), st.data())
def test_the_beginning_of_a_text_ends_where_its_own_tokens_do(words, data):
    number = data.draw(st.integers(1, len(words)))
    text = "<" + " ".join(words)
    part = "<" + " ".join(words[:number])
    for tokenizer in (BYTES, BYTES_BOS, TRIMMED, PIECES):
        index, _ = place(tokenizer, text, part)
        assert index == len(encode(tokenizer, part)) - 1


def test_a_space_belongs_to_the_token_after_it():
    for tokenizer in (BYTES, TRIMMED):
        assert place(tokenizer, "of the", "of ")[0] == place(tokenizer, "of the", "of t")[0] == 1


def test_characters_that_a_normalizer_joins_belong_to_one_token():
    built = trimmed()
    built.normalizer = normalizers.NFC()
    text = "of the cafe\u0301 in"
    tokens = encode(built, text)
    index = place(built, text, "cafe\u0301")[0]
    assert built.decode(tokens[: index + 1]) == "of the café"


def test_what_a_normalizer_leaves_out_is_counted_to_what_is_before():
    built = from_gguf(byte_level("gpt-2"), "x.gguf")
    built.normalizer = normalizers.Strip()
    assert place(built, "of the  ", "the  ")[0] == 1


def test_a_part_that_is_not_there_is_refused():
    assert refusal("cat") == "prompt 'p': position 'cat' is not in its text; give a part of the text, or an index"
    assert "not in its text" in refusal("")


def test_a_part_that_is_there_twice_is_refused():
    assert "position 'of' occurs 2 times in its text; give more of it, or an index" in refusal("of")
    assert "occurs 2 times" in refusal("aa", "aaa")


def test_a_part_of_a_prompt_of_tokens_is_refused():
    assert "is given as tokens; give an index" in refusal("of", "", tokens=(1, 2))
    with pytest.raises(UserError, match="not those of its text"):
        place_of(BYTES, Prompt("p", "of the", position="of", tokens=(1,)), (1,))


def test_a_prompt_whose_text_is_its_tokens_has_parts():
    tokens = tuple(encode(BYTES, "of the"))
    assert place_of(BYTES, Prompt("p", "of the", position="of", tokens=tokens), tokens) == 0
