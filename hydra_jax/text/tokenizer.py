"""Text to tokens: a `tokenizers` tokenizer from `tokenizer.json` or from a GGUF file's own fields."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from hydra_jax.errors import UserError, reason, shown
from hydra_jax.text.spelling import spellings

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPLIT = (
    CONTRACTIONS
    + r"|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Words, numbers of so many digits, punctuation and space, as GPT-4 and those after it split text."""


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(digits: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    pattern = Regex(SPLIT.format(digits=digits))
    return lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "phi-2"), _gpt2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _digits),
    **dict.fromkeys((*LLAMA3, "dbrx", "smaug-bpe"), _split("{1,3}")),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), _split("")),
}
"""Makers of pre-tokenizers by what GGUF's `tokenizer.ggml.pre` calls them."""

NORMAL, _, CONTROL, USER_DEFINED = range(1, 5)
"""GGUF's types of tokens; control ones stand for no text."""

SPACE = "\u2581"
"""SentencePiece's sign for a space."""

LINE_END = "\n"
MOST_SHOWN = 8
"""The most tokens of a text that an error message lists."""


@contextlib.contextmanager
def _faults(what: str) -> Iterator[None]:
    """Turn what `tokenizers` raises into our error: a bare Exception, or a panic, which has no public name."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({reason(error)}); fetch the model again") from error


def from_file(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`, but for any padding and truncation that it was last used with.

    Raises:
      UserError: if the file is damaged.
    """
    with _faults(f"{path}: is not a tokenizer"):
        made = Tokenizer.from_file(str(path))
        for token in range(made.get_vocab_size()):  # every answer can be shown
            made.decode([token])
    made.no_padding()
    made.no_truncation()
    return made


def from_gguf(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """Build the tokenizer that GGUF metadata describes: a byte-level BPE, or SentencePiece's BPE by scores.

    Raises:
      UserError: if it is of a kind that is not supported.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if kind == "llama":
        built = _by_scores(metadata, tokens, types)
    elif kind == "gpt2" and pre in PRE_TOKENIZERS:
        built = _byte_level(metadata, tokens, pre)
    else:
        raise UserError(
            f"{path}: tokenizer {kind}/{pre} is not supported (known: llama, gpt2/{', gpt2/'.join(PRE_TOKENIZERS)});"
            " use the model's Hugging Face directory, which has a tokenizer.json"
        )
    for special, wanted in ((True, CONTROL), (False, USER_DEFINED)):
        named = [token for token, type in zip(tokens, types, strict=False) if type == wanted]
        added = [AddedToken(token, special=special, normalized=False) for token in named]
        (built.add_special_tokens if special else built.add_tokens)(added)
    if metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in LLAMA3):
        first = metadata["tokenizer.ggml.bos_token_id"]
        built.post_processor = processors.TemplateProcessing(["BOS", "$A"], special_tokens=[("BOS", first)])
    return built


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], pre: str) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in LLAMA3))
    built.pre_tokenizer = PRE_TOKENIZERS[pre]()
    built.decoder = decoders.ByteLevel()
    return built


def _by_scores(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    """Build SentencePiece's BPE: the pair whose whole scores highest is merged first, unknown text is bytes."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pieces = {t for t, type in zip(tokens, types, strict=False) if type in (NORMAL, USER_DEFINED)}
    lengths = sorted({len(piece) for piece in pieces})
    scored = sorted(
        (-score, vocabulary[token[:cut]], vocabulary[token[cut:]], token, cut)
        for token, score in zip(tokens, metadata["tokenizer.ggml.scores"], strict=True)
        if token in pieces
        # Only where pieces could end: a damaged file may have a token of a megabyte, with as many places to cut.
        for cut in itertools.takewhile(len(token).__gt__, lengths)
        if token[:cut] in pieces and token[cut:] in pieces
    )
    merges = [(token[:cut], token[cut:]) for *_, token, cut in scored]
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    built = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    decoding: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(SPACE))
        decoding.append(decoders.Strip(" ", 1, 0))
    built.normalizer = normalizers.Sequence(spaces)
    built.decoder = decoders.Sequence(decoding)
    return built


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a prompt, with what the tokenizer puts before one (a beginning-of-sequence token), not after it.

    Effects are read at the last token, which has to be the prompt's own.

    Raises:
      UserError: if the tokenizer is damaged.
    """
    return encoded(tokenizer, text)[0]


def encoded(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Encode a prompt as `encode` does; return the tokens, and from which character to which each is, (0, 0) for none.

    Raises:
      UserError: if the tokenizer is damaged.
    """
    with _faults(f"prompt {shown(text)}: the model's tokenizer fails"):
        encoding = tokenizer.encode(text)
    own = [position for position, put in enumerate(encoding.special_tokens_mask) if not put]
    length = own[-1] + 1 if own else len(encoding.ids)
    return encoding.ids[:length], encoding.offsets[:length]


