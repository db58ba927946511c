"""`format`: is the answer a well-formed illustrated document? A rule, not a model."""

from __future__ import annotations

from typing import Any


def format(completions: list[list[dict[str, Any]]], num_images: list[int], truncated: list[bool] | None = None, **_: Any) -> list[float]:
    """One value per document, 0..1: 1 where every picture follows a non-empty text, the number of pictures is the one
    asked for (dataset column `num_images`) and no text was cut off; each fault costs a share.

    The value is (good pictures) / max(pictures, pictures asked for), halved if a text was cut off.
    """
    values = []
    for row, messages in enumerate(completions):
        blocks = messages[-1]["content"]
        drawn = [i for i, block in enumerate(blocks) if block["type"] == "image"]
        good = sum(1 for i in drawn if i and blocks[i - 1]["type"] == "text" and blocks[i - 1]["text"].strip())
        wanted = int(num_images[row])
        value = min(good, wanted) / max(len(drawn), wanted, 1) if wanted or drawn else 1.0
        values.append(value * (0.5 if truncated and truncated[row] else 1.0))
    return values
