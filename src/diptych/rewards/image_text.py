"""`image_text`: does each picture show what the text just before it says? A dual encoder trained for Storyboard.

One value per image in 0..1, about 1 where every fact agrees and halved with each fact that does not. Like CLIP score
and ImageReward in the paper it is learned, so it can be wrong and can be hacked.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diptych.document import Document, Image, Text
from diptych.models import packaged_folder
from diptych.rewards.encoder import DocumentEncoder

EMBEDDING = 96


def agreement_logits(model: DocumentEncoder, captions: Tensor, images: Tensor) -> Tensor:
    """Cosine similarity, scaled and shifted: (..., EMBEDDING) pairs -> (...). The last head output holds no embedding."""
    similarity = nn.functional.cosine_similarity(captions[..., :EMBEDDING], images[..., :EMBEDDING], dim=-1)
    return 30 * (similarity - 0.85)


def embed(model: DocumentEncoder, segments: Sequence[Text | Image]) -> Tensor:
    """(N, EMBEDDING), each segment on its own."""
    return torch.cat(model([Document((segment,)) for segment in segments]))


@torch.no_grad()
def score_pairs(model: DocumentEncoder, captions: Sequence[str], images: Sequence[Image]) -> Tensor:
    """Agreement of each caption with its image, (N,) in 0..1."""
    if not captions:
        return torch.zeros(0)
    return agreement_logits(model, embed(model, [Text(c) for c in captions]), embed(model, images)).sigmoid()


@functools.cache
def _packaged() -> DocumentEncoder:
    return DocumentEncoder.load(packaged_folder("image_text"))


def image_text(completions: list[list[dict[str, Any]]], **_: Any) -> list[list[float | None]]:
    """Per step; None for text, and for an image without text before it (the format reward sees to that)."""
    captions, images, at = [], [], []
    values: list[list[float | None]] = []
    for row, messages in enumerate(completions):
        document = Document.from_blocks(messages[-1]["content"])
        values.append([None] * len(document))
        for step, segment in enumerate(document):
            before = document.segments[step - 1] if step else None
            if isinstance(segment, Image) and isinstance(before, Text):
                captions.append(before.text)
                images.append(segment)
                at.append((row, step))
    for (row, step), value in zip(at, score_pairs(_packaged(), captions, images).tolist(), strict=True):
        values[row][step] = value
    return values
