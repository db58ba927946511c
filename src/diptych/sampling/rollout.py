"""One sampled document: its prompt, its tokens, how they were sampled and with what probability."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from diptych.config import SamplingParams
from diptych.document import Document, Image, Text
from diptych.models.base import UnifiedModel
from diptych.models.pixels import to_images
from diptych.tokens import Modality, TokenRow


@dataclasses.dataclass(frozen=True)
class Rollout:
    """`row` is prompt and answer; `rollout_logprobs` (T, D) float32 as the sampler reported them, 0 in the prompt.

    `truncated`: a text segment reached `max_text_tokens` (an image's length is constant, so it never counts).
    `step_modality[j]`: modality of step j. `document`: the decoded answer, one segment per step.
    """

    prompt_length: int
    row: TokenRow
    rollout_logprobs: Tensor
    params: SamplingParams
    truncated: bool
    step_modality: tuple[Modality, ...]
    document: Document

    @property
    def num_steps(self) -> int:
        return len(self.step_modality)


@dataclasses.dataclass
class Draft:
    """An answer while it is being sampled: text ids and whole images in order, each with its log-probabilities."""

    prompt: TokenRow
    pieces: list[tuple[Modality, Tensor, Tensor]] = dataclasses.field(default_factory=list)
    truncated: bool = False


def finish(model: UnifiedModel, drafts: list[Draft], params: SamplingParams) -> list[Rollout]:
    """Drafts to rollouts; all their images are decoded in one batch."""
    images = [codes for d in drafts for kind, codes, _ in d.pieces if kind == Modality.IMAGE]
    pictures = iter(to_images(model.decode_codes(torch.stack(images).to(model.device)).cpu()) if images else [])
    return [_finish_one(model, draft, params, pictures) for draft in drafts]


def _finish_one(model: UnifiedModel, draft: Draft, params: SamplingParams, pictures) -> Rollout:
    spec = model.image_spec
    rows, logprobs = [draft.prompt], [torch.zeros(len(draft.prompt), spec.depth)]
    segments: list[Text | Image] = []
    modality: list[Modality] = []

    def add(row: TokenRow, values: Tensor) -> None:
        rows.append(row)
        logprobs.append(values)

    for kind, ids, values in draft.pieces:
        if kind == Modality.IMAGE:
            modality.append(Modality.IMAGE)
            segments.append(Image(next(pictures), ids))
            step = len(modality) - 1
            add(TokenRow.image(ids, chosen=True, step=step), values)
            add(TokenRow.text([spec.end_id], spec.depth, chosen=False, step=step), torch.zeros(1, spec.depth))
            continue
        words = [int(i) for i in ids if int(i) not in (spec.begin_id, model.eos_id)]
        if words:  # a lone control token belongs to the step before it (at the very beginning, to the first)
            modality.append(Modality.TEXT)
            segments.append(Text(model.decode_text(words)))
        padded = torch.zeros(len(ids), spec.depth)
        padded[:, 0] = values
        add(TokenRow.text(ids.tolist(), spec.depth, chosen=True, step=max(0, len(modality) - 1)), padded)
    if not modality:  # an empty answer
        modality.append(Modality.TEXT)
        segments.append(Text(""))
    return Rollout(
        prompt_length=len(draft.prompt), row=TokenRow.concat(rows), rollout_logprobs=torch.cat(logprobs), params=params,
        truncated=draft.truncated, step_modality=tuple(modality), document=Document(tuple(segments)),
    )  # fmt: skip
