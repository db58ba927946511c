"""`image_text`: does each picture show what its words say? A dual encoder trained for Storyboard.

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
from diptych.rewards.captions import Against, check_against, compared, no_values
from diptych.rewards.encoder import DocumentEncoder

EMBEDDING = 64
HEAD = EMBEDDING + 1  # an embedding and a weight for each token


def agreement_logits(model: DocumentEncoder, captions: Sequence[Text], images: Sequence[Image], *, paired: bool) -> Tensor:
    """Late interaction of two encodings: every word looks for its patch, every patch for its word.

    The logit is scale * (mean over words of the best cosine + mean over patches of the best cosine) / 2 + shift, with
    means weighted by the model. Source: FILIP, arXiv:2111.07783, with learned weights.

    Returns:
        (N,) for N pairs, or (num_images, num_captions) for all of them.
    """
    words, word_weights = _encode(model, captions)  # (C, W, E), (C, W)
    patches, patch_weights = _encode(model, images)  # (N, P, E), (N, P)
    if paired:
        cosine = torch.einsum("nwe,npe->nwp", words, patches)
    else:
        cosine = torch.einsum("cwe,npe->ncwp", words, patches)
        patch_weights = patch_weights[:, None]
    cosine = cosine.masked_fill((word_weights == 0)[..., None], -1.0)
    found = (cosine.amax(-1) * word_weights).sum(-1) + (cosine.amax(-2) * patch_weights).sum(-1)
    return model.scale[0] * found / 2 + model.scale[1]


def _encode(model: DocumentEncoder, segments: Sequence[Text | Image]) -> tuple[Tensor, Tensor]:
    """Unit embeddings (N, T, EMBEDDING) of every token, and weights (N, T) that sum to 1; 0 on padding."""
    outputs, real, _ = model.every_token([Document((segment,)) for segment in segments])
    weights = outputs[..., -1].masked_fill(~real, -torch.inf).softmax(-1)
    return nn.functional.normalize(outputs[..., :EMBEDDING], dim=-1), weights


@torch.no_grad()
def score_pairs(model: DocumentEncoder, captions: Sequence[str], images: Sequence[Image]) -> Tensor:
    """Agreement of each caption with its image, (N,) in 0..1."""
    if not captions:
        return torch.zeros(0)
    return agreement_logits(model, [Text(c) for c in captions], images, paired=True).sigmoid()


@functools.cache
def _packaged() -> DocumentEncoder:
    return DocumentEncoder.load(packaged_folder("image_text"))


def image_text(
    completions: list[list[dict[str, Any]]], prompts: list[list[dict[str, Any]]] | None = None, against: Against = "text", **columns: Any
) -> list[list[float | None]]:
    """Per step; None for text, and for an image without words to compare it with (`rewards/captions.py`)."""
    captions, images, at = [], [], []
    values = no_values(completions)
    for row, pairs in enumerate(compared(prompts, completions, against, **columns)):
        for step, caption, image in pairs:
            captions.append(caption)
            images.append(image)
            at.append((row, step))
    for (row, step), value in zip(at, score_pairs(_packaged(), captions, images).tolist(), strict=True):
        values[row][step] = value
    return values


image_text.check_options = check_against  # type: ignore[attr-defined]
