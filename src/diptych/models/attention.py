"""Attention over keys and values that Diptych lays out itself, inside transformers' own decoders.

A decoder of any family is called as it is; only where its layers attend to is ours: `Layout.attend` stands in for the attention
function (transformers' `AttentionInterface`). Two layouts exist: `SlotAttention` here, for sampling, and `Packed` for scoring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "diptych_layout"


class Layout(Protocol):
    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """What one layer's attention gives, (B, T, heads, head_dim), for query (B, heads, T, head_dim) and the keys and values of the
        same positions (B, key-value heads, T, head_dim). `module`: the attention module, with its `layer_idx`."""


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, scaling: float, layout: Layout | None = None, **_: Any
) -> tuple[Tensor, None]:
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    return layout.attend(module, query, key, value, scaling), None


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)


def accept_layouts(config: Any) -> None:
    """From now on the decoder with this config attends through the `layout` that it is called with, and as `sdpa` where there is none.
    (For good, because gradient checkpointing calls layers again during the backward pass.)"""
    if config._attn_implementation != _NAME:
        config._attn_implementation = _NAME


class Slots:
    """Keys and values of B rows that share slots: row b has something in slot s where `taken[b, s]`.

    Every layer has a buffer (B, capacity, heads, head_dim), of which the first S slots are in use: attention reads them where they
    lie, and a new position is written in place. With the slots before the heads that costs no more than reading a buffer of just
    S slots (docs/performance.md).

    taken: (B, S) bool.
    full: every row has something in every slot (known without asking the device), so that no mask is needed.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.taken = torch.zeros(num_rows, 0, dtype=torch.bool, device=device)
        self.full = True
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    @property
    def num_rows(self) -> int:
        return len(self.taken)

    @property
    def length(self) -> int:
        return self.taken.shape[1]

    @property
    def num_bytes(self) -> int:
        """Of the slots in use."""
        return sum(2 * buffer[:, : self.length].nbytes for buffer in self._keys)

    def select(self, rows: Tensor, room: int) -> None:
        """These rows, (B',) int64, in this order, with room for so many more slots."""
        self.taken = self.taken[rows]
        for buffers in (self._keys, self._values):
            for layer, buffer in enumerate(buffers):
                buffers[layer] = _copy(buffer[:, : self.length].index_select(0, rows), self.length + room)

    def visible(self, new: Tensor | None, num_positions: int) -> Tensor | None:
        """Which slots each of `num_positions` new positions sees: (B, 1, T, S + T) bool; None for all before it.

        `new` (B, T) bool: which of the new slots hold something; None for all. A position sees at least itself.
        """
        if self.full and new is None and num_positions == 1:
            return None
        size = (self.num_rows, num_positions)
        fresh = torch.ones(size, dtype=torch.bool, device=self.taken.device) if new is None else new
        if num_positions == 1:
            return torch.cat([self.taken, torch.ones_like(fresh)], 1)[:, None, None]
        itself = torch.eye(num_positions, dtype=torch.bool, device=self.taken.device)
        among_new = itself | (itself.cumsum(0).bool() & fresh[:, None])  # (B, T, T)
        return torch.cat([self.taken[:, None].expand(-1, num_positions, -1), among_new], 2)[:, None]

    def extend(self, new: Tensor | None, num_positions: int) -> None:
        """After a pass: its positions' slots are in use."""
        size = (self.num_rows, num_positions)
        fresh = torch.ones(size, dtype=torch.bool, device=self.taken.device) if new is None else new
        self.full &= new is None
        self.taken = torch.cat([self.taken, fresh], 1)

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Puts (B, heads, T, head_dim) behind the slots in use; returns all of them, (B, heads, S + T, head_dim)."""
        begin, end = self.length, self.length + key.shape[2]
        found = []
        for buffers, states in ((self._keys, key), (self._values, value)):
            if layer == len(buffers):
                buffers.append(states.new_empty(states.shape[0], end, states.shape[1], states.shape[3]))
            if end > buffers[layer].shape[1]:
                buffers[layer] = _copy(buffers[layer][:, :begin], end + max(64, end // 2))
            buffers[layer][:, begin:end] = states.transpose(1, 2)
            found.append(buffers[layer][:, :end].transpose(1, 2))
        return found[0], found[1]


class SlotAttention:
    """One pass of T positions over the rows of several `Slots`, one behind the other in the batch.

    Linear layers see all rows at once, so their weights are read once; each row attends to its own slots.
    """

    def __init__(self, blocks: Sequence[Slots], num_positions: int, new: Sequence[Tensor | None]) -> None:
        """`new`: for each of the blocks (B, T) bool, which of the new slots hold something; None for all."""
        self.blocks, self.num_positions, self.new = blocks, num_positions, new
        self.masks = [block.visible(fresh, num_positions) for block, fresh in zip(blocks, new, strict=True)]

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        sizes = [block.num_rows for block in self.blocks]
        states = zip(self.blocks, self.masks, query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
        found = []
        for block, mask, queries, keys, values in states:
            seen = block.write(module.layer_idx, keys, values)
            found.append(sdpa_attention_forward(module, queries, *seen, mask, scaling=scaling)[0])
        return found[0] if len(found) == 1 else torch.cat(found)

    def finish(self) -> None:
        """After the last layer."""
        for block, fresh in zip(self.blocks, self.new, strict=True):
            block.extend(fresh, self.num_positions)


def _copy(states: Tensor, capacity: int) -> Tensor:
    """(B, S, ...) in a buffer (B, capacity, ...)."""
    buffer = states.new_empty(states.shape[0], capacity, *states.shape[2:])
    buffer[:, : states.shape[1]] = states
    return buffer
