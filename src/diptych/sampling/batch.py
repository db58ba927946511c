"""Documents that are written together, row by row over one KV cache; others may join and leave between phases.

Phase-aligned lockstep. Rows share the slots of a KV cache. In a text phase every row writes text until it begins an image or ends (a row
of form `image` has begun it in its prompt); a row that waits leaves a slot empty, and positions count real tokens. In an image phase the
rows that draw walk through the family's layout; each has an unconditional branch in the same forward pass, with a KV cache of its own
that restarts at each image. Prompts are prefilled once per group; finished rows are dropped at the end of a phase.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diptych.config import SamplingParams
from diptych.models.base import UnifiedModel
from diptych.models.image_spec import CODE
from diptych.sampling.distribution import FOREVER, Grammar, draw, log_distribution
from diptych.sampling.guidance import branch_prefixes, mix, num_branches
from diptych.sampling.rollout import PartialRollout, Piece, partial_row
from diptych.sampling.stream import Steps, Stream, advance
from diptych.tokens import AnswerForm, Modality, TokenRow

ASK_EVERY = {"cpu": 1}  # text tokens between two questions whether all rows are done, by device: to ask is to wait for it
Watch = Callable[[list[tuple[PartialRollout, list[int]]]], None]  # is given text tokens as they are chosen


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """`count` documents of one prompt.

    generator: on the CPU; their random numbers are drawn from it at the start. max_images: of each document, where it is free.
    max_text_tokens: of all texts of a document together; None: no limit but that of each text.
    """

    prompt: TokenRow
    generator: torch.Generator
    count: int
    max_images: int
    max_text_tokens: int | None = None


@dataclasses.dataclass
class _Rows:
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

    def join(self, other: _Rows) -> None:
        rounds = max(self.text_uniforms.shape[1], other.text_uniforms.shape[1])
        for field in dataclasses.fields(self):
            parts = [getattr(self, field.name), getattr(other, field.name)]
            if field.name.endswith("_uniforms"):  # documents of fewer images have numbers for fewer rounds
                parts = [torch.cat([part, part.new_zeros(len(part), rounds - part.shape[1], *part.shape[2:])], 1) for part in parts]
            setattr(self, field.name, torch.cat(parts))


class Batch:
    """`partials`: the documents that are being written, row by row. `drawing`: the next phase is one of images.

    `yields`: a text phase ends as soon as half of its rows or fewer still write, and these go on in the next one; the images that were
    begun are drawn meanwhile. So phases are short and full, for documents that come and go. Otherwise all rows are in one phase.
    """

    rows: _Rows
    stream: Stream

    def __init__(self, model: UnifiedModel, params: SamplingParams, graphs: bool | None = None, yields: bool = False) -> None:
        """`params`: resolved for the model; of all documents, but for `max_images`, which each brings.
        `graphs`: steps of unchanging shape, replayed as CUDA graphs; None: on a GPU."""
        self.model, self.params, self.yields = model, params, yields
        self.spec, self.device = model.image_spec, model.device
        self.grammar = Grammar.of(model, params)
        self.graphs = self.device.type == "cuda" if graphs is None else graphs
        self.room = params.max_text_tokens + len(self.spec.layout)  # positions of a text phase and an image phase
        self.partials: list[PartialRollout] = []
        self.drawing = False
        self.bounded = False  # whether the texts of some document have a limit together

    # --- who is in the batch ---------------------------------------------------------------------------------------------
    def join(self, asked: Sequence[Asked]) -> list[PartialRollout]:
        """Prefills the prompts, and adds their documents behind those that are being written; those of one prompt are adjacent. Between a
        text phase and the images after it, only documents that begin with their image can join, unless the batch yields."""
        assert asked
        new = [PartialRollout(one.prompt) for one in asked for _ in range(one.count)]
        assert self.yields or not self.drawing or all(one.form is AnswerForm.IMAGE for one in new), "texts cannot join an image phase"
        rows = self._rows(asked, new)
        repeat = torch.arange(len(asked)).repeat_interleave(torch.tensor([one.count for one in asked]))
        stream = Stream(self.model, [one.prompt for one in asked], repeat, self.room)
        if self.partials:
            self.rows.join(rows)
            self.stream.join(stream, self.room)
        else:
            self.rows, self.stream = rows, stream
        self.partials = [*self.partials, *new]
        self.bounded |= any(one.max_text_tokens is not None for one in asked)
        return new

    def drop(self, partials: Sequence[PartialRollout]) -> None:
        """Leaves these documents unfinished."""
        gone = {id(one) for one in partials}
        self._keep(torch.tensor([id(one) not in gone for one in self.partials], device=self.device))

    def advance(self, watch: Watch | None = None) -> list[PartialRollout]:
        """One phase: texts until each row has begun an image or ended, or one image for each row that began one. Returns the documents
        that are finished.

        `watch`: is given the tokens of texts meanwhile; on a GPU those of a few steps at once.
        """
        before = self.partials
        if not self.drawing:
            self._keep(self._text_phase(watch))
            self.drawing = bool(self.partials) and (not self.yields or bool(self.rows.draws.any()))
        else:
            drew = self._image_phase()
            self.drawing = False
            if any(one.form.ends_with_image for one in self.partials):
                self._end_with_image(drew)
        left = {id(one) for one in self.partials}
        return [one for one in before if id(one) not in left]

    def _rows(self, asked: Sequence[Asked], new: Sequence[PartialRollout]) -> _Rows:
        forms = [one.form for one in new]
        limits = [dataclasses.replace(self.grammar, max_images=one.max_images) for one in asked for _ in range(one.count)]
        left = [FOREVER if one.max_text_tokens is None else one.max_text_tokens for one in asked for _ in range(one.count)]
        rounds, texts = 1 + max(one.max_images for one in asked), self.params.max_text_tokens
        drawn = []  # (count, rounds, choices) for each prompt
        for one in asked:
            numbers = uniforms(self.model, self.params.model_copy(update={"max_images": one.max_images}), one.count, one.generator)
            drawn.append(torch.cat([numbers, numbers.new_zeros(one.count, rounds - numbers.shape[1], numbers.shape[2])], 1))
        numbers = torch.cat(drawn).to(self.device)

        def placed(values: list[Any]) -> Tensor:
            return torch.tensor(values, device=self.device)

        return _Rows(
            round=torch.zeros(len(new), dtype=torch.long, device=self.device),
            place=torch.zeros(len(new), dtype=torch.long, device=self.device),
            draws=placed([form is AnswerForm.IMAGE for form in forms]),
            num_images=placed([one.num_given for one in new]),
            limit=placed([grammar.limit(form) for grammar, form in zip(limits, forms, strict=True)]),
            must_draw=placed([form is AnswerForm.TEXT_IMAGE for form in forms]),
            ends_with_image=placed([form.ends_with_image for form in forms]),
            text_left=placed(left),
            text_uniforms=numbers[..., :texts],
            image_uniforms=numbers[..., texts:].unflatten(-1, (self.spec.num_positions, self.spec.depth)),
        )

    def _keep(self, keep: Tensor) -> None:
        if not self.stream.cache.compact or not bool(keep.all()):
            rows = keep.nonzero().squeeze(1)
            self.partials = [self.partials[row] for row in rows.tolist()]
            self.rows.select(rows)
            self.stream.select(rows, self.room)

    def _end_with_image(self, drew: Tensor) -> None:
        """Drops the rows that drew, (B,) bool, and whose form ends with their picture; the end stands behind it."""
        ends = self.rows.ends_with_image & drew
        for row in ends.nonzero().flatten().tolist():
            self.partials[row].pieces.append(Piece.forced(self.model.answer_end_ids))
        self._keep(~ends)

    # --- texts -----------------------------------------------------------------------------------------------------------
    def _text_phase(self, watch: Watch | None) -> Tensor:
        """All rows write text until each has begun an image or ended. Returns (B,) bool, True where a document is not finished.

        Where steps are not recorded, rows that still write continue by themselves as soon as they are half of the rows or fewer, so that
        a long text does not keep the whole batch computing. Where the batch yields, they wait for the next phase instead.
        """
        limit, known = self.params.max_text_tokens, self.rows
        forms = {one.form for one in self.partials}
        draws = known.draws
        if forms == {AnswerForm.IMAGE}:
            return draws
        shape = (len(self.partials), limit)
        tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
        values = torch.zeros(shape, device=self.device)
        wrote = torch.zeros(shape, dtype=torch.bool, device=self.device)
        rows = torch.arange(len(self.partials), device=self.device)  # who is computed
        uniforms = known.text_uniforms[rows, known.round]  # (B, max_text_tokens)
        must_draw = known.must_draw if AnswerForm.TEXT_IMAGE in forms else None
        stream = self.stream
        forks: list[tuple[Stream, Tensor, int]] = []  # (what was forked, which of its rows, tokens until then)
        truncated = ~draws & (known.text_left <= 0)
        step, writing = self._steps([stream], limit), ~draws & ~truncated
        unfinished = torch.zeros_like(draws)
        num_fed = num_told = 0
        for count in range(limit):
            places = known.place[rows] + count if self.yields else None
            logits, may_draw = self.model.text_logits(stream.hidden), known.num_images[rows] < known.limit[rows]
            log_dist = self.grammar.log_distribution(logits, self.params.text, may_draw, None if must_draw is None else must_draw[rows])
            numbers = uniforms[rows, count] if places is None else uniforms[rows, places.clamp(max=limit - 1)]  # waiting rows draw none
            token = draw(log_dist, self.params.text, numbers)  # (B',)
            tokens[rows, count] = token
            values[rows, count] = log_dist.gather(-1, token[:, None]).squeeze(-1)
            wrote[rows, count] = writing
            begins = writing & (token == self.spec.begin_id)
            draws[rows] |= begins
            known.num_images[rows] += begins
            going_on = writing & ~begins & (token != self.model.eos_id)
            if count == limit - 1 or self.bounded or places is not None:
                cut = going_on & (known.text_left[rows] <= count + 1)
                cut |= going_on if count == limit - 1 else going_on & (places >= limit - 1) if places is not None else False
                truncated[rows] |= cut
                going_on = going_on & ~cut
            fed = going_on | begins
            asks = (count + 1) % ASK_EVERY.get(self.device.type, 8) == 0 or count == limit - 1
            if asks and watch is not None:
                self._tell(watch, tokens[:, num_told : count + 1], wrote[:, num_told : count + 1])
                num_told = count + 1
            if asks and not bool(fed.any()):
                break
            all_fed = self.device.type == "cpu" and not self.graphs and bool(fed.all())  # then nobody waits, and no mask is needed
            step([self.model.embed_text(token)[:, None]], None if all_fed else fed)
            num_fed, writing = count + 1, going_on
            left = int(writing.sum()) if asks else len(rows)
            if not left:
                break
            if self.yields and asks and 2 * left <= len(rows):
                unfinished = writing
                break
            if not self.graphs and 2 * left <= len(rows):
                picked = writing.nonzero().squeeze(1)
                forks.append((stream, picked, num_fed))
                stream, rows, writing = stream.fork(picked, limit - num_fed), rows[picked], writing[picked]
                step = self._steps([stream], limit - num_fed)
        for parent, picked, since in reversed(forks):
            parent.merge(stream, picked, num_fed - since)
            stream = parent
        num_written = wrote.sum(1)
        known.text_left -= num_written
        self._record_text(tokens.cpu(), values.cpu(), wrote.cpu(), truncated)
        known.place += num_written
        if must_draw is not None:
            last = tokens.gather(1, (num_written - 1).clamp(min=0)[:, None]).squeeze(1)
            draws |= self._begin_images(truncated & must_draw, last)
        return draws | unfinished

    def _tell(self, watch: Watch, tokens: Tensor, wrote: Tensor) -> None:
        """`tokens`, `wrote`: (B, steps) of the steps since it was told last."""
        told = []
        for one, ids, kept in zip(self.partials, tokens.tolist(), wrote.tolist(), strict=True):
            if any(kept):
                told.append((one, [token for token, its in zip(ids, kept, strict=True) if its]))
        watch(told)

    def _record_text(self, tokens: Tensor, values: Tensor, wrote: Tensor, truncated: Tensor) -> None:
        goes_on = self.rows.place.tolist() if self.yields else [0] * len(self.partials)
        for i, (written, cut) in enumerate(zip(self.partials, truncated.tolist(), strict=True)):
            kept = wrote[i]
            if bool(kept.any()):
                piece = Piece(Modality.TEXT, tokens[i][kept], values[i][kept], kept[kept])
                if goes_on[i]:
                    piece = written.pieces.pop().longer(piece)
                written.pieces.append(piece)
            written.truncated |= cut

    def _begin_images(self, rows: Tensor, last: Tensor) -> Tensor:
        """Begins a picture in the rows, (B,) bool, whose text was cut before one was begun; `last` (B,): the token not fed yet."""
        if bool(rows.any()):
            for token in (last, torch.full_like(last, self.spec.begin_id)):
                advance(self.model, [self.stream], [self.model.embed_text(token)[:, None]], rows)
            self.rows.num_images += rows
            for row in rows.nonzero().flatten().tolist():
                self.partials[row].pieces.append(Piece.forced([self.spec.begin_id]))
        return rows

    # --- images ----------------------------------------------------------------------------------------------------------
    def _image_phase(self) -> Tensor:
        """Every row that began an image draws it: codes where the layout has them, forced tokens where it says so. Returns (B,) bool, who.

        Its other branches of guidance share every forward pass, until the last code is drawn. What is known is fed at once: a code and
        the forced tokens behind it make one pass.
        """
        known, drew = self.rows, self.rows.draws.clone()
        rows = drew.nonzero().squeeze(1)
        partials = [self.partials[row] for row in rows.tolist()]
        together = len(partials) == len(self.partials)
        stream = self.stream if together else self.stream.fork(rows, len(self.spec.layout))
        branches = self._guidance_branches(partials)
        streams = [stream, *branches]
        step = self._steps(streams, self.spec.code_offsets[-1])
        uniforms = known.image_uniforms[rows, known.round[rows]]  # (B', num_positions, D)
        all_codes: list[Tensor] = []
        all_values: list[Tensor] = []
        waiting: list[Tensor] = []  # (B', H) each: embeddings not fed yet
        for kind in self.spec.layout:
            if kind == CODE:
                if waiting:
                    step([torch.stack(waiting, 1)] * len(streams))
                codes, values = self._draw_position(streams, uniforms[:, len(all_codes)])
                all_codes.append(codes)
                all_values.append(values)
                waiting = [self.model.embed_codes(codes)]
            else:
                waiting.append(self.model.embed_text(torch.full_like(rows, kind)))
        advance(self.model, [stream], [torch.stack(waiting, 1)])
        if not together:
            self.stream.merge(stream, rows, len(self.spec.layout))
        images, numbers = torch.stack(all_codes, 1).cpu(), torch.stack(all_values, 1).cpu()  # (B', positions, D)
        for i, written in enumerate(partials):
            chosen = torch.ones(len(images[i]), dtype=torch.bool)
            written.pieces.append(Piece(Modality.IMAGE, images[i], numbers[i], chosen))
        known.round += drew
        known.place.masked_fill_(drew, 0)
        known.draws = torch.zeros_like(drew)
        return drew

    def _steps(self, streams: list[Stream], steps: int) -> Callable[..., None]:
        """What feeds these streams for up to so many positions."""
        return Steps(self.model, streams, steps) if self.graphs and steps else partial(advance, self.model, streams)

    def _draw_position(self, streams: list[Stream], uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """The D codes of one position, depth by depth: (B', D) codes and their log-probabilities. `streams`: conditional first."""
        hidden, size = torch.cat([stream.hidden for stream in streams]), len(uniforms)
        codes = torch.empty(size, 0, dtype=torch.long, device=self.device)
        values = []
        for depth in range(self.spec.depth):
            conditional, *others = self.model.image_step(hidden, codes.repeat(len(streams), 1)).split(size)
            log_dist = log_distribution(mix(conditional, others, self.params.image), self.params.image)
            code = draw(log_dist, self.params.image, uniforms[:, depth])
            values.append(log_dist.gather(-1, code[:, None]).squeeze(-1))
            codes = torch.cat([codes, code[:, None]], dim=1)
        return codes, torch.stack(values, 1)

    def _guidance_branches(self, partials: Sequence[PartialRollout]) -> list[Stream]:
        """A stream for each other branch of guidance, at `begin_id`; rows with the same prefix share its prefill."""
        count = num_branches(self.params.image)
        prefixes = []
        for written in partials if count else []:
            length = written.prompt.prompt_length
            prefixes.append(branch_prefixes(self.model, self.params.image, length, partial(partial_row, self.model, written)))
        branches = []
        for alike in zip(*prefixes, strict=True):
            places: dict[tuple[Any, ...], int] = {}
            rows: list[TokenRow] = []
            which: list[int] = []
            for prefix in alike:
                key = (*prefix.text_ids.tolist(), *prefix.codes.flatten().tolist(), *map(id, prefix.pixels))
                if key not in places:
                    places[key] = len(rows)
                    rows.append(prefix)
                which.append(places[key])
            branches.append(Stream(self.model, rows, torch.tensor(which), len(self.spec.layout)))
        return branches


def num_uniforms(model: UnifiedModel, params: SamplingParams) -> int:
    """Choices that one document may make, as rounds of the longest text and an image."""
    return (params.max_images + 1) * (params.max_text_tokens + model.image_spec.num_positions * model.image_spec.depth)


def uniforms(model: UnifiedModel, params: SamplingParams, num_documents: int, generator: torch.Generator) -> Tensor:
    """(num_documents, rounds, choices of a text and of an image) float64: one uniform number for every choice that a document may make,
    drawn at the start. So a choice depends on its document and its place alone: not on who else is in the batch, on how long others
    write, or on the device."""
    rounds = params.max_images + 1
    return torch.rand(num_documents, rounds, num_uniforms(model, params) // rounds, dtype=torch.float64, generator=generator)
