"""Sequences that grow together: the documents being written, and beside them their other branches of guidance."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from diptych.models.attention import CacheAttention, KVCache, StepAttention
from diptych.models.base import UnifiedModel
from diptych.tokens import TokenRow, collate

POSITIONS_PER_GRAPH = 128


class Stream:
    """B sequences that share a KV cache. A row that waits gets an empty slot, and positions count real tokens.

    hidden: (B, H), the state that predicts each row's next position.
    position: (B,) int64, real positions so far.
    """

    def __init__(self, model: UnifiedModel, rows: list[TokenRow], repeat: Tensor, room: int) -> None:
        """Prefills `rows` together, once each; `repeat` (B,) int64 says which of them each sequence starts from.
        `room`: how many positions will probably follow."""
        device = model.device
        batch = collate(rows).to(device)
        real = None if len({len(row) for row in rows}) == 1 else batch.attention_mask
        self.cache = KVCache(len(rows), device)
        layout = CacheAttention([self.cache], batch.text_ids.shape[1], [real])
        states = model.backbone(model.embed(batch), batch.position_ids, layout)
        layout.finish()
        self.position = batch.attention_mask.sum(1)
        self.hidden = states[torch.arange(len(rows), device=device), self.position - 1]
        self.select(repeat.to(device), room)

    def join(self, other: Stream, room: int) -> None:
        """Adds the sequences of another behind its own, with room for so many more positions."""
        self.cache.join(other.cache, room)
        self.hidden, self.position = torch.cat([self.hidden, other.hidden]), torch.cat([self.position, other.position])

    def select(self, rows: Tensor, room: int) -> None:
        """These rows, (B',) int64, with room for so many more positions."""
        self.cache.select(rows, room)
        self.hidden, self.position = self.hidden[rows], self.position[rows]

    def fork(self, rows: Tensor, room: int) -> Stream:
        """These rows as a stream of their own, which continues alone until `merge`."""
        other = copy(self)
        other.cache = self.cache.copy(rows, room)
        other.hidden, other.position = self.hidden[rows], self.position[rows]
        return other

    def merge(self, other: Stream, rows: Tensor, count: int) -> None:
        """Takes back a fork that was fed `count` positions."""
        self.cache.put_back(other.cache, rows, count)
        self.hidden = self.hidden.index_copy(0, rows, other.hidden)
        self.position = self.position.index_copy(0, rows, other.position)


def advance(model: UnifiedModel, streams: Sequence[Stream], embeds: Sequence[Tensor], active: Tensor | None = None) -> None:
    """One forward pass for all streams together, which feeds each of their rows the same number of positions.

    Args:
        embeds: for each stream (B, T, H).
        active: (B,) bool of the first stream, for T = 1: rows that are not active wait. Those of other streams never do.
    """
    num_positions = embeds[0].shape[1]
    new = [None if active is None else active[:, None], *[None] * (len(streams) - 1)]
    layout = CacheAttention([stream.cache for stream in streams], num_positions, new)
    positions = torch.cat([stream.position for stream in streams])[:, None] + torch.arange(num_positions, device=embeds[0].device)
    hidden = model.backbone(torch.cat(list(embeds)), positions, layout)[:, -1]
    layout.finish()
    _hand_out(streams, hidden, active, num_positions)


class Steps:
    """`advance` for up to `steps` positions, one at a time, as a CUDA graph: recorded at the start, replayed for each position, so that
    the host does not have to issue a thousand small kernels. On a CPU the same step is run without recording.

    A graph attends to all cache slots that it may ever fill, so a long phase has one for every POSITIONS_PER_GRAPH positions.
    """

    def __init__(self, model: UnifiedModel, streams: Sequence[Stream], steps: int) -> None:
        self.model, self.streams, self.steps = model, streams, steps
        self.left = 0  # positions that the present graph can still feed
        positions = torch.cat([stream.position for stream in streams])
        self.embeds = torch.zeros(len(positions), 1, streams[0].hidden.shape[1], dtype=model.dtype, device=positions.device)
        self.active = torch.ones_like(positions, dtype=torch.bool)
        self.positions = positions[:, None]
        self.hidden = torch.empty(0)

    def __call__(self, embeds: Sequence[Tensor], active: Tensor | None = None) -> None:
        """As `advance`."""
        for position in torch.cat(list(embeds)).split(1, dim=1):
            if not self.left:
                self._begin()
            self.embeds.copy_(position)
            if active is not None:
                self.active[: len(active)].copy_(active)
            if self.graph is None:
                self._step()
            else:
                self.graph.replay()
            self.layout.count(active is None)
            self.left -= 1
            _hand_out(self.streams, self.hidden.clone(), active, 1)

    def _begin(self) -> None:
        self.left = min(POSITIONS_PER_GRAPH, self.steps)
        assert self.left, "more positions than were announced"
        self.steps -= self.left
        self.layout = StepAttention([stream.cache for stream in self.streams], self.left)
        self.graph = self._record() if self.positions.is_cuda else None

    def _step(self) -> None:
        self.layout.begin()
        self.hidden = self.model.backbone(self.embeds, self.positions, self.layout)[:, -1]
        self.layout.finish(self.active)
        self.positions += self.active[:, None]

    def _record(self) -> torch.cuda.CUDAGraph:
        """Two steps to warm up on a stream of their own, as recording asks for, and one that is recorded; none of them counts."""
        started = self.positions.clone()
        with torch.cuda.device(started.device):  # streams are of the GPU in use, which is the first where a model was put on another
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._step()
                    self._undo(started)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # rewards may use the GPU in a thread of their own
                self._step()
        self._undo(started)
        return graph

    def _undo(self, positions: Tensor) -> None:
        self.layout.rewind()
        self.positions.copy_(positions)


def _hand_out(streams: Sequence[Stream], hidden: Tensor, active: Tensor | None, num_positions: int) -> None:
    for stream, states in zip(streams, hidden.split([len(stream.position) for stream in streams]), strict=True):
        if active is None or stream is not streams[0]:
            stream.hidden, stream.position = states, stream.position + num_positions
        else:
            stream.hidden = torch.where(active[:, None], states, stream.hidden)
            stream.position = stream.position + active
