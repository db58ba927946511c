"""`text_critic`: is each text right, given the prompt with its pictures and the text before? Trained for Storyboard.

A generative critic: a small language model that has read right answers only. The value of a text step is the probability
that it gives to the step's words, exp(sum of log p), in 0..1: near 1 where every word is what it would have written. It
does not see the answer's pictures, and it is a model of its own, not the policy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diptych.document import Document, Text
from diptych.models import packaged_folder
from diptych.rewards.encoder import DocumentEncoder


def critic_input(prompt: Document, answer: Document) -> tuple[Document, list[int]]:
    """What the critic reads (the prompt, then the answer's texts), and which segments of the answer these are."""
    kept = [step for step, segment in enumerate(answer) if isinstance(segment, Text)]
    texts = tuple(answer.segments[step] for step in kept)
    return Document((*prompt.segments, *texts)), kept


def text_log_likelihoods(model: DocumentEncoder, inputs: Sequence[tuple[Document, int]]) -> list[Tensor]:
    """For each (document, number of prompt segments): log p of each later segment, its end included, (num_texts,)."""
    outputs, _, ends = model.every_token([document for document, _ in inputs])
    log_probs = outputs.log_softmax(-1)  # (B, T, words + 1); the output at t is about token t + 1
    found = []
    for row, (document, num_prompt) in enumerate(inputs):
        values = []
        for k in range(num_prompt, len(document)):
            segment = document.segments[k]
            assert isinstance(segment, Text)
            targets = torch.tensor([*model.tokenizer.encode(segment.text, add_special_tokens=False).ids, model.end_id])
            stop = ends[row][k]
            values.append(log_probs[row, stop - len(targets) : stop].gather(-1, targets[:, None]).sum())
        found.append(torch.stack(values) if values else torch.zeros(0))
    return found


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
        inputs.append((document, len(asked)))
        kept.append(steps)
        sizes.append(len(answer))
    values: list[list[float | None]] = []
    for logs, steps, size in zip(text_log_likelihoods(_packaged(), inputs), kept, sizes, strict=True):
        row: list[float | None] = [None] * size
        for step, value in zip(steps, logs.exp().tolist(), strict=True):
            row[step] = value
        values.append(row)
    return values