def answer_tokens(tokenizer: Tokenizer, text: str, answer: str) -> tuple[int, ...]:
    """Return the tokens that may begin an answer where it continues a text.

    There is one for each way to write it there (`spellings`), the usual one first. Before a number it is in some
    tokenizers the space alone.

    Raises:
      UserError: if the tokenizer is damaged, or has no token for it.
    """
    prompt, found = encode(tokenizer, text), []
    for written in spellings(text, answer):
        whole = encode(tokenizer, text + written)
        if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
            found.append(whole[len(prompt)])
        else:
            found += _inside(tokenizer, written, f"answer {shown(answer)}")[:1]
    if not found:
        raise UserError(f"answer {shown(answer)}: has no token in this model; reword or remove it")
    return tuple(dict.fromkeys(found))


def spelled(candidates: Sequence[int], top: int) -> int:
    """Return the token to read for an answer: the model's most likely one, if it begins the answer, else the first.

    Args:
      candidates: from `answer_tokens`.
      top: the most likely next token.
    """
    return top if top in candidates else candidates[0]


def _inside(tokenizer: Tokenizer, piece: str, what: str) -> list[int]:
    """Return the tokens of a piece of text as it is inside of a text, with no space put before it.

    Raises:
      UserError: if the tokenizer is damaged; says `what` it was about.
    """
    with _faults(f"{what}: the model's tokenizer fails"):
        alone = tokenizer.encode(piece, add_special_tokens=False).ids
    # SentencePiece puts a space before a text, then before a line's end here, which few tokens go on after.
    with contextlib.suppress(UserError), _faults(what):  # of a vocabulary without it
        end = tokenizer.encode(LINE_END, add_special_tokens=False).ids
        line = tokenizer.encode(LINE_END + piece, add_special_tokens=False).ids
        if line[: len(end)] == end and len(line) > len(end):
            return line[len(end) :]
    return alone


def token_of(tokenizer: Tokenizer, text: str, argument: str, model_name: str) -> int:
    """Return the id of a token that is given by its text, such as " Paris".

    Args:
      tokenizer: the model's.
      text: the token's, with the space before it if it has one.
      argument: what it is given for, for the error message.
      model_name: likewise.

    Raises:
      UserError: if it is no token of the model, or several.
    """
    ids = _inside(tokenizer, text, argument)
    unknown = getattr(tokenizer.model, "unk_token", None)  # it stands for any text, and is meant only by its own
    if unknown is not None and tokenizer.token_to_id(unknown) in ids and text != unknown:
        ids = []
    if len(ids) == 1:
        return ids[0]
    remedy = "give one token, as in ' Paris', or an id"
    if not ids:
        raise UserError(f"{argument}: {shown(text)} is no token of {model_name}; {remedy}")
    pieces = ", ".join(repr(piece) for piece in _pieces(tokenizer, ids[:MOST_SHOWN]))
    more = ", ..." if len(ids) > MOST_SHOWN else ""
    raise UserError(f"{argument}: {shown(text)} is {len(ids)} tokens of {model_name} ({pieces}{more}); {remedy}")


def _pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Return the text of each of some tokens, with the space before it, which decoding one by itself may cut off."""
    ends = [tokenizer.decode(ids[:length], skip_special_tokens=False) for length in range(len(ids) + 1)]
    pieces = [after[len(before) :] for before, after in itertools.pairwise(ends)]
    first = tokenizer.id_to_token(ids[0]) or ""
    return [f" {pieces[0]}" if first.startswith(SPACE) and not pieces[0].startswith(" ") else pieces[0], *pieces[1:]]
