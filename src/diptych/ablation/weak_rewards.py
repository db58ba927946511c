"""Image rewards that are worse than `image_text` or `image_likelihood`, to see what a reward's strength is worth. Each depends on
the content alone: the same picture in the same place always gets the same value.

How weak: a right picture (by the oracle) gets more than a wrong one with probability 0.72 from `image_text`, 0.61 from
`noisy_image_text` and 0.54 from `coarse_image_text` (299 pictures sampled by the demo's warm-up, seed 0; chance is 0.5). None is near
1, because a picture may fit a text that is itself wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from diptych.document import Document, Image
from diptych.rewards.image_likelihood import ImageLikelihood
from diptych.rewards.image_text import image_text

NOISE = 0.5  # share of the value that says nothing
COARSE = 0.5  # where the coarse scorer sees agreement


def noisy_image_text(completions: list[list[dict[str, Any]]], **_: Any) -> list[list[float | None]]:
    """Half `image_text`, half a number between 0 and 1 drawn from a hash of the picture and its text: a scorer that is often wrong."""
    values = image_text(completions)
    for row, messages in zip(values, completions, strict=True):
        for step, caption, image in Document.from_blocks(messages[-1]["content"]).captions():
            value = row[step]
            assert value is not None
            row[step] = (1 - NOISE) * value + NOISE * _noise(caption, image)
    return values


def coarse_image_text(completions: list[list[dict[str, Any]]], **_: Any) -> list[list[float | None]]:
    """1 where `image_text` is at least a half, else 0: a scorer that says "fits" or "does not", and never how well."""
    return [[None if value is None else float(value >= COARSE) for value in row] for row in image_text(completions)]


class _WeakerLikelihood(ImageLikelihood):
    def __call__(
        self, prompts: list[list[dict[str, Any]]], completions: list[list[dict[str, Any]]],
        completion_documents: Sequence[Document] | None = None, **_: Any,
    ) -> list[list[float | None]]:  # fmt: skip
        values = super().__call__(prompts, completions, completion_documents)
        for row, messages in zip(values, completions, strict=True):
            for step, caption, image in Document.from_blocks(messages[-1]["content"]).captions():
                value = row[step]
                if value is not None and value == value:  # what is missing stays missing
                    row[step] = self.weaker(value, caption, image)
        return values

    def weaker(self, value: float, caption: str, image: Image) -> float:
        raise NotImplementedError


class NoisyImageLikelihood(_WeakerLikelihood):
    """Half `image_likelihood`, half a number between 0 and 1 drawn from a hash of the picture and its text."""

    def weaker(self, value: float, caption: str, image: Image) -> float:
        return (1 - NOISE) * value + NOISE * _noise(caption, image)


class CoarseImageLikelihood(_WeakerLikelihood):
    """1 where `image_likelihood` is at least a half, else 0."""

    def weaker(self, value: float, caption: str, image: Image) -> float:
        return float(value >= COARSE)


def _noise(caption: str, image: Image) -> float:
    """Uniform in 0..1, from the picture's pixels and its caption."""
    assert image.pixels is not None
    content = caption.encode() + image.pixels.convert("RGB").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") / 2**64
