"""Sequences in one row without padding, in which a beginning that several have in common stands once.

Linear layers compute each position once. Attention gathers, for every sequence, its queries and what they may see; that is the only
place where anything is padded. Exact: a common beginning's states depend on nothing behind it, and in the backward pass it
receives the gradient of all that follow.

Example: two answers `x y` and `z` to the prompt `a b`.

    flat           a  b  x  y  z
    position_ids   0  1  2  3  2
    place          [0 1 2 3] and [0 1 4]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from diptych.tokens import TokenBatch, TokenRow, collate

SLACK = 1.25  # sequences that attend together: the longest is at most so much longer than the shortest


@dataclasses.dataclass(frozen=True)
class Attending:
    """Pieces that attend together, all behind beginnings of one length. queries (R, T) and seen (R, S): flat positions, 0 where there is
    none. mask: (1, 1, T, S) bool; None where there is no beginning, so that attention is plainly causal.

    Padding stands at the end, where only padding sees it.
    """

    queries: Tensor
    seen: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> Attending:
        own = pad_sequence([piece.own for piece in pieces], batch_first=True)  # (R, T)
        size, width = own.shape[1], len(pieces[0].before)
        if not width:
            return cls(own, own, None)
        mask = torch.ones(size, width + size, dtype=torch.bool).tril(width)[None, None]
        return cls(own, torch.cat([torch.stack([piece.before for piece in pieces]), own], 1), mask)

    def to(self, device: torch.device) -> Attending:
        mask = None if self.mask is None else self.mask.to(device)
        return Attending(self.queries.to(device), self.seen.to(device), mask)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Flat positions, one-dimensional int64: those of a piece, and those of the beginning that it stands behind."""

    own: Tensor
    before: Tensor


def alike(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """In groups with beginnings of one length and lengths within SLACK."""
    groups: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda p: (len(p.before), len(p.own))):
        if groups and len(groups[-1][0].before) == len(piece.before) and len(piece.own) <= SLACK * len(groups[-1][0].own):
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


class PackedAttention:
    """The layout of a packed row. order: (N,) int64, where the outcome for each flat position is among those of `parts`."""

    def __init__(self, parts: Sequence[Attending], order: Tensor) -> None:
        self.parts, self.order = parts, order

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        flat = [states[0].transpose(0, 1) for states in (query, key, value)]  # (N, heads, head_dim)
        found = []
        for part in self.parts:
            queries, keys, values = (
                states.index_select(0, at.flatten()).unflatten(0, at.shape).transpose(1, 2)
                for states, at in zip(flat, (part.queries, part.seen, part.seen), strict=True)
            )
            found.append(sdpa_attention_forward(module, queries, keys, values, part.mask, scaling=scaling)[0].flatten(0, 1))
        return torch.cat(found).index_select(0, self.order)[None]


@dataclasses.dataclass(frozen=True)
class Packed:
    """batch: (1, N), its `position_ids` those of the sequences. place: for each sequence its flat positions, (T_i,) int64, on the CPU."""

    batch: TokenBatch
    layout: PackedAttention
    place: list[Tensor]


def pack(rows: Sequence[TokenRow], beginnings: Sequence[int], device: torch.device) -> Packed:
    """Sequences on the CPU. `beginnings[i]`: how many of row i's first positions may be shared with other rows.

    Raises ValueError where there is nothing to pack.
    """
    members: dict[tuple[Any, ...], list[int]] = {}
    for index, (row, length) in enumerate(zip(rows, beginnings, strict=True)):
        members.setdefault(_key(row[:length]) if length else (index,), []).append(index)
    flat: list[TokenRow] = []
    positions: list[Tensor] = []
    pieces: list[Piece] = []
    place: list[Tensor] = [torch.empty(0)] * len(rows)
    count = 0

    def put(row: TokenRow, before: Tensor) -> Tensor:
        nonlocal count
        own = torch.arange(count, count + len(row))
        count += len(row)
        flat.append(row)
        positions.append(torch.arange(len(row)) + len(before))
        if len(row):
            pieces.append(Piece(own, before))
        return own

    nothing = torch.empty(0, dtype=torch.long)
    for indices in members.values():
        length = beginnings[indices[0]] if len(indices) > 1 else 0
        beginning = put(rows[indices[0]][:length], nothing)
        for index in indices:
            place[index] = torch.cat([beginning, put(rows[index][length:], beginning)])
    groups = alike(pieces)
    parts = [Attending.of(group) for group in groups]
    order = torch.empty(count, dtype=torch.long)
    first = 0
    for part, group in zip(parts, groups, strict=True):
        for piece in group:
            order[piece.own] = torch.arange(first, first + len(piece.own))
            first += part.queries.shape[1]
    batch = dataclasses.replace(collate([TokenRow.concat(flat)]), position_ids=torch.cat(positions)[None])
    layout = PackedAttention([part.to(device) for part in parts], order.to(device))
    return Packed(batch.to(device), layout, place)


def _key(row: TokenRow) -> tuple[Any, ...]:
    """Equal for sequences that are the same to the model. Pictures are compared as objects: a group shares its prompt's."""
    return (*row.text_ids.tolist(), *row.codes.flatten().tolist(), *row.modality.tolist(), *map(id, row.pixels))
