"""Tokenizers from GGUF fields against those that the fields are taken from."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_jax.text.tokenizer import NORMAL, SPACE, from_gguf

sentencepiece = pytest.importorskip("sentencepiece", reason="tests/parity/requirements.txt is not installed")

README = Path(__file__).parent.parent.parent / "README.md"


@pytest.fixture(scope="module", params=[True, False], ids=["space first", "as it is"])
def both(request, tmp_path_factory):
    """SentencePiece's own, and ours from what llama.cpp's converter takes from it."""
    path = tmp_path_factory.mktemp("sentencepiece") / "tiny"
    sentencepiece.SentencePieceTrainer.train(
        input=str(README),
        model_prefix=str(path),
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        minloglevel=9,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=f"{path}.model")
    ids = range(theirs.get_piece_size())
    kinds = [(theirs.is_unknown, 2), (theirs.is_control, 3), (theirs.is_byte, 6)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [theirs.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [next((kind for is_kind, kind in kinds if is_kind(i)), NORMAL) for i in ids],
        "tokenizer.ggml.bos_token_id": theirs.bos_id(),
        "tokenizer.ggml.add_space_prefix": request.param,
    }
    return theirs, from_gguf(metadata, "x.gguf")


texts = st.text(st.characters(exclude_characters=SPACE, exclude_categories=["Cs", "Cc"]), max_size=30)


@given(texts | st.text("the ablation of 12, each", max_size=40) | st.sampled_from(README.read_text().splitlines()))
def test_text_is_what_sentencepiece_makes_of_it(both, text):
    theirs, ours = both
    found = ours.encode(text)
    assert found.ids == [theirs.bos_id(), *theirs.encode(text)]
    assert ours.decode(found.ids) == text
