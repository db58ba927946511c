"""What an answer may hold."""

from __future__ import annotations

import enum


class AnswerForm(enum.StrEnum):
    """What an answer may hold. What a form prescribes is in the sequence, but forced: it is no choice, and in no loss.

    FREE: texts and pictures, as the model chooses. IMAGE: one picture, begun at once, and the end. TEXT: no picture. TEXT_IMAGE: a text
    and then a picture, begun where the model ends its text (in whichever way, these are one choice) or at its greatest length.
    """

    FREE = "free"
    IMAGE = "image"
    TEXT = "text"
    TEXT_IMAGE = "text_image"

    @property
    def ends_with_image(self) -> bool:
        return self in (AnswerForm.IMAGE, AnswerForm.TEXT_IMAGE)
