"""What a family asks of its tokenizer and vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from diptych.doctor.files import read_json_object
from diptych.models import chameleon, emu3, janus
from diptych.models.vila_u import model as vila_u

TOKENS: dict[str, tuple[str, ...]] = {  # family -> what stands around pictures
    "janus": (janus.BEGIN, janus.END, janus.PLACEHOLDER),
    "emu3": (emu3.BEGIN, emu3.SIZE_END, emu3.CODES_END, emu3.END),
    "chameleon": (chameleon.BEGIN, chameleon.END),
    "vila_u": (vila_u.BEGIN, vila_u.END, vila_u.SPACE),
}
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SETTINGS = "tokenizer_config.json"


class StandIn:
    """In the place of a tokenizer that cannot be read: has every token, at id 0, and one id for each character."""

    class _Everything(dict[str, int]):
        def get(self, key: str, default: Any = None) -> int:
            return 0

    eos_token_id = bos_token_id = pad_token_id = 0
    eos_token = bos_token = pad_token = ""
    chat_template = None
    all_special_ids: tuple[int, ...] = ()
    all_special_tokens: tuple[str, ...] = ()

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def get_vocab(self) -> dict[str, int]:
        return self._Everything()

    def encode(self, text: str, **_: Any) -> list[int]:
        return [0] * len(text)


class SizedStandIn(StandIn):
    """Of a family that asks how many tokens there are."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


class StandInMap:
    """In the place of a vocabulary_map that will not do: code i has id i."""

    def __init__(self, codec: Any) -> None:
        number = getattr(codec, "codebook_size", None) or codec.num_embeddings
        self.img2bpe, self.eol_token_id = {code: code for code in range(number)}, 0


def read_tokenizer(folder: Path, problems: list[str], check: Callable[[Any, Path], None] | None = None) -> Any:
    """None, and a problem, where files are missing or broken. `check`: the loader's own, which raises ValueError."""
    before = len(problems)
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        problems.append(f"{folder} has no tokenizer: none of {', '.join(_VOCABULARIES)}; copy the tokenizer files of the release")
    if (folder / "tokenizer.json").is_file():
        read_json_object(folder / "tokenizer.json", problems)
    read_json_object(folder / _SETTINGS, problems)
    if len(problems) > before:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raise bare Exception
        problems.append(f"the tokenizer in {folder} cannot be read: {str(error)[:300]}; copy the tokenizer files of the release")
        return None
    if check is not None:
        try:
            check(tokenizer, folder)
        except ValueError as error:
            problems.append(str(error))
    return tokenizer


def check_words(
    family: str,
    folder: Path,
    tokenizer: Any,
    rows: int,
    problems: list[str],
    generation: Any = None,
    tokens: Sequence[str] | None = None,
) -> None:
    """Tokens that are missing, and ids without a row of the embedding. `rows`: of the text embedding. `tokens`: where they are not those
    of TOKENS."""
    if tokenizer is None:
        return
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    lacking = [token for token in tokens or TOKENS[family] if token not in vocabulary]
    if lacking:
        problems.append(
            f"the tokenizer in {folder} lacks {', '.join(map(repr, lacking))}, which {family} needs around pictures; use the tokenizer "
            "files that came with the checkpoint"
        )
    needs_pad = family == "janus" and janus.PAD not in vocabulary and getattr(generation, "pad_token_id", None) is None
    needed = ["bos", "eos", *(["pad"] if needs_pad else [])]
    unnamed = [name for name in needed if getattr(tokenizer, f"{name}_token_id") is None]
    if unnamed:
        problems.append(
            f"the tokenizer in {folder} names no {' and no '.join(f'{name}_token' for name in unnamed)}; add "
            f"{' and '.join(f'{name}_token' for name in unnamed)} to {_SETTINGS} as the release has it"
        )
    last = max(vocabulary.values(), default=-1)
    if last >= rows:
        token = next(token for token, i in vocabulary.items() if i == last)
        problems.append(
            f"the tokenizer in {folder} has ids up to {last} ({token!r}), but the embedding has {rows} rows; use the tokenizer that "
            "belongs to the weights"
        )


def check_maps(family: str, folder: Path, hf: Any, rows: int, problems: list[str]) -> bool:
    """`vocabulary_map` of a family whose codes are text tokens: one id for each code, inside the embedding, and Emu3's row end.

    Returns whether it will do.
    """
    mapping, codec = hf.model.vocabulary_mapping, hf.config.vq_config
    codes, token = (codec.codebook_size, "<|visual token 000000|> and so on") if family == "emu3" else (codec.num_embeddings, "IMGIMG...Z")
    wrong = []
    try:
        named = dict(mapping.img2bpe)
    except (ValueError, KeyError, TypeError) as error:
        named, wrong = {}, [f"has an image token that is no number ({error})"]
    if not wrong and sorted(named) != list(range(codes)):
        wrong.append(f"names {len(set(named) & set(range(codes)))} of the {codes} image codes ({token})")
    if named and max(named.values()) >= rows:
        wrong.append(f"gives codes ids up to {max(named.values())}, but the embedding has {rows} rows")
    if family == "emu3" and mapping.eol_token_id is None:
        wrong.append(f"lacks {emu3.ROW_END!r}, which ends a row of codes")
    if wrong:
        problems.append(f"the vocabulary_map in {folder / 'config.json'} {'; it '.join(wrong)}. Use the release's config.json")
    return not wrong
