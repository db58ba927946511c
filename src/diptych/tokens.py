"""Token sequences that mix text and image codes: one class for sampling, warm-up and reinforcement learning.

A five-token example, depth 2: the answer "hi", the choice to draw, one image position, and the forced end of the image.

    text_ids         hi    <vis>   0        </vis>   <eos>
    codes            0 0   0 0     17 4     0 0      0 0
    modality         TEXT  TEXT    IMAGE    TEXT     TEXT
    step_ids         0     0       1        1        1
    completion_mask  True  True    True     False    True

`</vis>` is in the sequence but was not chosen (the image's length is fixed), so it is never trained. So are the size prefix and
the row separators that some families write inside an image (Emu3): TEXT, of the image's step, not chosen.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

import torch
from torch import Tensor

from diptych.document import Document, Image, Segment, Text, valid_text
from diptych.forms import AnswerForm

__all__ = ["AnswerForm", "Modality", "TokenBatch", "TokenRow", "check_form", "collate", "valid_text"]


def check_form(document: Document, form: AnswerForm | None, num_given: int) -> None:
    """Raises ValueError where what follows the given beginning of an answer is not of the form."""
    kinds = [type(segment) for segment in document.segments[num_given:]]
    wanted = {AnswerForm.IMAGE: [Image], AnswerForm.TEXT_IMAGE: [Text, Image]}
    if form is AnswerForm.TEXT_IMAGE and num_given and isinstance(document.segments[num_given - 1], Text) and kinds == [Image]:
        return  # the given text is all of it
    fits = kinds == wanted[form] if form in wanted else form is not AnswerForm.TEXT or Image not in kinds
    if not fits:
        assert form is not None
        asked = {AnswerForm.IMAGE: "one picture", AnswerForm.TEXT_IMAGE: "a text and a picture", AnswerForm.TEXT: "text alone"}
        held = ", ".join("picture" if kind is Image else "text" for kind in kinds) or "nothing"
        raise ValueError(f"its answer holds {held}, and an answer of form {form} is {asked[form]}; mend the answer or the form")


class Modality(enum.IntEnum):
    """What stands at a position. FEATURE is a prompt picture given as features instead of codes (Janus)."""

    PAD = 0
    TEXT = 1
    IMAGE = 2
    FEATURE = 3


@dataclasses.dataclass(frozen=True)
class TokenRow:
    """One sequence without padding; fields as in `TokenBatch` with shape (T,) or (T, D).

    `pixels`: the pictures behind its FEATURE positions, in order. `form`: of its answer; None: nothing was said of it, so it is free.
    `given`: the segments with which the answer begins by somebody else's choice; their tokens are in the sequence.
    """

    text_ids: Tensor
    codes: Tensor
    modality: Tensor
    step_ids: Tensor
    completion_mask: Tensor
    pixels: tuple[Tensor, ...] = ()
    form: AnswerForm | None = None
    given: tuple[Segment, ...] = ()

    def __len__(self) -> int:
        return len(self.text_ids)

    @property
    def prompt_length(self) -> int:
        """Positions before the first that belongs to a document step, chosen or not."""
        answer = (self.step_ids >= 0).nonzero()
        return int(answer[0]) if len(answer) else len(self)

    @classmethod
    def text(cls, ids: Sequence[int], depth: int, *, chosen: bool = False, step: int = -1) -> TokenRow:
        n = len(ids)
        return cls(
            torch.tensor(list(ids), dtype=torch.long),
            torch.zeros(n, depth, dtype=torch.long),
            torch.full((n,), Modality.TEXT, dtype=torch.long),
            torch.full((n,), step, dtype=torch.long),
            torch.full((n,), chosen, dtype=torch.bool),
        )

    @classmethod
    def image(cls, codes: Tensor, *, chosen: bool = False, step: int = -1) -> TokenRow:
        """`codes`: (num_positions, D) int64."""
        n = len(codes)
        return cls(
            torch.zeros(n, dtype=torch.long),
            codes.long(),
            torch.full((n,), Modality.IMAGE, dtype=torch.long),
            torch.full((n,), step, dtype=torch.long),
            torch.full((n,), chosen, dtype=torch.bool),
        )

    @classmethod
    def feature(cls, pixels: Tensor, length: int, depth: int) -> TokenRow:
        """A prompt picture (3, S, S) that stands at `length` positions as features of the family's own encoder."""
        row = cls.text([0] * length, depth)
        return dataclasses.replace(row, modality=torch.full((length,), Modality.FEATURE, dtype=torch.long), pixels=(pixels,))

    @classmethod
    def concat(cls, rows: Sequence[TokenRow]) -> TokenRow:
        """One row after the other; form and beginning are those of the first."""
        joined = {name: torch.cat([getattr(r, name) for r in rows]) for name in _PER_POSITION}
        pixels = tuple(picture for r in rows for picture in r.pixels)
        return cls(**joined, pixels=pixels, form=rows[0].form, given=rows[0].given)

    def to(self, device: torch.device | str) -> TokenRow:
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in _PER_POSITION})

    def forced(self) -> TokenRow:
        """The same tokens, none of them chosen."""
        return dataclasses.replace(self, completion_mask=torch.zeros_like(self.completion_mask))

    def __getitem__(self, positions: slice) -> TokenRow:
        """Some positions, of no form. Raises ValueError where they would cut a picture's features in two."""
        kept = {name: getattr(self, name)[positions] for name in _PER_POSITION}
        features = int((kept["modality"] == Modality.FEATURE).sum())
        if features == 0:
            return TokenRow(**kept)
        if features != int((self.modality == Modality.FEATURE).sum()):
            raise ValueError("a slice of a sequence must hold all of its picture features or none")
        return TokenRow(**kept, pixels=self.pixels)


