"""What is known of the rows that are written together, and the texts that they write, token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diptych.config import SamplingParams
from diptych.models.base import UnifiedModel
from diptych.sampling.distribution import Grammar, draw
from diptych.sampling.rollout import PartialRollout, Piece
from diptych.tokens import Modality

ASK_EVERY = {"cpu": 1}  # text tokens between two questions whether all rows are done, by device: to ask is to wait for it
Watch = Callable[[list[tuple[PartialRollout, list[int]]]], None]  # is given text tokens as they are chosen


@dataclasses.dataclass
class Rows:
    """What is known of each row, (B, ...) each.

    round: texts written so far. place: tokens of the text that it writes. draws: its image is begun. num_images: images begun. limit: the
    most images after which text may be chosen, and one more begun. text_left: text tokens that it may still write.
    text_uniforms: (B, rounds, max_text_tokens) float64, one number for each choice; image_uniforms: (B, rounds, num_positions, D).
    """

    round: Tensor
    place: Tensor
    draws: Tensor
    num_images: Tensor
    limit: Tensor
    must_draw: Tensor
    ends_with_image: Tensor
    text_left: Tensor
    text_uniforms: Tensor
    image_uniforms: Tensor

    def select(self, rows: Tensor) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])

    def join(self, other: Rows) -> None:
        rounds = max(self.text_uniforms.shape[1], other.text_uniforms.shape[1])
        for field in dataclasses.fields(self):
            parts = [getattr(self, field.name), getattr(other, field.name)]
            if field.name.endswith("_uniforms"):  # documents of fewer images have numbers for fewer rounds
                parts = [torch.cat([part, part.new_zeros(len(part), rounds - part.shape[1], *part.shape[2:])], 1) for part in parts]
            setattr(self, field.name, torch.cat(parts))


class Texts:
    """The texts of one phase. A row that has begun its image, ended or been cut waits.

    rows: (B',) int64, the rows that are computed. writing: (B',) bool, which of them write on. count: tokens chosen of each.
    over: nobody writes any more, as far as it was asked. truncated: (B,) bool, whose text was cut.
    """

    def __init__(
        self, model: UnifiedModel, params: SamplingParams, grammar: Grammar, known: Rows, partials: Sequence[PartialRollout],
        watch: Watch | None, *, bounded: bool, goes_on: bool, must_draw: bool,
    ) -> None:  # fmt: skip
        """`bounded`: whether the texts of some document have a limit together. `goes_on`: whether a text may have been begun in an earlier
        phase. `must_draw`: whether the text of some row must end with its image."""
        self.model, self.params, self.grammar, self.known, self.partials, self.watch = model, params, grammar, known, partials, watch
        self.bounded, self.goes_on, self.must_draw = bounded, goes_on, known.must_draw if must_draw else None
        self.limit, device = params.max_text_tokens, known.draws.device
        shape = (len(partials), self.limit)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.values = torch.zeros(shape, device=device)
        self.wrote = torch.zeros(shape, dtype=torch.bool, device=device)
        self.rows = torch.arange(len(partials), device=device)
        self.uniforms = known.text_uniforms[self.rows, known.round]  # (B, max_text_tokens)
        self.truncated = ~known.draws & (known.text_left <= 0)
        self.writing = ~known.draws & ~self.truncated
        self.count = self._num_told = 0
        self.over = False

    @property
    def asks(self) -> bool:
        """Whether it is time to ask the device who is done."""
        return self.count % ASK_EVERY.get(self.rows.device.type, 8) == 0 or self.count == self.limit

    def choose(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of each row, from the states (B', H) that predict it, and which of them are to be fed: (B',) each."""
        known, rows, writing, last = self.known, self.rows, self.writing, self.count == self.limit - 1
        places = known.place[rows] + self.count if self.goes_on else None
        logits, may_draw = self.model.text_logits(hidden), known.num_images[rows] < known.limit[rows]
        must_draw = None if self.must_draw is None else self.must_draw[rows]
        log_dist = self.grammar.log_distribution(logits, self.params.text, may_draw, must_draw)
        numbers = self.uniforms[rows, self.count if places is None else places.clamp(max=self.limit - 1)]  # waiting rows draw none
        token = draw(log_dist, self.params.text, numbers)
        self.tokens[rows, self.count] = token
        self.values[rows, self.count] = log_dist.gather(-1, token[:, None]).squeeze(-1)
        self.wrote[rows, self.count] = writing
        begins = writing & (token == self.model.image_spec.begin_id)
        known.draws[rows] |= begins
        known.num_images[rows] += begins
        going_on = writing & ~begins & (token != self.model.eos_id)
        if last or self.bounded or places is not None:
            cut = going_on & (known.text_left[rows] <= self.count + 1)
            cut |= going_on if last else going_on & (places >= self.limit - 1) if places is not None else False
            self.truncated[rows] |= cut
            going_on = going_on & ~cut
        self.count, self.writing = self.count + 1, going_on
        if self.asks:
            self._tell()
        return token, going_on | begins

    def narrow(self, picked: Tensor) -> None:
        """Only these of the rows, (B'',) int64, are computed from now on."""
        self.rows, self.writing = self.rows[picked], self.writing[picked]

    def _tell(self) -> None:
        """Gives `watch` the tokens since the last time."""
        if self.watch is None or self._num_told == self.count:
            return
        told, since = [], slice(self._num_told, self.count)
        for one, ids, kept in zip(self.partials, self.tokens[:, since].tolist(), self.wrote[:, since].tolist(), strict=True):
            if any(kept):
                told.append((one, [token for token, its in zip(ids, kept, strict=True) if its]))
        self._num_told = self.count
        self.watch(told)

    def record(self) -> None:
        """At the end of the phase: the documents have their tokens."""
        self._tell()
        num_written = self.wrote.sum(1)
        begun = self.known.place.tolist() if self.goes_on else [0] * len(self.partials)
        tokens, values, wrote = self.tokens.cpu(), self.values.cpu(), self.wrote.cpu()
        for i, (written, cut) in enumerate(zip(self.partials, self.truncated.tolist(), strict=True)):
            kept = wrote[i]
            if bool(kept.any()):
                piece = Piece(Modality.TEXT, tokens[i][kept], values[i][kept], kept[kept])
                if begun[i]:
                    piece = written.pieces.pop().longer(piece)
                written.pieces.append(piece)
            written.truncated |= cut
        self.known.text_left -= num_written
        self.known.place += num_written

    @property
    def last(self) -> Tensor:
        """(B,) the token that each row wrote last."""
        return self.tokens.gather(1, (self.wrote.sum(1) - 1).clamp(min=0)[:, None]).squeeze(1)
