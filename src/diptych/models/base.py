"""The contract between Diptych and a unified model. Sampling, scoring and both trainings are written against it once.

To add a family: one file (or folder) in `diptych/models/` with a subclass, and one line in `models/__init__.py`.
"""

from __future__ import annotations

import abc
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diptych.document import Document, Image, Text
from diptych.models.pixels import to_pixels
from diptych.tokens import TokenBatch, TokenRow


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """How a family writes an image: `num_positions` positions with `depth` codes each out of `codebook_size`,
    between the text tokens `begin_id` (chosen by the model) and `end_id` (forced); `pixel_size` pixels a side."""

    num_positions: int
    depth: int
    codebook_size: int
    pixel_size: int
    begin_id: int
    end_id: int


class UnifiedModel(nn.Module, abc.ABC):
    """One transformer over text tokens and image codes.

    Hidden states predict the *next* position: the state at `begin_id` predicts the first image position. H is the
    hidden width, V the text vocabulary, K the codebook size, D the depth.
    """

    image_spec: ImageSpec
    eos_id: int
    vocab_size: int
    max_positions: int

    # --- tensors -------------------------------------------------------------------------------------------------
    @abc.abstractmethod
    def embed(self, batch: TokenBatch) -> Tensor:
        """Input embeddings of text tokens and image codes, (B, T, H)."""

    @abc.abstractmethod
    def backbone(self, embeds: Tensor, position_ids: Tensor, attention_mask: Tensor, cache: Any = None) -> Tensor:
        """Hidden states (B, T, H). `attention_mask` is (B, cached + T) bool and may have holes; attention is causal
        by slot. `cache`, from `new_cache`, is extended in place."""

    @abc.abstractmethod
    def new_cache(self) -> Any:
        """An empty key-value cache with `batch_select_indices(indices)`."""

    @abc.abstractmethod
    def text_logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V)."""

    @abc.abstractmethod
    def image_logits(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced over depth: hidden (N, H) and codes (N, D) -> (N, D, K)."""

    @abc.abstractmethod
    def image_step(self, hidden: Tensor, code_prefix: Tensor) -> Tensor:
        """Logits of the next code of a position: hidden (N, H), the codes so far (N, d) with d < D -> (N, K)."""

    @abc.abstractmethod
    def encode_images(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) float in -1..1 -> codes (N, num_positions, D)."""

    @abc.abstractmethod
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes (N, num_positions, D) -> pixels (N, 3, S, S) float in -1..1."""

    # --- words ---------------------------------------------------------------------------------------------------
    @abc.abstractmethod
    def unconditional_prompt(self) -> list[int]:
        """Text ids that stand before `begin_id` in the unconditional branch of classifier-free guidance."""

    @abc.abstractmethod
    def encode_text(self, text: str) -> list[int]: ...

    @abc.abstractmethod
    def decode_text(self, ids: list[int]) -> str: ...

    @abc.abstractmethod
    def wrap_prompt(self, row: TokenRow) -> TokenRow:
        """The chat template: what stands before and after the user's tokens."""

    @abc.abstractmethod
    def forbidden_text_ids(self) -> list[int]:
        """Text ids that no answer may contain (padding, role markers, `end_id`, image ids)."""

    @abc.abstractmethod
    def save_pretrained(self, folder: Path) -> None: ...

    @classmethod
    @abc.abstractmethod
    def load(cls, folder: Path) -> UnifiedModel:
        """The model of a checkpoint folder. Raises ValueError naming the file that is missing, truncated or does not fit."""

    # --- written once for all families ------------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def image_codes(self, image: Image) -> Tensor:
        """(num_positions, D) codes of an image segment, encoding its pixels if it has no codes."""
        if image.codes is not None:
            return image.codes
        assert image.pixels is not None
        return self.encode_images(to_pixels([image.pixels], self.image_spec.pixel_size).to(self.device))[0].cpu()

    def encode_segments(self, document: Document, *, answer: bool) -> TokenRow:
        """Segments to tokens. In an answer each segment is a step and everything but `end_id` is a choice."""
        spec, rows = self.image_spec, []
        for step, segment in enumerate(document):
            step_id = step if answer else -1
            if isinstance(segment, Text):
                rows.append(TokenRow.text(self.encode_text(segment.text), spec.depth, chosen=answer, step=step_id))
                continue
            begins_a_row = step == 0 or isinstance(document.segments[step - 1], Image)
            begin_step = step_id if begins_a_row or not answer else step_id - 1  # the choice to draw ends the text step
            rows.append(TokenRow.text([spec.begin_id], spec.depth, chosen=answer, step=begin_step))
            rows.append(TokenRow.image(self.image_codes(segment), chosen=answer, step=step_id))
            rows.append(TokenRow.text([spec.end_id], spec.depth, chosen=False, step=step_id))
        if answer:
            rows.append(TokenRow.text([self.eos_id], spec.depth, chosen=True, step=max(0, len(document) - 1)))
        return TokenRow.concat(rows) if rows else TokenRow.text([], spec.depth)

    def encode_prompt(self, document: Document) -> TokenRow:
        """Raises ValueError where the prompt leaves no room for an answer in the context."""
        row = self.wrap_prompt(self.encode_segments(document, answer=False))
        if len(row) >= self.max_positions:
            raise ValueError(f"the prompt has {len(row)} positions and the model's context {self.max_positions}; shorten the prompt")
        return row

    def encode_example(self, prompt: Document | None, answer: Document) -> TokenRow:
        """Prompt and answer for supervised training; `prompt=None` gives the unconditional branch (caption dropout).

        Raises ValueError where the example is longer than the context.
        """
        bare = TokenRow.text(self.unconditional_prompt(), self.image_spec.depth)
        begin = bare if prompt is None else self.encode_prompt(prompt)
        row = TokenRow.concat([begin, self.encode_segments(answer, answer=True)])
        if len(row) > self.max_positions:
            raise ValueError(f"the example has {len(row)} positions and the model's context {self.max_positions}")
        return row
