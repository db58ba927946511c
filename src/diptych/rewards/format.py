"""`format`: is the answer a well-formed illustrated document? A rule, not a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def format(
    completions: list[list[dict[str, Any]]], num_images: Sequence[int | None], truncated: list[bool] | None = None,
    ends_with_text: Sequence[bool | None] | None = None, **_: Any,
) -> list[float]:  # fmt: skip
    """One value per document, 0..1: 1 where every picture follows a non-empty text, the number of pictures is the one
    asked for (dataset column `num_images`; None: any will do), no text was cut off, no step is empty, and the answer ends as asked, with a
    text or with a picture (column `ends_with_text`; None or no such column: either will do). Each fault costs a share.

    The value is (good parts) / max(parts, parts asked for), halved if a text was cut off; parts are the pictures with their texts and
    the closing text. Why it has to be asked for: rewards of texts say nothing of a text that is not there, so a policy that may leave
    out its conclusion soon does. An empty text spoils the part that it belongs to, the picture behind it or the closing text that is
    asked for; any other is one more part, a bad one.
    """
    values = []
    for row, messages in enumerate(completions):
        blocks = messages[-1]["content"]
        is_text = [block["type"] == "text" and bool(block["text"].strip()) for block in blocks]
        drawn = [i for i, block in enumerate(blocks) if block["type"] == "image"]
        asked = num_images[row]
        wanted = len(drawn) if asked is None else int(asked)
        good, parts = min(sum(1 for i in drawn if i and is_text[i - 1]), wanted), max(len(drawn), wanted)
        closing = None if ends_with_text is None else ends_with_text[row]
        if closing is not None:
            closes = bool(is_text) and is_text[-1]
            good, parts = good + (closing and closes), parts + (closing or closes)
        empty = [i for i, block in enumerate(blocks) if block["type"] == "text" and not is_text[i]]
        parts += sum(1 for i in empty if i + 1 not in drawn and not (closing and i + 1 == len(blocks)))
        value = good / parts if parts else 1.0
        values.append(value * (0.5 if truncated and truncated[row] else 1.0))
    return values
