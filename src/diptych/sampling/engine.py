"""The rollout engine: whole documents as one decoding trajectory over one KV cache.

Phase-aligned lockstep. Rows share the slots of a KV cache. In a text phase every row writes text until it begins an image or ends (a row
of form `image` has begun it in its prompt); a row that waits leaves a slot empty, and positions count real tokens. In an image phase the
rows that draw walk through the family's layout; each has an unconditional branch in the same forward pass, with a KV cache of its own
that restarts at each image. Prompts are prefilled once per group; finished rows are dropped at the end of a phase.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diptych.config import SamplingParams
from diptych.models.base import UnifiedModel
from diptych.models.image_spec import CODE
from diptych.models.steps import prepared
from diptych.sampling.distribution import Grammar, draw, log_distribution, resolve
from diptych.sampling.guidance import branch_prefixes, mix, num_branches
from diptych.sampling.rollout import PartialRollout, Piece, Rollout, finish, partial_row
from diptych.sampling.stream import Steps, Stream, advance
from diptych.tokens import AnswerForm, Modality, TokenRow

ASK_EVERY = {"cpu": 1}  # text tokens between two questions whether all rows are done, by device: to ask is to wait for it


def context_needed(model: UnifiedModel, params: SamplingParams, row: TokenRow | None = None) -> int:
    """The most positions that an answer can take: one of the form in the settings, or behind a prompt of a form of its own."""
    text, picture = params.max_text_tokens, len(model.image_spec.layout)
    form = params.form if row is None or row.form is None else row.form
    if form is AnswerForm.TEXT:
        return text
    if form.ends_with_image:
        begins = 0 if form is AnswerForm.IMAGE and row is not None and row.form is not None else 1  # else it is in the prompt
        return (text if form is AnswerForm.TEXT_IMAGE else 0) + begins + picture + len(model.answer_end_ids)
    left = max(0, params.max_images - (0 if row is None else PartialRollout(row).num_given))
    return (left + 1) * text + left * picture


def most_choices(model: UnifiedModel, params: SamplingParams) -> int:
    """The most choices of an answer of the form in the settings; a code is one."""
    forms = {AnswerForm.IMAGE: (0, 1), AnswerForm.TEXT: (1, 0), AnswerForm.TEXT_IMAGE: (1, 1)}
    texts, images = forms.get(params.form, (params.max_images + 1, params.max_images))
    return texts * params.max_text_tokens + images * model.image_spec.num_positions * model.image_spec.depth


def check_room(model: UnifiedModel, row: TokenRow, params: SamplingParams) -> None:
    """Raises ValueError where the longest possible answer does not fit behind a prompt."""
    needed = context_needed(model, params, row)
    if len(row) + needed > model.max_positions:
        raise ValueError(
            f"a prompt of {len(row)} positions and an answer of up to {needed} exceed the model's context of {model.max_positions}; "
            "shorten the prompt or lower max_images or max_text_tokens"
        )


def fit_to_context(model: UnifiedModel, prompt: TokenRow, params: SamplingParams) -> SamplingParams:
    """The same settings with `max_images`, of free answers, lowered to what fits behind the prompt (0 at least: `sample` says what is too
    long)."""
    if (prompt.form or params.form) is not AnswerForm.FREE:
        return params
    for max_images in range(params.max_images, 0, -1):
        lowered = params.model_copy(update={"max_images": max_images})
        if len(prompt) + context_needed(model, lowered, prompt) <= model.max_positions:
            return lowered
    return params.model_copy(update={"max_images": 0})


@torch.no_grad()
def sample(
    model: UnifiedModel, prompts: list[TokenRow], params: SamplingParams, *, num_generations: int = 1,
    generator: torch.Generator | Sequence[torch.Generator], graphs: bool | None = None,
) -> list[Rollout]:  # fmt: skip
    """Samples `num_generations` documents for each prompt; those of one prompt are adjacent.

    `generator`: on the CPU; one for all, or one for each prompt, so that its documents do not depend on what stands before it.
    `graphs`: steps of unchanging shape, replayed as CUDA graphs; None: on a GPU. On a CPU they are only of use to tests.

    A prompt brings the form of its answers (`UnifiedModel.encode_prompt`); different forms may stand together.

    Raises ValueError where a prompt and the longest possible answer do not fit the context, and where the settings ask for a form that
    the prompts were not encoded for, and FloatingPointError where a model's logits are NaN.
    """
    if not prompts:
        raise ValueError("no prompts to sample from")
    if not isinstance(generator, torch.Generator) and len(generator) != len(prompts):
        raise ValueError(f"{len(generator)} generators were given for {len(prompts)} prompts; give one, or one for each")
    params = resolve(params, model)
    if params.form is not AnswerForm.FREE and any(prompt.form is None for prompt in prompts):
        raise ValueError(f"the settings ask for form {params.form}, and a prompt was encoded for none: use encode_prompt(prompt, form)")
    if params.form.ends_with_image or any(prompt.form is not None and prompt.form.ends_with_image for prompt in prompts):
        model.check_can_draw()
    for prompt in prompts:
        check_room(model, prompt, params)
    was_training = model.training
    model.eval()
    try:
        with model.gathered(), prepared(model):
            return model.run(lambda _: _Lockstep(model, prompts, params, num_generations, generator, graphs).run())
    finally:
        model.train(was_training)


class _Lockstep:
    def __init__(
        self, model: UnifiedModel, prompts: list[TokenRow], params: SamplingParams, group: int,
        generator: torch.Generator | Sequence[torch.Generator], graphs: bool | None,
    ) -> None:  # fmt: skip
        self.model, self.params = model, params
        self.spec, self.device = model.image_spec, model.device
        self.grammar = Grammar.of(model, params)
        self.partials = [PartialRollout(prompt) for prompt in prompts for _ in range(group)]
        forms = [one.form for one in self.partials]
        self.forms = frozenset(forms)
        self.index = torch.arange(len(self.partials), device=self.device)  # (B,) which rollout a row writes
        self.num_images = torch.tensor([one.num_given for one in self.partials], device=self.device)  # (B,) images begun
        self.limit = torch.tensor([self.grammar.limit(form) for form in forms], device=self.device)  # of each rollout
        self.must_draw = torch.tensor([form is AnswerForm.TEXT_IMAGE for form in forms], device=self.device)
        self.draws_first = torch.tensor([form is AnswerForm.IMAGE for form in forms], device=self.device)  # its picture is begun
        self.ends_with_image = torch.tensor([form.ends_with_image for form in forms], device=self.device)
        generators = [generator] if isinstance(generator, torch.Generator) else generator
        self.uniforms = Uniforms(model, params, len(self.partials), generators)
        self.graphs = self.device.type == "cuda" if graphs is None else graphs
        self.room = params.max_text_tokens + len(self.spec.layout)  # positions of a text phase and an image phase
        self.stream = Stream(model, prompts, torch.arange(len(prompts)).repeat_interleave(group), self.room)

    def run(self) -> list[Rollout]:
        while len(self.index):
            self._keep(self._text_phase())
            if len(self.index):
                self._image_phase()
                if any(form.ends_with_image for form in self.forms):
                    self._end_with_image()
        if any(bool(piece.logprobs.isnan().any()) for one in self.partials for piece in one.pieces):
            raise FloatingPointError(
                "the model's logits are not finite, so nothing can be sampled from them; look at its weights (a training that diverged?) "
                "or use another dtype"
            )
        return finish(self.model, self.partials, self.params)

    def _keep(self, keep: Tensor) -> None:
        if not self.stream.cache.compact or not bool(keep.all()):
            rows = keep.nonzero().squeeze(1)
            self.index, self.num_images = self.index[rows], self.num_images[rows]
            self.stream.select(rows, self.room)

    def _text_phase(self) -> Tensor:
        """All rows write text until each has begun an image or ended. Returns (B,) bool, True where a row draws.

        Where steps are not recorded, rows that still write continue by themselves as soon as they are half of the rows or fewer, so that
        a long text does not keep the whole batch computing.
        """
        limit = self.params.max_text_tokens
        shape = (len(self.index), limit)
        tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
        values = torch.zeros(shape, device=self.device)
        wrote = torch.zeros(shape, dtype=torch.bool, device=self.device)
        draws, truncated = self.draws_first[self.index], torch.zeros_like(wrote[:, 0])
        uniforms = self.uniforms.of_text(self.index)  # (B, max_text_tokens)
        if self.forms == {AnswerForm.IMAGE}:
            return draws
        must_draw = self.must_draw[self.index] if AnswerForm.TEXT_IMAGE in self.forms else None
        limits = self.limit[self.index]
        stream, rows = self.stream, torch.arange(len(self.index), device=self.device)  # who is computed
        forks: list[tuple[Stream, Tensor, int]] = []  # (what was forked, which of its rows, tokens until then)
        step, writing = self._steps([stream], limit), ~draws
        num_fed = 0
        for count in range(limit):
            logits, may_draw = self.model.text_logits(stream.hidden), self.num_images[rows] < limits[rows]
            log_dist = self.grammar.log_distribution(logits, self.params.text, may_draw, None if must_draw is None else must_draw[rows])
            token = draw(log_dist, self.params.text, uniforms[rows, count])  # (B',)
            tokens[rows, count] = token
            values[rows, count] = log_dist.gather(-1, token[:, None]).squeeze(-1)
            wrote[rows, count] = writing
            begins = writing & (token == self.spec.begin_id)
            draws[rows] |= begins
            self.num_images[rows] += begins
            going_on = writing & ~begins & (token != self.model.eos_id)
            if count == limit - 1:
                truncated[rows], going_on = going_on, torch.zeros_like(going_on)
            fed = going_on | begins
            asks = (count + 1) % ASK_EVERY.get(self.device.type, 8) == 0 or count == limit - 1
            if asks and not bool(fed.any()):
                break
            all_fed = self.device.type == "cpu" and not self.graphs and bool(fed.all())  # then nobody waits, and no mask is needed
            step([self.model.embed_text(token)[:, None]], None if all_fed else fed)
            num_fed, writing = count + 1, going_on
            left = int(writing.sum()) if asks else len(rows)
            if not left:
                break
            if not self.graphs and 2 * left <= len(rows):
                picked = writing.nonzero().squeeze(1)
                forks.append((stream, picked, num_fed))
                stream, rows, writing = stream.fork(picked, limit - num_fed), rows[picked], writing[picked]
                step = self._steps([stream], limit - num_fed)
        for parent, picked, since in reversed(forks):
            parent.merge(stream, picked, num_fed - since)
            stream = parent
        self._record_text(tokens.cpu(), values.cpu(), wrote.cpu(), truncated)
        return draws if must_draw is None else draws | self._begin_images(truncated & must_draw, tokens[:, -1])

    def _record_text(self, tokens: Tensor, values: Tensor, wrote: Tensor, truncated: Tensor) -> None:
        for i, (partial_index, cut) in enumerate(zip(self.index.tolist(), truncated.tolist(), strict=True)):
            written, kept = self.partials[partial_index], wrote[i]
            if bool(kept.any()):
                written.pieces.append(Piece(Modality.TEXT, tokens[i][kept], values[i][kept], kept[kept]))
            written.truncated |= cut

    def _begin_images(self, rows: Tensor, last: Tensor) -> Tensor:
        """Begins a picture in the rows, (B,) bool, whose text was cut before one was begun; `last` (B,): the token not fed yet."""
        if bool(rows.any()):
            for token in (last, torch.full_like(last, self.spec.begin_id)):
                advance(self.model, [self.stream], [self.model.embed_text(token)[:, None]], rows)
            self.num_images += rows
            for partial_index in self.index[rows].tolist():
                self.partials[partial_index].pieces.append(Piece.forced([self.spec.begin_id]))
        return rows

    def _end_with_image(self) -> None:
        """Drops the rows whose form ends with their picture; the end stands behind it."""
        ends = self.ends_with_image[self.index]
        for partial_index in self.index[ends].tolist():
            self.partials[partial_index].pieces.append(Piece.forced(self.model.answer_end_ids))
        self._keep(~ends)

    def _image_phase(self) -> None:
        """Every remaining row draws one image: codes where the layout has them, forced tokens where it says so.

        Its other branches of guidance share every forward pass, until the last code is drawn. What is known is fed at once: a code and
        the forced tokens behind it make one pass.
        """
        branches = self._guidance_branches()
        step = self._steps([self.stream, *branches], self.spec.code_offsets[-1])
        uniforms = self.uniforms.of_image(self.index)  # (B, num_positions, D)
        all_codes: list[Tensor] = []
        all_values: list[Tensor] = []
        waiting: list[Tensor] = []  # (B, H) each: embeddings not fed yet
        for kind in self.spec.layout:
            if kind == CODE:
                if waiting:
                    step([torch.stack(waiting, 1)] * (1 + len(branches)))
                codes, values = self._draw_position(branches, uniforms[:, len(all_codes)])
                all_codes.append(codes)
                all_values.append(values)
                waiting = [self.model.embed_codes(codes)]
            else:
                waiting.append(self.model.embed_text(torch.full_like(self.index, kind)))
        advance(self.model, [self.stream], [torch.stack(waiting, 1)])
        images, numbers = torch.stack(all_codes, 1).cpu(), torch.stack(all_values, 1).cpu()  # (B, positions, D)
        for i, partial_index in enumerate(self.index.tolist()):
            chosen = torch.ones(len(images[i]), dtype=torch.bool)
            self.partials[partial_index].pieces.append(Piece(Modality.IMAGE, images[i], numbers[i], chosen))

    def _steps(self, streams: list[Stream], steps: int) -> Callable[..., None]:
        """What feeds these streams for up to so many positions."""
        return Steps(self.model, streams, steps) if self.graphs and steps else partial(advance, self.model, streams)

    def _draw_position(self, branches: list[Stream], uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """The D codes of one position, depth by depth: (B, D) codes and their log-probabilities."""
        hidden = torch.cat([self.stream.hidden, *(branch.hidden for branch in branches)])
        codes = torch.empty(len(self.index), 0, dtype=torch.long, device=self.device)
        values = []
        for depth in range(self.spec.depth):
            conditional, *others = self.model.image_step(hidden, codes.repeat(1 + len(branches), 1)).split(len(self.index))
            log_dist = log_distribution(mix(conditional, others, self.params.image), self.params.image)
            code = draw(log_dist, self.params.image, uniforms[:, depth])
            values.append(log_dist.gather(-1, code[:, None]).squeeze(-1))
            codes = torch.cat([codes, code[:, None]], dim=1)
        return codes, torch.stack(values, 1)

    def _guidance_branches(self) -> list[Stream]:
        """A stream for each other branch of guidance, at `begin_id`; rows with the same prefix share its prefill."""
        count = num_branches(self.params.image)
        prefixes = []
        for index in self.index.tolist() if count else []:
            written = self.partials[index]
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


def noise_of(
    model: UnifiedModel, params: SamplingParams, num_generations: int, generator: torch.Generator, places: Sequence[int]
) -> list[torch.Generator]:
    """For each prompt a generator that stands where its documents' numbers begin in a stream that all prompts of a step share, place by
    place: who samples only some of them draws what who samples all would have drawn."""
    count = num_generations * Uniforms.size(model, params)
    states = []
    for _ in range(max(places, default=-1) + 1):
        states.append(generator.get_state())
        torch.rand(count, dtype=torch.float64, generator=generator)
    found = []
    for place in places:
        found.append(torch.Generator())
        found[-1].set_state(states[place])
    return found


class Uniforms:
    """One uniform number for every choice that a document may make, drawn at the start.

    So a choice depends on its document and its place alone: not on who else is in the batch, on how long others write, or on the device.
    """

    @staticmethod
    def size(model: UnifiedModel, params: SamplingParams) -> int:
        """Numbers of one document."""
        return (params.max_images + 1) * (params.max_text_tokens + model.image_spec.num_positions * model.image_spec.depth)

    def __init__(self, model: UnifiedModel, params: SamplingParams, num_documents: int, generators: Sequence[torch.Generator]) -> None:
        spec = model.image_spec
        rounds, texts, codes = params.max_images + 1, params.max_text_tokens, spec.num_positions * spec.depth
        shape = (num_documents // len(generators), rounds, texts + codes)
        drawn = torch.cat([torch.rand(shape, dtype=torch.float64, generator=one) for one in generators]).to(model.device)
        self._text = drawn[..., :texts]
        self._image = drawn[..., texts:].unflatten(-1, (spec.num_positions, spec.depth))
        self._round = -1

    def of_text(self, index: Tensor) -> Tensor:
        """(B, max_text_tokens) float64 for the next text of these documents, (B,) int64."""
        self._round += 1
        return self._text[index, self._round]

    def of_image(self, index: Tensor) -> Tensor:
        """(B, num_positions, D) float64 for the image behind that text."""
        return self._image[index, self._round]