_PER_POSITION = ("text_ids", "codes", "modality", "step_ids", "completion_mask")


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """B right-padded sequences of up to T positions with D codes at each image position.

    text_ids: (B, T) int64; 0 where there is no text token.
    codes: (B, T, D) int64; 0 where there is no image code.
    modality: (B, T) int64, values of `Modality`.
    position_ids: (B, T) int64; the number of real tokens before this one.
    step_ids: (B, T) int64; the document step a token belongs to, -1 in the prompt.
    completion_mask: (B, T) bool; True where the policy chose the token and it is trained.
    pixels: for each row, the pictures behind its FEATURE positions; () where no row has any.
    forms: for each row, what its answer may hold; () where all are free.

    Raises ValueError where shapes or dtypes disagree, or where the mask covers padding.
    """

    text_ids: Tensor
    codes: Tensor
    modality: Tensor
    position_ids: Tensor
    step_ids: Tensor
    completion_mask: Tensor
    pixels: tuple[tuple[Tensor, ...], ...] = ()
    forms: tuple[AnswerForm | None, ...] = ()

    def __post_init__(self) -> None:
        shape = self.text_ids.shape
        if len(shape) != 2:
            raise ValueError(f"text_ids has shape {tuple(shape)}; (B, T) is needed")
        for name in ("modality", "position_ids", "step_ids", "completion_mask"):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}; text_ids has {tuple(shape)}")
        if self.codes.ndim != 3 or self.codes.shape[:2] != shape:
            raise ValueError(f"codes has shape {tuple(self.codes.shape)}; {tuple(shape)} + (D,) is needed")
        for name, dtype in (("text_ids", torch.long), ("codes", torch.long), ("completion_mask", torch.bool)):
            if getattr(self, name).dtype != dtype:
                raise ValueError(f"{name} is {getattr(self, name).dtype}; {dtype} is needed")
        for name in ("pixels", "forms"):
            if getattr(self, name) and len(getattr(self, name)) != shape[0]:
                raise ValueError(f"{name} has {len(getattr(self, name))} rows; the batch has {shape[0]}")
        if bool((self.completion_mask & (self.modality == Modality.PAD)).any()):
            raise ValueError("completion_mask is True on padding")

    @property
    def device(self) -> torch.device:
        return self.text_ids.device

    @property
    def depth(self) -> int:
        return self.codes.shape[-1]

    @property
    def attention_mask(self) -> Tensor:
        """(B, T) bool, True at real tokens."""
        return self.modality != Modality.PAD

    @property
    def text_mask(self) -> Tensor:
        return self.modality == Modality.TEXT

    @property
    def image_mask(self) -> Tensor:
        return self.modality == Modality.IMAGE

    @property
    def feature_mask(self) -> Tensor:
        return self.modality == Modality.FEATURE

    @property
    def choice_mask(self) -> Tensor:
        """(B, T, D) bool: every single choice of the policy. A text token is one choice (at depth 0), an image position D."""
        depth_zero = torch.arange(self.depth, device=self.device) == 0  # (D,)
        return self.completion_mask[..., None] & (self.image_mask[..., None] | depth_zero)

    def __len__(self) -> int:
        return len(self.text_ids)

    def to(self, device: torch.device | str) -> TokenBatch:
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in _ON_DEVICE})

    def __getitem__(self, rows: slice | Tensor | list[int]) -> TokenBatch:
        """Some rows, with trailing padding that none of them needs cut off."""
        parts = {name: getattr(self, name)[rows] for name in _ON_DEVICE}
        longest = max(1, int((parts["modality"] != Modality.PAD).sum(1).max()))
        index = torch.arange(len(self))[rows].tolist() if self.pixels or self.forms else []
        pixels = tuple(self.pixels[i] for i in index) if self.pixels else ()
        forms = tuple(self.forms[i] for i in index) if self.forms else ()
        pixels = pixels if any(pixels) else ()
        return TokenBatch(**{name: value[:, :longest] for name, value in parts.items()}, pixels=pixels, forms=forms)

    def row(self, index: int) -> TokenRow:
        """One sequence without its padding."""
        length = int(self.attention_mask[index].sum())
        parts = {name: getattr(self, name)[index, :length] for name in _PER_POSITION}
        pixels, form = self.pixels[index] if self.pixels else (), self.forms[index] if self.forms else None
        return TokenRow(**parts, pixels=pixels, form=form)

    def rows(self) -> list[TokenRow]:
        return [self.row(index) for index in range(len(self))]


_ON_DEVICE = (*_PER_POSITION, "position_ids")


def collate(rows: Sequence[TokenRow]) -> TokenBatch:
    """Rows to a right-padded batch. Raises ValueError for an empty list."""
    if not rows:
        raise ValueError("no sequences to collate; the batch is empty")

    def pad(name: str, value: int | bool) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([getattr(r, name) for r in rows], batch_first=True, padding_value=value)

    modality = pad("modality", int(Modality.PAD))
    real = modality != Modality.PAD
    return TokenBatch(
        text_ids=pad("text_ids", 0),
        codes=pad("codes", 0),
        modality=modality,
        position_ids=(real.long().cumsum(1) - 1).clamp(min=0),
        step_ids=pad("step_ids", -1),
        completion_mask=pad("completion_mask", False),
        pixels=tuple(r.pixels for r in rows) if any(r.pixels for r in rows) else (),
        forms=tuple(r.form for r in rows) if any(r.form is not None for r in rows) else (),
    )
