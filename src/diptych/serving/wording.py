"""Tokens of a text that is being written, as the characters that are certain."""

from __future__ import annotations

from collections.abc import Sequence

from diptych.models.base import UnifiedModel


class Wording:
    """Of one text. What its parts say, one after the other, is what the document's text says in the end.

    Held back are spaces at the end, which a text loses, and a character of which some bytes are still to come. (Only where bytes make no
    character do some tokenizers take back what stood before them; then what comes after is said behind it.)
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
        text = self._text()
        kept = next((place for place, (one, other) in enumerate(zip(self.said, text, strict=False)) if one != other), len(self.said))
        return text[kept:]

    def _text(self) -> str:
        return self.model.decode_text(self.ids).strip() if self.ids else ""

    def _until(self, text: str) -> str:
        if not text.startswith(self.said):
            return ""
        more = text[len(self.said) :]
        self.said = text
        return more
