"""What user text may become: never a control token.

Stand-ins hide the user's characters while a template is rendered, so that it is known which control tokens are the template's; where the
text spells one as well, it is read with a tokenizer that knows control tokens under other names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

NO_CHARACTERS = range(0x40000, 0xE0000)  # code points that Unicode has given to nothing: no white space, no case, in no token
Control = tuple[int, int, int]  # a control token in a string: its id, where its characters begin, where they end


class TextReader:
    """A tokenizer of transformers, and how text is read with it; everything is asked of it once, because large vocabularies answer slowly.

    `controls`: id -> token of the control tokens, which no text may become (`rendered_ids`): special tokens, added ones that are no
    words, and what a family adds for its pictures.
    """

    def set_tokenizer(self, tokenizer: Any, folder: Path) -> None:
        """Raises ValueError where the tokenizer names no begin or end token."""
        for name in ("bos_token", "eos_token"):
            if getattr(tokenizer, f"{name}_id", None) is None:
                raise ValueError(f"the tokenizer in {folder} names no {name}; use the tokenizer files that came with the checkpoint")
        self.tokenizer, self._tokenizer_folder = tokenizer, folder
        self.bos_id, self.eos_id = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
        self.vocabulary: dict[str, int] = tokenizer.get_vocab()
        added = tokenizer.get_added_vocab()
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} if added else set()
        self.controls: dict[int, str] = {}
        self.add_controls({*tokenizer.all_special_ids, *(i for token, i in added.items() if token in special or not is_word(token))})

    def add_controls(self, ids: set[int]) -> None:
        self.controls |= {number: token for token, number in self.vocabulary.items() if number in ids}
        self._renamed: dict[str, Tokenizer] = {}  # see `_read_renamed`

    def rendered_ids(self, shape: str, show: dict[int, str]) -> list[int]:
        """Tokens of a rendered template in which stand-ins hide the user's characters (`stand_ins`).

        They are those of the string that it stands for, as the family's own code reads it, where that finds no control tokens but the
        template's. Where the text spells one, alone or together with what stands beside it, its characters are read as those of
        any word.

        Raises ValueError where the tokenizer cannot do that.
        """
        string = shape.translate(show)
        ids, found = self._read(string)
        if not show or found == (written := self._written(shape, show)):
            return ids
        fast = getattr(self.tokenizer, "is_fast", False)
        ids, read = self._read_renamed(shape, written, show) if fast else (ids, found)
        if self._without_unknown(read) != self._without_unknown(written):
            names = sorted({self.controls[number] for number, *_ in {*found} - {*written}})
            raise ValueError(
                f"the text spells the control token {' or '.join(map(repr, names))} ({string!r:.300}), which the tokenizer in "
                f"{self._tokenizer_folder} cannot read as plain text; write it differently"
            )
        return ids

    def _read(self, string: str) -> tuple[list[int], list[Control]]:
        """Tokens, and the control tokens among them."""
        if not getattr(self.tokenizer, "is_fast", False):  # it tells no places
            ids = self.tokenizer.encode(string, add_special_tokens=False)
            return ids, [(number, 0, 0) for number in ids if number in self.controls]
        return self._with_controls(self.tokenizer(string, add_special_tokens=False).encodings[0])

    def _with_controls(self, encoding: Encoding) -> tuple[list[int], list[Control]]:
        places = zip(encoding.ids, encoding.offsets, strict=True)
        return encoding.ids, [(number, *place) for number, place in places if number in self.controls]

    def _written(self, shape: str, show: dict[int, str]) -> list[Control]:
        """The control tokens that the template wrote: all but those that unknown stand-ins become."""
        return [c for c in self._read(shape)[1] if not any(ord(character) in show for character in shape[c[1] : c[2]])]

    def _without_unknown(self, controls: list[Control]) -> list[int]:
        return [number for number, *_ in controls if number != self.tokenizer.unk_token_id]

    def _read_renamed(self, shape: str, written: list[Control], show: dict[int, str]) -> tuple[list[int], list[Control]]:
        """As `_read`, by a tokenizer that knows control tokens under names which the string does not hold: the template's, and only
        they, are written with these names."""
        string = shape.translate(show)
        mark = next(character for character in map(chr, NO_CHARACTERS) if character not in string)
        if mark not in self._renamed:
            self._renamed[mark] = rename_controls(self.tokenizer.backend_tokenizer, self.controls, mark)
        parts, end = [], 0
        for number, start, stop in written:
            parts += [shape[end:start].translate(show), new_name(number, mark)]  # with the spaces that some tokens take in
            end = stop
        string = "".join([*parts, shape[end:].translate(show)])
        return self._with_controls(self._renamed[mark].encode(string, add_special_tokens=False))


def is_word(token: str) -> bool:
    """Whether an added token that is not special is only text which got a token of its own, as "ü" in Janus' tokenizer."""
    return len(token) == 1 or all(character.isalnum() or character.isspace() for character in token)


def stand_ins(texts: Iterable[str]) -> tuple[dict[int, str], dict[int, str]]:
    """Two tables for `str.translate`: one that hides every character of the texts behind one that no template writes and no token
    has, and its inverse. White space is not hidden, so templates trim as they do."""
    characters = sorted({character for text in texts for character in text if not character.isspace()})
    pairs = list(zip(map(ord, characters), NO_CHARACTERS, strict=False))
    return {character: chr(hidden) for character, hidden in pairs}, {hidden: chr(character) for character, hidden in pairs}


def new_name(number: int, mark: str) -> str:
    return f"{mark}{number}{mark}"


def rename_controls(tokenizer: Tokenizer, controls: dict[int, str], mark: str) -> Tokenizer:
    """The same tokenizer with control tokens under `new_name`: neither are their old names looked for in a string, nor are they put
    together by merges."""
    state = json.loads(tokenizer.to_str())
    model, names = state["model"], {token: new_name(number, mark) for number, token in controls.items()}

    def named(token: Any) -> Any:
        return names.get(token, token)

    words = model["vocab"]
    model["vocab"] = {named(t): i for t, i in words.items()} if isinstance(words, dict) else [[named(t), score] for t, score in words]
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint([*pair, "".join(pair)])]
    if "unk_token" in model:
        model["unk_token"] = named(model["unk_token"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {token["content"] for token in state["added_tokens"]}
    state["added_tokens"] = [{**token, "content": named(token["content"])} for token in state["added_tokens"]]
    state["added_tokens"] += [{"id": i, "content": names[t], **flags, "special": True} for i, t in controls.items() if t not in added]
    return Tokenizer.from_str(json.dumps({**state, "post_processor": None, "truncation": None, "padding": None}))
