"""One sampled document: its prompt, its tokens, how they were sampled and with what probability."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import PIL.Image
import torch
from torch import Tensor

from diptych.config import SamplingParams
from diptych.document import Document, Image, Text
from diptych.models.base import UnifiedModel
from diptych.tokens import AnswerForm, Modality, TokenRow

PICTURES_AT_ONCE = 16  # in the image decoder: more gain nothing and take memory


@dataclasses.dataclass(frozen=True)
class Rollout:
    """`row` is prompt and answer; `rollout_logprobs` (T, D) float32 as the sampler reported them, 0 in the prompt.

    `truncated`: a text segment reached `max_text_tokens` (an image's length is constant, so it never counts).
    `step_modality[j]`: modality of step j. `document`: the decoded answer, its given beginning included, one segment per step.
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


@dataclasses.dataclass(frozen=True)
class Piece:
    """Of an answer: n text ids, or a whole image's codes (num_positions, D), with their log-probabilities of the same shape.

    chosen: (n,) bool for text; what is not chosen has log-probability 0.
    """

    modality: Modality
    ids: Tensor
    logprobs: Tensor
    chosen: Tensor

    @classmethod
    def forced(cls, ids: list[int]) -> Piece:
        return cls(Modality.TEXT, torch.tensor(ids), torch.zeros(len(ids)), torch.zeros(len(ids), dtype=torch.bool))

    def longer(self, more: Piece) -> Piece:
        """The text that goes on with `more`."""
        joined = {name: torch.cat([getattr(self, name), getattr(more, name)]) for name in ("ids", "logprobs", "chosen")}
        return Piece(self.modality, **joined)


@dataclasses.dataclass(eq=False)
class PartialRollout:
    """An answer while it is being sampled. `prompt`: the prompt, and what of the answer stands before its first choice. `pictures`: its
    images, as far as they were decoded."""

    prompt: TokenRow
    pieces: list[Piece] = dataclasses.field(default_factory=list)
    truncated: bool = False
    pictures: list[PIL.Image.Image] = dataclasses.field(default_factory=list)

    @property
    def form(self) -> AnswerForm:
        return self.prompt.form or AnswerForm.FREE

    @property
    def num_given(self) -> int:
        """Pictures with which the answer begins."""
        return sum(isinstance(segment, Image) for segment in self.prompt.given)


def decode_pictures(model: UnifiedModel, partials: Sequence[PartialRollout]) -> None:
    """Decodes what was drawn and not decoded yet, in batches, across rollouts."""
    waiting = [
        (one, codes) for one in partials
        for codes in [piece.ids for piece in one.pieces if piece.modality == Modality.IMAGE][len(one.pictures) :]
    ]  # fmt: skip
    for start in range(0, len(waiting), PICTURES_AT_ONCE):
        some = waiting[start : start + PICTURES_AT_ONCE]
        pictures = model.to_pictures(torch.stack([codes for _, codes in some]))
        for (one, _), picture in zip(some, pictures, strict=True):
            one.pictures.append(picture)


def is_broken(partial: PartialRollout) -> bool:
    """Whether the model's logits were NaN."""
    return any(bool(piece.logprobs.isnan().any()) for piece in partial.pieces)


def finish(model: UnifiedModel, partials: Sequence[PartialRollout], params: SamplingParams) -> list[Rollout]:
    """Partial rollouts to rollouts."""
    decode_pictures(model, partials)
    return [_finish_one(model, one, params) for one in partials]


def partial_row(model: UnifiedModel, partial: PartialRollout) -> TokenRow:
    """Prompt and answer so far, without a `begin_id` that was written last."""
    row = _assemble(model, partial)[0]
    return row[:-1] if int(row.text_ids[-1]) == model.image_spec.begin_id else row


def _assemble(model: UnifiedModel, partial: PartialRollout) -> tuple[TokenRow, Tensor, list[Text | Tensor | Image]]:
    """Tokens, log-probabilities (T, D), and the steps: a drawn image is its codes."""
    spec, prompt = model.image_spec, partial.prompt
    rows, logprobs = [prompt], [torch.zeros(len(prompt), spec.depth)]
    steps: list[Text | Tensor | Image] = list(prompt.given)
    unfinished: list[int] = []  # of a given text that goes on
    if steps and isinstance(steps[-1], Text):
        unfinished = prompt.text_ids[(prompt.step_ids == len(steps) - 1) & (prompt.modality == Modality.TEXT)].tolist()
    for piece in partial.pieces:
        if piece.modality == Modality.IMAGE:
            steps.append(piece.ids)
            span = spec.row(piece.ids, chosen=True, step=len(steps) - 1, begin_step=-1)[1:]  # what begins it is in the text before
            placed = torch.zeros(len(span), spec.depth)
            placed[span.modality == Modality.IMAGE] = piece.logprobs
        else:
            text = _text_of(model, unfinished + piece.ids.tolist())
            if unfinished:
                steps[-1] = _longer(steps[-1], _text_of(model, unfinished), text)
            elif text:  # control tokens and white space alone belong to the step before them (at the very beginning, to the first)
                steps.append(Text(text))
            span = TokenRow.text(piece.ids.tolist(), spec.depth, step=max(0, len(steps) - 1))
            span = dataclasses.replace(span, completion_mask=piece.chosen)
            placed = torch.zeros(len(span), spec.depth)
            placed[:, 0] = piece.logprobs
        unfinished = []
        rows.append(span)
        logprobs.append(placed)
    return TokenRow.concat(rows), torch.cat(logprobs), steps


def _longer(given: Text | Tensor | Image, begin: str, whole: str) -> Text:
    """A given text with what was written behind it, in its own spelling where the tokens of the whole begin as its own do."""
    assert isinstance(given, Text)
    return Text(given.text + whole[len(begin) :] if whole.startswith(begin) else whole)


def _text_of(model: UnifiedModel, ids: list[int]) -> str:
    return model.decode_text([i for i in ids if i not in (model.image_spec.begin_id, model.eos_id)]).strip()


def _finish_one(model: UnifiedModel, partial: PartialRollout, params: SamplingParams) -> Rollout:
    row, logprobs, steps = _assemble(model, partial)
    pictures = iter(partial.pictures)
    steps = steps or [Text("")]  # an empty answer
    segments = [Image(next(pictures), step) if isinstance(step, Tensor) else step for step in steps]
    return Rollout(
        prompt_length=partial.prompt.prompt_length, row=row, rollout_logprobs=logprobs, params=params, truncated=partial.truncated,
        step_modality=tuple(Modality.TEXT if isinstance(segment, Text) else Modality.IMAGE for segment in segments),
        document=Document(tuple(segments)),
    )  # fmt: skip
