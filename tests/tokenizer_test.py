import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from hydra_jax.errors import UserError
from hydra_jax.text.tokenizer import (
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    USER_DEFINED,
    answer_token,
    encode,
    from_file,
    from_gguf,
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


def test_an_answer_continues_its_text():
    built = from_gguf(by_scores(), "x.gguf")
    assert built.id_to_token(answer_token(built, "b", "a")) == f"{SPACE}a"


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
    assert answer_token(built, "of", "the") == bare[-1]


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
        answer_token(made, "a", "b")
