"""Text to tokens: a `tokenizers` tokenizer from `tokenizer.json` or from a GGUF file's own fields."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hydra_jax.errors import UserError


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "gpt-2": _byte_level,
}
"""By GGUF's `tokenizer.ggml.pre`."""

_CONTROL = 3  # GGUF's token type of those that stand for no text


def from_file(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`.

    Raises:
      UserError: if the file is damaged.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise UserError(f"{path}: is not a tokenizer ({error}); fetch the model again") from error


def from_gguf(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that GGUF metadata describes: a byte-level BPE.

    Raises:
      UserError: if it is of a kind that is not supported.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{path}: tokenizer {kind}/{pre} is not supported (known: gpt2/{', gpt2/'.join(PRE_TOKENIZERS)});"
            " use the model's Hugging Face directory, which has a tokenizer.json"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    built.pre_tokenizer = PRE_TOKENIZERS[pre]()
    built.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", [])
    built.add_special_tokens(
        [AddedToken(t, special=True) for t, kind in zip(tokens, types, strict=False) if kind == _CONTROL]
    )
    return built


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a prompt, with whatever the tokenizer puts before one (a beginning-of-sequence token)."""
    return tokenizer.encode(text).ids


def answer_token(tokenizer: Tokenizer, text: str, answer: str) -> int:
    """The first token of `answer` where it continues `text` after a space."""
    prompt, whole = encode(tokenizer, text), encode(tokenizer, f"{text} {answer}")
    if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
        return whole[len(prompt)]
    return tokenizer.encode(f" {answer}", add_special_tokens=False).ids[0]
