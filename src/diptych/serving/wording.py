"""Tokens of a text that is being written, as the characters that are certain."""

from __future__ import annotations

from collections.abc import Sequence

from diptych.models.base import UnifiedModel


class Wording:
    """Of one text. What its parts say, one after the other, is what the document's text says in the end.

    Held back are spaces at the end, which a text loses, and a character of which some bytes are still to come.
    """

    def __init__(self, model: UnifiedModel) -> None:
        self.model = model
        self.silent = {model.image_spec.begin_id, model.eos_id}
        self.ids: list[int] = []
        self.said = ""

    def more(self, ids: Sequence[int]) -> str:
        self.ids += [i for i in ids if i not in self.silent]
        return self._until(self._text().rstrip("\ufffd").strip())

    def end(self) -> str:
        """What was held back."""
        return self._until(self._text())

    def _text(self) -> str:
        return self.model.decode_text(self.ids).strip() if self.ids else ""

    def _until(self, text: str) -> str:
        if not text.startswith(self.said):
            return ""
        more = text[len(self.said) :]
        self.said = text
        return more
