"""Attention over a KV cache that Diptych lays out itself, inside transformers' own decoders.

A decoder of any family is called as it is; only where its layers attend to is ours: `Layout.attend` stands in for the attention
function (transformers' `AttentionInterface`). Sampling has `CacheAttention` and `StepAttention`, scoring `PackedAttention` (`packing.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "diptych_layout"
FEW = 8  # positions of one pass that attend by products


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


class CausalAttention:
    """A few positions, each after those before it. Given no layout, transformers asks the device whether sequences are packed."""

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)[0]


class KVCache:
    """The KV cache of B rows that share its slots: row b has something in slot s where `occupied[b, s]`.

    Every layer has a buffer (B, key-value heads, capacity, head_dim), of which the first `length` slots are in use: attention reads
    them where they lie, and a new position is written in place. In memory the slots lie where the products of `attention` read them
    fastest (`new_buffer`).

    full: every row has something in every slot (known without asking the device), so that no mask is needed.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.num_rows, self.length, self.full = num_rows, 0, True
        self._occupied = torch.zeros(num_rows, 0, dtype=torch.bool, device=device)  # (B, capacity)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    @property
    def occupied(self) -> Tensor:
        """(B, length) bool."""
        return self._occupied[:, : self.length]

    @property
    def num_bytes(self) -> int:
        """Of the slots in use."""
        return sum(2 * buffer[:, :, : self.length].nbytes for buffer in self._keys)

    def select(self, rows: Tensor, room: int) -> None:
        """These rows, (B',) int64, in this order. Where a quarter of the slots or more are needed by no row, each row's are moved together.
        Where anything is moved, there is room for so many more slots behind."""
        places = self._together(rows)
        same = len(rows) == self.num_rows and bool((rows == torch.arange(len(rows), device=rows.device)).all())
        if places is not None or not same:
            self._take(rows, places, room)

    def _together(self, rows: Tensor) -> Tensor | None:
        """For each of these rows the slots that hold something, and then others, (B', slots that are needed); None: they stay where they
        are, because moving them would free few."""
        if self.full:
            return None
        occupied = self.occupied[rows]
        needed = int(occupied.sum(1).max()) if len(rows) else 0
        return None if 4 * needed > 3 * self.length else (~occupied).long().argsort(dim=1, stable=True)[:, :needed]

    def _take(self, rows: Tensor, places: Tensor | None, room: int) -> None:
        occupied, length = self.occupied[rows], self.length if places is None else places.shape[1]
        if places is None:
            self._change(occupied, lambda buffer, into: _copy_rows(buffer[:, :, :length], rows, into), length + room)
        else:
            occupied = occupied.gather(1, places)
            spread = rows[:, None], places
            self._change(occupied, lambda buffer, into: into.copy_(buffer.transpose(1, 2)[spread].transpose(1, 2)), length + room)
        self.num_rows, self.length, self.full = len(rows), length, bool(occupied.all())

    def join(self, other: KVCache, room: int) -> None:
        """Adds the rows of another behind its own, with room for so many more slots."""
        length, sizes = max(self.length, other.length), (self.num_rows, other.num_rows)
        occupied = self._occupied.new_zeros(sum(sizes), length + room)
        occupied[: sizes[0], : self.length], occupied[sizes[0] :, : other.length] = self.occupied, other.occupied
        for mine, theirs in ((self._keys, other._keys), (self._values, other._values)):
            for layer, (first, second) in enumerate(zip(mine, theirs, strict=True)):
                mine[layer] = new_buffer(first, sum(sizes), length + room)
                for part, states, used in zip(mine[layer].split(sizes), (first, second), (self.length, other.length), strict=True):
                    part[:, :, :used] = states[:, :, :used]
                    part[:, :, used:length] = 0  # what memory held there before might be NaN, which no mask takes away
        self.full = self.full and other.full and self.length == other.length
        self.num_rows, self.length, self._occupied = sum(sizes), length, occupied

    def copy(self, rows: Tensor, room: int) -> KVCache:
        """What `select` would leave, in buffers of its own."""
        other = KVCache(self.num_rows, self._occupied.device)
        other._occupied, other.length, other.full = self._occupied, self.length, self.full
        other._keys, other._values = list(self._keys), list(self._values)
        other._take(rows, other._together(rows), room)
        return other

    def put_back(self, other: KVCache, rows: Tensor, count: int) -> None:
        """Takes over the last `count` slots of a copy of these rows, behind the slots in use. The other rows have nothing there."""
        end, since = self.length + count, other.length - count
        self.reserve(end)
        self._occupied[rows, self.length : end] = other._occupied[:, since : other.length]
        for mine, theirs in ((self._keys, other._keys), (self._values, other._values)):
            for buffer, states in zip(mine, theirs, strict=True):
                buffer[:, :, self.length : end] = 0  # what memory held there before might be NaN, which no mask takes away
                buffer[rows, :, self.length : end] = states[:, :, since : other.length]
        self.length, self.full = end, False

    def reserve(self, capacity: int) -> None:
        """Room for so many slots; buffers move where they have less."""
        if capacity > self._occupied.shape[1]:
            self._change(self.occupied, lambda buffer, into: into.copy_(buffer[:, :, : self.length]), capacity)

    def _change(self, occupied: Tensor, move: Callable[[Tensor, Tensor], object], capacity: int) -> None:
        """Every buffer in one of other rows and another capacity, whose slots in use, `occupied` (B', length), are filled by `move`."""
        size, length = occupied.shape
        self._occupied = occupied.new_zeros(size, capacity)
        self._occupied[:, :length] = occupied
        for buffers in (self._keys, self._values):
            for layer, buffer in enumerate(buffers):
                buffers[layer] = new_buffer(buffer, size, capacity)
                move(buffer, buffers[layer][:, :, :length])

    def visible(self, new: Tensor | None, num_positions: int) -> Tensor | None:
        """Which slots each of `num_positions` new positions sees: (B, 1, T, length + T) bool; None for all before it.

        `new` (B, T) bool: which of the new slots hold something; None for all. A position sees at least itself.
        """
        if self.full and new is None and num_positions == 1:
            return None
        fresh = self._ones(num_positions) if new is None else new
        if num_positions == 1:
            return torch.cat([self.occupied, torch.ones_like(fresh)], 1)[:, None, None]
        itself = torch.eye(num_positions, dtype=torch.bool, device=fresh.device)
        among_new = itself | (itself.cumsum(0).bool() & fresh[:, None])  # (B, T, T)
        return torch.cat([self.occupied[:, None].expand(-1, num_positions, -1), among_new], 2)[:, None]

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Puts (B, heads, T, head_dim) behind the slots in use; returns all of them, (B, heads, length + T, head_dim)."""
        end = self.length + key.shape[2]
        if layer == len(self._keys):  # the first pass
            capacity = max(end, self._occupied.shape[1])
            self._keys.append(new_buffer(key, len(key), capacity))
            self._values.append(new_buffer(value, len(value), capacity))
        for buffers, states in ((self._keys, key), (self._values, value)):
            buffers[layer][:, :, self.length : end] = states
        return self.read(layer, end)

    def write_at(self, cursor: Tensor, layer: int, key: Tensor, value: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Puts (B, heads, 1, head_dim) into the slot `cursor` (1,) int64; returns the first `end` slots."""
        self._keys[layer].index_copy_(2, cursor, key)
        self._values[layer].index_copy_(2, cursor, value)
        return self.read(layer, end)

    def read(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def extend(self, new: Tensor | None, num_positions: int) -> None:
        """After a pass: its positions' slots are in use."""
        self._occupied[:, self.length : self.length + num_positions] = self._ones(num_positions) if new is None else new
        self.full &= new is None
        self.length += num_positions

    def clear(self) -> None:
        """Nothing behind the slots in use: what memory held there before might be NaN, which no mask takes away."""
        self._occupied[:, self.length :] = False
        for buffer in (*self._keys, *self._values):
            buffer[:, :, self.length :] = 0

    def _ones(self, num_positions: int) -> Tensor:
        return torch.ones(self.num_rows, num_positions, dtype=torch.bool, device=self._occupied.device)


class CacheAttention:
    """One pass of T positions over the rows of several KV caches, one behind the other in the batch.

    Linear layers see all rows at once, so their weights are read once; each row attends to its own slots.
    """

    def __init__(self, blocks: Sequence[KVCache], num_positions: int, new: Sequence[Tensor | None]) -> None:
        """`new`: for each of the blocks (B, T) bool, which of the new slots hold something; None for all."""
        self.blocks, self.num_positions, self.new = blocks, num_positions, new
        for block in blocks:
            if block.length + num_positions > block._occupied.shape[1]:
                block.reserve(block.length + num_positions + max(64, block.length // 2))
        self.masks = [block.visible(fresh, num_positions) for block, fresh in zip(blocks, new, strict=True)]

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        found = []
        for block, mask, queries, keys, values in _split(self.blocks, self.masks, query, key, value):
            seen = block.write(module.layer_idx, keys, values)
            found.append(attention(module, queries, *seen, mask, scaling))
        return found[0] if len(found) == 1 else torch.cat(found)

    def finish(self) -> None:
        """After the last layer."""
        for block, fresh in zip(self.blocks, self.new, strict=True):
            block.extend(fresh, self.num_positions)


class StepAttention:
    """One position at a time for the rows of several KV caches, at most `steps` times, with shapes and addresses that stay the same:
    what a CUDA graph can record once and replay. Where to write is a number on the device, and slots not reached yet are masked.

    `begin`, the layers' `attend` and `finish` are recorded; `count` is the host's part of a step.
    """

    def __init__(self, blocks: Sequence[KVCache], steps: int) -> None:
        self.blocks = blocks
        for block in blocks:
            block.reserve(block.length + steps)
            block.clear()
        self.ends = [block.length + steps for block in blocks]
        self.cursors = [torch.tensor([block.length], device=block._occupied.device) for block in blocks]
        self.masks: list[Tensor] = []

    def begin(self) -> None:
        states = zip(self.blocks, self.ends, self.cursors, strict=True)
        self.masks = [block._occupied[:, :end].index_fill(1, cursor, True)[:, None, None] for block, end, cursor in states]

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        found = []
        for i, (block, mask, queries, keys, values) in enumerate(_split(self.blocks, self.masks, query, key, value)):
            seen = block.write_at(self.cursors[i], module.layer_idx, keys, values, self.ends[i])
            found.append(attention(module, queries, *seen, mask, scaling))
        return found[0] if len(found) == 1 else torch.cat(found)

    def finish(self, active: Tensor) -> None:
        """`active`: (rows of all blocks,) bool, which of them were given something."""
        for block, cursor, fresh in zip(self.blocks, self.cursors, active.split([b.num_rows for b in self.blocks]), strict=True):
            block._occupied.index_copy_(1, cursor, fresh[:, None])
            cursor += 1

    def count(self, all_active: bool) -> None:
        """`all_active`: whether no row of the first block waited; those of other blocks never do."""
        for number, block in enumerate(self.blocks):
            block.length += 1
            block.full &= all_active or number > 0

    def rewind(self) -> None:
        """Undoes what steps did that were not counted."""
        for block, cursor in zip(self.blocks, self.cursors, strict=True):
            block.clear()
            cursor.fill_(block.length)


def _copy_rows(states: Tensor, rows: Tensor, into: Tensor) -> None:
    if states.is_cpu:
        torch.index_select(states, 0, rows, out=into)  # a third of the time, without a copy between
    else:
        into.copy_(states.index_select(0, rows))


def _split(
    blocks: Sequence[KVCache], masks: Sequence[Tensor | None], query: Tensor, key: Tensor, value: Tensor
) -> Iterator[tuple[KVCache, Tensor | None, Tensor, Tensor, Tensor]]:
    sizes = [block.num_rows for block in blocks]
    return zip(blocks, masks, query.split(sizes), key.split(sizes), value.split(sizes), strict=True)


def by_products(states: Tensor) -> bool:
    """Whether few positions of such states attend by two batched products, instead of a fused kernel."""
    return states.device.type == "cpu" and states.dtype == torch.float32


def new_buffer(states: Tensor, num_rows: int, capacity: int) -> Tensor:
    """(num_rows, heads, capacity, head_dim) for keys or values like these, (.., heads, .., head_dim).

    Where they are read by products, one that sums over the other slots last in memory: with slots last, both products run along
    them, which takes half the time (docs/lab_notes.md).
    """
    heads, width = states.shape[1], states.shape[3]
    if by_products(states):
        return states.new_empty(num_rows, heads, width, capacity).transpose(2, 3)
    return states.new_empty(num_rows, heads, capacity, width)


def attention(module: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Scaled dot-product attention, (B, T, heads, head_dim), of query (B, heads, T, head_dim) over (B, key-value heads, S, head_dim).

    `mask` (B, 1, T, S) bool. On a CPU a few positions in float32 take two batched products over the buffers as they lie, which is faster
    there than the fused kernel.
    """
    size, num_heads, num_positions, width = query.shape
    if num_positions > FEW or not by_products(query):
        if by_products(query):  # the fused kernel wants head_dim last
            keys, values = keys.contiguous(), values.contiguous()
        return sdpa_attention_forward(module, query, keys, values, mask, scaling=scaling)[0]
    rows = size * keys.shape[1]
    scores = torch.bmm((query * scaling).reshape(rows, -1, width), keys.flatten(0, 1).transpose(1, 2))
    if mask is not None:
        scores.view(size, num_heads, num_positions, -1).masked_fill_(~mask, -torch.inf)
    found = torch.bmm(values.flatten(0, 1).transpose(1, 2), scores.softmax(-1).transpose(1, 2))  # (rows, head_dim, heads of one * T)
    return found.transpose(1, 2).reshape(size, num_heads, num_positions, width).transpose(1, 2)
