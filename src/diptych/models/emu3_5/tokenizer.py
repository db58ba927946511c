"""Emu3.5's tokenizer from its two vocabulary files, without tiktoken.

`emu3.tiktoken` has Qwen's ranks, one line `base64 rank` each. Behind them come 3 + 205 special tokens that are written nowhere, then the
lines of `emu3_vision_tokens.txt`: three tokens around pictures, and the visual tokens. Those are left out here, so that no text can become
one: code c has the id `len(tokenizer) + c`.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

RANKS, VISUAL = "emu3.tiktoken", "emu3_vision_tokens.txt"
BOS, EOS, PAD = "<|extra_203|>", "<|extra_204|>", "<|endoftext|>"
BEGIN_ANSWER, END_ANSWER = "<|extra_100|>", "<|extra_101|>"
THOUGHTS = (("<|extra_60|>", "<|extra_61|>"), ("<|extra_50|>", "<|extra_51|>"))  # of the whole answer, of one picture
BEGIN, SIZE_END, ROW_END, END = "<|image start|>", "<|image token|>", "<|extra_200|>", "<|image end|>"
SPECIAL = (PAD, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
AROUND = (SIZE_END, BEGIN, END)  # the first lines of the file of visual tokens
COPY = "copy it again from the release's language model or its tokenizer folder"
_PATTERN = (  # Qwen's: digits stand alone
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_ranks(path: Path) -> list[bytes]:
    """Tokens in the order of their ranks. Raises ValueError naming the file, and the line that is damaged."""
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(_lines(path), start=1):
        try:
            token, rank = line.split()
            ranks[int(rank)] = base64.b64decode(token, validate=True)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path} is damaged in line {number} ({error}); {COPY}") from error
    tokens = [ranks[rank] for rank in sorted(ranks)]
    if sorted(ranks) != list(range(len(ranks))) or len(set(tokens)) < len(tokens) or {bytes([i]) for i in range(256)} - set(tokens):
        raise ValueError(f"{path} does not number its tokens from 0, or lacks one of a single byte; {COPY}")
    return tokens


def count_codes(path: Path) -> int:
    """Visual tokens in the file. Raises ValueError naming it where they are others, or in another order."""
    lines = _lines(path)
    wanted = [*AROUND, *(f"<|visual token {code:06d}|>" for code in range(len(lines) - len(AROUND)))]
    if lines != wanted or len(lines) == len(AROUND):
        number = next((n for n, (line, want) in enumerate(zip(lines, wanted, strict=False), start=1) if line != want), len(lines))
        raise ValueError(f"{path} is damaged in line {number}: it must hold {', '.join(AROUND)}, then the visual tokens in order; {COPY}")
    return len(lines) - len(AROUND)


def read_tokenizer(folder: Path) -> tuple[PreTrainedTokenizerFast, int]:
    """The tokenizer without visual tokens, and their number. Raises ValueError naming a file that is missing or damaged."""
    return build_tokenizer(read_ranks(folder / RANKS)), count_codes(folder / VISUAL)


def build_tokenizer(tokens: list[bytes]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the same ids as tiktoken: two neighbours are merged where the joined token has the lowest rank, and a piece
    that is a token as it stands is not taken apart."""
    letters = {byte: letter for byte, letter in bytes_to_unicode().items()}
    words = [token.decode("latin-1").translate(letters) for token in tokens]
    vocabulary = {word: rank for rank, word in enumerate(words)}
    splits = ((word[:at], word[at:]) for word in words for at in range(1, len(word)))
    merges = [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, *AROUND)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; {COPY}")
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {COPY}") from error
