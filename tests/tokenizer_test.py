import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from hydra_jax.errors import UserError
from hydra_jax.text.tokenizer import (
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    USER_DEFINED,
    answer_tokens,
    encode,
    from_file,
    from_gguf,
    spelled,
    token_of,
)
from tests.helpers import checkpoints

TEXT = "I'll say  12345 WORDS: naïve\n\n they'RE"
SPLITS = {
    "gpt-2": ["I", "'ll", " say", " ", " 12345", " WORDS", ":", " naïve", "\n\n", " they", "'", "RE"],
    "smollm": ["I", "'ll", " say", "  ", *"12345", " WORDS", ":", " naïve", "\n\n", " they", "'", "RE"],
    "llama-bpe": ["I", "'ll", " say", " ", " ", "123", "45", " WORDS", ":", " naïve", "\n\n", " they", "'RE"],
    "qwen2": ["I", "'ll", " say", " ", " ", *"12345", " WORDS", ":", " naïve", "\n\n", " they", "'RE"],
}


def byte_level(pre, **fields):
    types = [CONTROL if token == checkpoints.CONTROL else NORMAL for token in checkpoints.VOCABULARY]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": checkpoints.VOCABULARY,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in checkpoints.MERGES],
        "tokenizer.ggml.bos_token_id": 0,
    } | {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def by_scores(**fields):
    """A tiny SentencePiece vocabulary: what scores higher is merged first."""
    pieces = {"<unk>": 0, "<s>": 0, **{f"<0x{byte:02X}>": 0 for byte in range(256)}, SPACE: -9, "a": -8, "b": -7}
    pieces |= {"ab": -1, "ba": -2, "aba": -3, f"{SPACE}a": -4, "<extra>": 0}
    types = [2, CONTROL, *[6] * 256, *[NORMAL] * 7, USER_DEFINED]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(pieces),
        "tokenizer.ggml.scores": [float(score) for score in pieces.values()],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
    } | {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


@pytest.mark.parametrize(("pre", "words"), SPLITS.items(), ids=SPLITS)
def test_text_is_split_as_the_file_names_it(pre, words):
    spans = [span for _, span in PRE_TOKENIZERS[pre]().pre_tokenize_str(TEXT)]
    assert [TEXT[start:end] for start, end in spans] == words


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_a_byte_level_tokenizer_loses_nothing(pre):
    built = from_gguf(byte_level(pre), "x.gguf")
    tokens = built.encode(TEXT, add_special_tokens=False).ids
    assert built.decode(tokens) == TEXT


@pytest.mark.parametrize(
    ("metadata", "begins"),
    [
        (byte_level("gpt-2"), False),
        (byte_level("gpt-2", add_bos_token=True), True),
        (byte_level("llama-bpe"), True),
        (byte_level("llama-bpe", add_bos_token=False), False),
        (by_scores(), True),
        (by_scores(add_bos_token=False), False),
    ],
)
def test_a_prompt_begins_as_the_file_says(metadata, begins):
    built, first = from_gguf(metadata, "x.gguf"), metadata["tokenizer.ggml.bos_token_id"]
    tokens = encode(built, "ab")
    assert (tokens[0] == first) == begins
    assert tokens.count(first) == begins
    assert built.decode(tokens).strip() == "ab"


def test_the_highest_score_is_merged_first():
    built = from_gguf(by_scores(), "x.gguf")
    assert built.encode("aba", add_special_tokens=False).tokens == [SPACE, "aba"]
    assert built.encode("bab", add_special_tokens=False).tokens == [SPACE, "b", "ab"]
    unspaced = from_gguf(by_scores(add_space_prefix=False), "x.gguf")
    assert unspaced.encode("bab", add_special_tokens=False).tokens == ["b", "ab"]


def test_a_token_of_a_megabyte_is_no_more_work_than_others():
    metadata = by_scores()
    metadata["tokenizer.ggml.tokens"][-1] = "a" * (1 << 20)
    assert from_gguf(metadata, "x.gguf").encode("bab", add_special_tokens=False).tokens == [SPACE, "b", "ab"]


def test_what_scores_do_not_know_is_spelled_in_bytes():
    built = from_gguf(by_scores(), "x.gguf")
    assert built.encode("é", add_special_tokens=False).tokens == [SPACE, "<0xC3>", "<0xA9>"]
    assert built.decode(built.encode("a é b").ids) == "a é b"


def test_defined_tokens_are_whole():
    built = from_gguf(by_scores(), "x.gguf")
    assert built.encode("a<extra>b").tokens.count("<extra>") == 1
    assert built.decode(built.encode("a<s>b").ids) != "a<s>b"  # control tokens stand for no text


def pieces(built, text, answer):
    return [built.id_to_token(token) for token in answer_tokens(built, text, answer)]


def test_an_answer_continues_its_text():
    built = from_gguf(by_scores(), "x.gguf")
    assert pieces(built, "b", "a") == [f"{SPACE}a", "a"]


@pytest.fixture
def written(tmp_path):
    def write(made):
        made.save(str(tmp_path / "tokenizer.json"))
        return from_file(tmp_path / "tokenizer.json")

    return write


def test_padding_and_truncation_of_other_uses_are_left_out(written):
    made, expected = checkpoints.tokenizer(), checkpoints.tokenizer().encode("of the").ids
    made.enable_padding(length=9)
    assert encode(written(made), "of the") == expected
    made.no_padding()
    made.enable_truncation(max_length=1)
    assert encode(written(made), "of the") == expected


def test_a_prompt_ends_with_its_own_last_token(written):
    made = checkpoints.tokenizer()
    first, bare = checkpoints.VOCABULARY.index(checkpoints.CONTROL), made.encode("of the").ids
    special = [(checkpoints.CONTROL, first)]
    made.post_processor = processors.TemplateProcessing([checkpoints.CONTROL, "$A", checkpoints.CONTROL], None, special)
    built = written(made)
    assert encode(built, "of the") == [first, *bare]
    assert encode(built, f"of the{checkpoints.CONTROL}") == [first, *bare, first]  # what the prompt says itself is kept
    assert encode(built, "") == [first] * 2
    assert answer_tokens(built, "of", "the")[0] == bare[-1]


def test_other_kinds_are_refused():
    for metadata in (byte_level("chameleon"), {"tokenizer.ggml.model": "bert"}, {}):
        with pytest.raises(UserError, match=r"x\.gguf: tokenizer .* not supported"):
            from_gguf(metadata, "x.gguf")


def test_a_tokenizer_that_fails_at_work_is_refused(written):
    made = checkpoints.tokenizer()
    made.decoder = decoders.Strip("t", 3, 3)
    with pytest.raises(UserError, match="is not a tokenizer"):
        written(made)


def test_a_prompt_that_a_tokenizer_fails_on_is_named():
    made = Tokenizer(models.Unigram([("a", -1.0)]))  # without a token for what it does not know
    with pytest.raises(UserError, match="prompt 'b'"):
        encode(made, "b")
    made.normalizer = normalizers.Sequence([normalizers.Replace("b", ""), normalizers.Strip()])
    with pytest.raises(UserError, match="answer 'b'"):
        answer_tokens(made, "a", "b")


def words(*tokens):
    """A byte-level tokenizer that merges only what makes these whole words."""
    merges, vocabulary = [], sorted(pre_tokenizers.ByteLevel.alphabet())
    for token in (pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(word)[0][0] for word in tokens):
        for cut in range(2, len(token) + 1):
            merges.append((token[: cut - 1], token[cut - 1 : cut]))
            vocabulary.append(token[:cut])
    vocabulary = list(dict.fromkeys(vocabulary))
    metadata = byte_level("gpt-2", tokens=vocabulary, merges=[" ".join(merge) for merge in dict.fromkeys(merges)])
    metadata["tokenizer.ggml.token_type"] = [NORMAL] * len(vocabulary)
    return from_gguf(metadata, "x.gguf")


WORDS = words(" is", " cat", "cat", " 52", "52", "一", " the", "the")
SPELLED = {
    "after a word": ("It is the", "cat", [" cat", "cat"]),
    "spelled with a space": ("It is the", " cat", [" cat"]),
    "spelled with a space after a space": ("It is ", " cat", [" cat"]),
    "after a space": ("It is the ", "cat", ["cat"]),
    "after a line": ("It is:\n", "cat", ["cat"]),
    "after a bracket": ("It is (", "cat", ["cat"]),
    "after an opening quote": ("It is \u201c", "cat", ["cat"]),
    "after a straight quote that opens": ('It is "', "cat", ["cat"]),
    "after a straight quote that closes": ('It "is"', "cat", [" cat", "cat"]),
    "after a hyphen": ("the-", "cat", ["cat"]),
    "after a slash": ("the/", "cat", ["cat"]),
    "after an underscore": ("the_", "cat", ["cat"]),
    "after an apostrophe": ("the'", "cat", ["cat"]),
    "after a full stop": ("It is.", "cat", [" cat", "cat"]),
    "a digit after a digit": ("It is 17", "52", ["52", " 52"]),
    "a digit after a word": ("It is", "52", [" 52", "52"]),
    "closing punctuation": ("It is (the", ")", [")"]),
    "a comma": ("It is", ", the", [","]),
    "after an ideograph": ("法国的首都是", "一", ["一"]),
    "an ideograph after a word": ("It is", "一", ["一"]),
    "a word after full-width punctuation": ("是：", "cat", ["cat"]),
    "a word after Thai": ("คือ", "cat", ["cat"]),
    "a word after Korean": ("수도는", "cat", [" cat", "cat"]),
    "one whose space is a token of its own": ("It is", "x", [" ", "x"]),
    "one of several tokens": ("It", "them", [" the", "the"]),
}


@pytest.mark.parametrize(("text", "answer", "tokens"), SPELLED.values(), ids=SPELLED)
def test_an_answer_is_spelled_as_a_reader_may_write_it(text, answer, tokens):
    assert [WORDS.decode([token]) for token in answer_tokens(WORDS, text, answer)] == tokens


def test_an_answer_after_a_space_is_not_given_another_by_sentencepiece():
    built = from_gguf(by_scores(), "x.gguf")
    assert pieces(built, "b", "ab") == [SPACE, "ab"]
    assert pieces(built, "b ", "a") == ["a"]
    assert pieces(built, "b ", " a") == [f"{SPACE}a"]
    assert pieces(built, "b", " b") == [SPACE]  # given so


@given(st.text(max_size=8), st.text(min_size=1, max_size=8))
def test_any_answer_has_one_or_two_tokens_that_differ(text, answer):
    found = answer_tokens(WORDS, text, answer)
    assert 1 <= len(found) == len(set(found)) <= 2
    assert len(answer_tokens(WORDS, text, f" {answer}")) == 1


def test_the_most_likely_token_is_read_where_it_begins_the_answer():
    assert spelled((5, 3), 3) == 3
    assert spelled((5, 3), 4) == 5


def test_a_token_is_given_by_its_text():
    assert WORDS.decode([token_of(WORDS, " cat", "target", "tiny")]) == " cat"
    assert WORDS.decode([token_of(WORDS, "cat", "target", "tiny")]) == "cat"
    built = from_gguf(by_scores(), "x.gguf")
    assert built.id_to_token(token_of(built, " a", "target", "tiny")) == f"{SPACE}a"
    assert built.id_to_token(token_of(built, "a", "target", "tiny")) == "a"
    assert built.id_to_token(token_of(built, "aba", "target", "tiny")) == "aba"
    assert built.id_to_token(token_of(built, "<extra>", "target", "tiny")) == "<extra>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            " catty",
            r"target: ' catty' is 3 tokens of tiny \(' cat', 't', 'y'\); give one token, as in ' Paris', or an id",
        ),
        ("x" * 20, r"20 tokens .*\('x', ('x', ){7}\.\.\.\)"),
        ("", "target: '' is no token of tiny; give one token"),
    ],
)
def test_what_is_no_token_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        token_of(WORDS, text, "target", "tiny")


def test_tokens_that_are_not_one_are_named_with_their_spaces():
    with pytest.raises(UserError, match=r"' a b' is 3 tokens of tiny \(' a', ' ', 'b'\)"):
        token_of(from_gguf(by_scores(), "x.gguf"), " a b", "target", "tiny")


def test_a_text_that_a_vocabulary_does_not_know_is_no_token():
    made = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    assert token_of(made, "a", "target", "tiny") == 0
    assert token_of(made, "<unk>", "target", "tiny") == 1
    with pytest.raises(UserError, match="target: 'b' is no token of tiny; give one token"):
        token_of(made, "b", "target", "tiny")
