"""Sequences that share cache slots and grow one position at a time: the documents being written, and their guidance twins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diptych.models.base import UnifiedModel
from diptych.tokens import TokenRow, collate


class Stream:
    """B sequences in S cache slots. A row that waits gets an empty slot: the mask has holes, and positions count real tokens.

    hidden: (B, H), the state that predicts each row's next position.
    position: (B,) int64, real positions so far.
    attention: (B, S) bool, False where a slot is empty.
    """

    def __init__(self, model: UnifiedModel, rows: list[TokenRow], repeat: Tensor) -> None:
        """Prefills `rows` together, once each; `repeat` (B,) int64 says which of them each sequence starts from."""
        self.model, device = model, model.device
        self.cache: Any = model.new_cache()
        batch = collate(rows).to(device)
        lengths = batch.attention_mask.sum(1)  # (P,)
        states = model.backbone(model.embed(batch), batch.position_ids, batch.attention_mask, self.cache)
        last = states[torch.arange(len(rows), device=device), lengths - 1]  # (P, H)
        repeat = repeat.to(device)
        self.cache.batch_select_indices(repeat)
        self.hidden, self.position, self.attention = last[repeat], lengths[repeat], batch.attention_mask[repeat]

    def keep(self, rows: Tensor) -> None:
        """Drops all but these rows, (B',) int64."""
        self.cache.batch_select_indices(rows)
        self.hidden, self.position, self.attention = self.hidden[rows], self.position[rows], self.attention[rows]

    def feed_text(self, ids: Tensor, active: Tensor | None = None) -> None:
        """One text token for each row, (B,) int64; rows that are not `active` (B,) bool wait."""
        self._feed(self.model.embed_text(ids), torch.ones_like(ids, dtype=torch.bool) if active is None else active)

    def feed_codes(self, codes: Tensor) -> None:
        """One image position for each row, (B, D) int64."""
        self._feed(self.model.embed_codes(codes), torch.ones(len(codes), dtype=torch.bool, device=codes.device))

    def _feed(self, embeds: Tensor, active: Tensor) -> None:
        """(B, H) embeddings."""
        attention = torch.cat([self.attention, torch.ones_like(active)[:, None]], dim=1)  # a slot sees at least itself
        hidden = self.model.backbone(embeds[:, None], self.position[:, None], attention, self.cache)[:, -1]
        self.hidden = torch.where(active[:, None], hidden, self.hidden)
        self.position = self.position + active
        attention[:, -1] = active
        self.attention = attention
