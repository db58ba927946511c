"""One sampled document: its prompt, its tokens, how they were sampled and with what probability."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import PIL.Image
import torch
from torch import Tensor

from diptych.config import SamplingParams
from diptych.document import Document, Image, Text
from diptych.models.base import UnifiedModel
from diptych.models.pixels import to_images
from diptych.tokens import Modality, TokenRow

PICTURES_AT_ONCE = 16  # in the image decoder: more gain nothing and take memory


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
    """Drafts to rollouts; their images are decoded in batches, whichever draft they are of."""
    images = [codes for d in drafts for kind, codes, _ in d.pieces if kind == Modality.IMAGE]
    pictures: list[PIL.Image.Image] = []
    for codes in torch.stack(images).split(PICTURES_AT_ONCE) if images else ():
        pictures += to_images(model.decode_codes(codes.to(model.device)).float().cpu())
    supply = iter(pictures)
    return [_finish_one(model, draft, params, supply) for draft in drafts]


def draft_row(model: UnifiedModel, draft: Draft) -> TokenRow:
    """Prompt and answer so far, without a `begin_id` that was written last."""
    row = _assemble(model, draft)[0]
    return row[:-1] if int(row.text_ids[-1]) == model.image_spec.begin_id else row


def _assemble(model: UnifiedModel, draft: Draft) -> tuple[TokenRow, Tensor, list[str | Tensor]]:
    """Tokens, log-probabilities (T, D), and for each step its text or its codes."""
    spec = model.image_spec
    rows, logprobs = [draft.prompt], [torch.zeros(len(draft.prompt), spec.depth)]
    steps: list[str | Tensor] = []
    for kind, ids, values in draft.pieces:
        if kind == Modality.IMAGE:
            steps.append(ids)
            span = spec.row(ids, chosen=True, step=len(steps) - 1, begin_step=-1)[1:]  # the choice to begin is in the text piece
            placed = torch.zeros(len(span), spec.depth)
            placed[span.modality == Modality.IMAGE] = values
        else:
            text = model.decode_text([int(i) for i in ids if int(i) not in (spec.begin_id, model.eos_id)]).strip()
            if text:  # control tokens and white space alone belong to the step before them (at the very beginning, to the first)
                steps.append(text)
            span = TokenRow.text(ids.tolist(), spec.depth, chosen=True, step=max(0, len(steps) - 1))
            placed = torch.zeros(len(ids), spec.depth)
            placed[:, 0] = values
        rows.append(span)
        logprobs.append(placed)
    return TokenRow.concat(rows), torch.cat(logprobs), steps


def _finish_one(model: UnifiedModel, draft: Draft, params: SamplingParams, pictures: Iterator[PIL.Image.Image]) -> Rollout:
    row, logprobs, steps = _assemble(model, draft)
    steps = steps or [""]  # an empty answer
    segments = [Text(step) if isinstance(step, str) else Image(next(pictures), step) for step in steps]
    return Rollout(
        prompt_length=len(draft.prompt), row=row, rollout_logprobs=logprobs, params=params, truncated=draft.truncated,
        step_modality=tuple(Modality.TEXT if isinstance(step, str) else Modality.IMAGE for step in steps),
        document=Document(tuple(segments)),
    )  # fmt: skip
