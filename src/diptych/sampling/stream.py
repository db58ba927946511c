"""Sequences that grow together: the documents being written, and beside them their guidance twins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diptych.models.attention import SlotAttention, Slots
from diptych.models.base import UnifiedModel
from diptych.tokens import TokenRow, collate


class Stream:
    """B sequences that share slots. A row that waits gets an empty slot, and positions count real tokens.

    hidden: (B, H), the state that predicts each row's next position.
    position: (B,) int64, real positions so far.
    """

    def __init__(self, model: UnifiedModel, rows: list[TokenRow], repeat: Tensor, room: int) -> None:
        """Prefills `rows` together, once each; `repeat` (B,) int64 says which of them each sequence starts from.
        `room`: how many positions will probably follow."""
        device = model.device
        batch = collate(rows).to(device)
        real = None if len({len(row) for row in rows}) == 1 else batch.attention_mask
        self.slots = Slots(len(rows), device)
        pass_ = SlotAttention([self.slots], batch.text_ids.shape[1], [real])
        states = model.backbone(model.embed(batch), batch.position_ids, pass_)
        pass_.finish()
        self.position = batch.attention_mask.sum(1)
        self.hidden = states[torch.arange(len(rows), device=device), self.position - 1]
        self.select(repeat.to(device), room)

    def select(self, rows: Tensor, room: int) -> None:
        """These rows, (B',) int64, with room for so many more positions."""
        self.slots.select(rows, room)
        self.hidden, self.position = self.hidden[rows], self.position[rows]


def advance(model: UnifiedModel, streams: Sequence[Stream], embeds: Sequence[Tensor], active: Tensor | None = None) -> None:
    """One forward pass for all streams together, which feeds each of their rows the same number of positions.

    Args:
        embeds: for each stream (B, T, H).
        active: (B,) bool for a single stream and T = 1: rows that are not active wait.
    """
    num_positions = embeds[0].shape[1]
    pass_ = SlotAttention([stream.slots for stream in streams], num_positions, [None if active is None else active[:, None]] * len(streams))
    positions = torch.cat([stream.position for stream in streams])[:, None] + torch.arange(num_positions, device=embeds[0].device)
    hidden = model.backbone(torch.cat(list(embeds)), positions, pass_)[:, -1]
    pass_.finish()
    for stream, states in zip(streams, hidden.split([len(e) for e in embeds]), strict=True):
        if active is None:
            stream.hidden, stream.position = states, stream.position + num_positions
        else:
            stream.hidden = torch.where(active[:, None], states, stream.hidden)
            stream.position = stream.position + active
