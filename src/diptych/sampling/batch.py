"""Documents that are written together, row by row over one KV cache; others may join and leave between phases.

Phase-aligned lockstep. Rows share the slots of a KV cache. In a text phase every row writes text until it begins an image or ends (a row
of form `image` has begun it in its prompt); a row that waits leaves a slot empty, and positions count real tokens. In an image phase the
rows that draw walk through the family's layout; each has an unconditional branch in the same forward pass, with a KV cache of its own
that restarts at each image; rows whose text is not finished write on in the same passes. Prompts are prefilled once per group; finished
rows are dropped at the end of a phase.
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
from diptych.sampling.texts import Rows, Texts, Watch
from diptych.tokens import AnswerForm, Modality, TokenRow


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


class Batch:
    """`partials`: the documents that are being written, row by row. `drawing`: the next phase is one of images.

    `yields`: a text phase ends as soon as half of its rows or fewer still write, and these write on while the images that were begun are
    drawn. So passes are few and full, for documents that come and go. Otherwise all rows are in one phase.
    """

    rows: Rows
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
        self.drawing = self.drawing and bool(self.partials) and bool(self.rows.draws.any())

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
            self._image_phase(watch)
            self.drawing = self.yields and bool(self.partials) and bool(self.rows.draws.all())  # who began one meanwhile
        left = {id(one) for one in self.partials}
        return [one for one in before if id(one) not in left]

    def _rows(self, asked: Sequence[Asked], new: Sequence[PartialRollout]) -> Rows:
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

        return Rows(
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
        rows = keep.nonzero().squeeze(1)
        self.partials = [self.partials[row] for row in rows.tolist()]
        self.rows.select(rows)
        self.stream.select(rows, self.room)

    # --- texts -----------------------------------------------------------------------------------------------------------
    def _texts(self, watch: Watch | None) -> Texts:
        must_draw = any(one.form is AnswerForm.TEXT_IMAGE for one in self.partials)
        given = self.model, self.params, self.grammar, self.rows, self.partials, watch
        return Texts(*given, bounded=self.bounded, goes_on=self.yields, must_draw=must_draw)

    def _text_phase(self, watch: Watch | None) -> Tensor:
        """All rows write text until each has begun an image or ended. Returns (B,) bool, True where a document is not finished.

        Where steps are not recorded, rows that still write continue by themselves as soon as they are half of the rows or fewer, so that
        a long text does not keep the whole batch computing. Where the batch yields, they write on in the next phase instead.
        """
        if all(one.form is AnswerForm.IMAGE for one in self.partials):
            return self.rows.draws
        texts, stream, limit = self._texts(watch), self.stream, self.params.max_text_tokens
        forks: list[tuple[Stream, Tensor, int]] = []  # (what was forked, which of its rows, tokens until then)
        step, num_fed = self._steps([stream], limit), 0
        while texts.count < limit:
            token, fed = texts.choose(stream.hidden)
            if texts.asks and not bool(fed.any()):
                break
            all_fed = self.device.type == "cpu" and not self.graphs and bool(fed.all())  # then nobody waits, and no mask is needed
            step([self.model.embed_text(token)[:, None]], None if all_fed else fed)
            num_fed = texts.count
            left = int(texts.writing.sum()) if texts.asks else len(texts.rows)
            if not left or (self.yields and texts.asks and 2 * left <= len(texts.rows)):
                break
            if not self.graphs and 2 * left <= len(texts.rows):
                picked = texts.writing.nonzero().squeeze(1)
                forks.append((stream, picked, num_fed))
                stream = stream.fork(picked, limit - num_fed)
                texts.narrow(picked)
                step = self._steps([stream], limit - num_fed)
        for parent, picked, since in reversed(forks):
            parent.merge(stream, picked, num_fed - since)
            stream = parent
        return self._end_texts(texts)

    def _end_texts(self, texts: Texts) -> Tensor:
        """Puts them down, and begins the images that must follow a text that was cut. Returns (B,) bool: who draws or writes on."""
        texts.record()
        draws = self.rows.draws
        if texts.must_draw is not None:
            draws |= self._begin_images(texts.truncated & texts.must_draw, texts.last)
        if not self.yields:
            return draws
        writes_on = torch.zeros_like(draws)
        writes_on[texts.rows] = texts.writing
        return draws | writes_on

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
    def _image_phase(self, watch: Watch | None) -> None:
        """Every row that began an image draws it: codes where the layout has them, forced tokens where it says so.

        Its other branches of guidance share every forward pass, until the last code is drawn. Where all rows draw, what is known is fed at
        once: a code and the forced tokens behind it make one pass. Where some do not, these write text in the same passes.
        """
        known, drew = self.rows, self.rows.draws.clone()
        rows = drew.nonzero().squeeze(1)
        partials = [self.partials[row] for row in rows.tolist()]
        texts = None if len(partials) == len(self.partials) else self._texts(watch)
        branches = self._guidance_branches(partials)
        streams = [self.stream, *branches]
        step = self._steps(streams, self.spec.code_offsets[-1])
        uniforms = known.image_uniforms[rows, known.round[rows]]  # (B', num_positions, D)
        all_codes: list[Tensor] = []
        all_values: list[Tensor] = []
        waiting: list[Tensor] = []  # (B', H) each: embeddings not fed yet
        for kind in self.spec.layout:
            if kind == CODE:
                if waiting:
                    self._feed(step, waiting, len(branches), rows, texts)
                hidden = [self.stream.hidden if texts is None else self.stream.hidden[rows], *(branch.hidden for branch in branches)]
                codes, values = self._draw_position(hidden, uniforms[:, len(all_codes)])
                all_codes.append(codes)
                all_values.append(values)
                waiting = [self.model.embed_codes(codes)]
            else:
                waiting.append(self.model.embed_text(torch.full_like(rows, kind)))
        self._feed(partial(advance, self.model, [self.stream]), waiting, 0, rows, texts)
        images, numbers = torch.stack(all_codes, 1).cpu(), torch.stack(all_values, 1).cpu()  # (B', positions, D)
        for i, written in enumerate(partials):
            chosen = torch.ones(len(images[i]), dtype=torch.bool)
            written.pieces.append(Piece(Modality.IMAGE, images[i], numbers[i], chosen))
        goes_on = torch.ones_like(drew) if texts is None else drew | self._end_texts(texts)
        known.round += drew
        known.place.masked_fill_(drew, 0)
        known.draws &= ~drew
        ends = drew & known.ends_with_image
        for row in ends.nonzero().flatten().tolist():  # with their picture; the end stands behind it
            self.partials[row].pieces.append(Piece.forced(self.model.answer_end_ids))
        self._keep(goes_on & ~ends)

    def _feed(self, step: Callable[..., None], waiting: Sequence[Tensor], num_branches: int, rows: Tensor, texts: Texts | None) -> None:
        """Feeds the rows that draw, and their branches, `waiting`, (B', H) each; the other rows are fed what they write meanwhile."""
        if texts is None:
            step([torch.stack(list(waiting), 1)] * (1 + num_branches))
            return
        for drawn in waiting:
            if not texts.over and texts.asks:
                texts.over = texts.count == texts.limit or not bool(texts.writing.any())
            if not texts.over:
                token, fed = texts.choose(self.stream.hidden)
                embeds = self.model.embed_text(token)
            else:
                embeds, fed = drawn.new_zeros(len(self.partials), drawn.shape[1]), torch.zeros_like(self.rows.draws)
            step([embeds.index_copy(0, rows, drawn)[:, None], *[drawn[:, None]] * num_branches], fed.index_fill(0, rows, True))

    def _steps(self, streams: list[Stream], steps: int) -> Callable[..., None]:
        """What feeds these streams for up to so many positions."""
        return Steps(self.model, streams, steps) if self.graphs and steps else partial(advance, self.model, streams)

    def _draw_position(self, states: list[Tensor], uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """The D codes of one position, depth by depth: (B', D) codes and their log-probabilities. `states`: (B', H) of the conditional
        branch, then those of the others."""
        hidden, size = torch.cat(states), len(uniforms)
        codes = torch.empty(size, 0, dtype=torch.long, device=self.device)
        values = []
        for depth in range(self.spec.depth):
            conditional, *others = self.model.image_step(hidden, codes.repeat(len(states), 1)).split(size)
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
