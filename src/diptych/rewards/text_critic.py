"""`text_critic`: is each text right, given the prompt with its pictures and the text before? Trained for Storyboard.

One value per text step: the critic's probability, 0..1. It does not see the answer's pictures.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from diptych.document import Document, Text
from diptych.models import packaged_folder
from diptych.rewards.encoder import DocumentEncoder


def critic_input(prompt: Document, answer: Document) -> tuple[Document, list[int]]:
    """What the critic reads (the prompt, then the answer's texts), and which segments of the answer these are."""
    kept = [step for step, segment in enumerate(answer) if isinstance(segment, Text)]
    texts = tuple(answer.segments[step] for step in kept)
    return Document((*prompt.segments, *texts)), kept


@functools.cache
def _packaged() -> DocumentEncoder:
    return DocumentEncoder.load(packaged_folder("text_critic"))


@torch.no_grad()
def text_critic(prompts: list[list[dict[str, Any]]], completions: list[list[dict[str, Any]]], **_: Any) -> list[list[float | None]]:
    """Per step; None for images."""
    inputs, kept, sizes = [], [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        asked, answer = Document.from_blocks(prompt[-1]["content"]), Document.from_blocks(completion[-1]["content"])
        document, steps = critic_input(asked, answer)
        inputs.append(document)
        kept.append(steps)
        sizes.append((len(asked), len(answer)))
    values: list[list[float | None]] = []
    for output, steps, (num_prompt, num_answer) in zip(_packaged()(inputs), kept, sizes, strict=True):
        row: list[float | None] = [None] * num_answer
        for step, value in zip(steps, output[num_prompt:, 0].sigmoid().tolist(), strict=True):
            row[step] = value
        values.append(row)
    return values
