"""The rollout engine: whole documents as one decoding trajectory with one carried cache.

Phase-aligned lockstep. Rows share cache slots. In a text phase every row writes text until it begins an image or ends;
a row that waits writes a masked slot, so the attention mask has holes and positions count real tokens. In an image
phase the rows that draw walk through the family's layout, with an unconditional twin in a second short cache that
restarts at each image. Prompts are prefilled once per group; finished rows are dropped at the end of a phase.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from diptych.config import SamplingParams
from diptych.models.base import CODE, UnifiedModel
from diptych.sampling.distribution import Grammar, draw, log_distribution, resolve
from diptych.sampling.guidance import branch_prefixes, mix, num_branches
from diptych.sampling.rollout import Draft, Rollout, draft_row, finish
from diptych.sampling.stream import Stream
from diptych.tokens import Modality, TokenRow


def context_needed(model: UnifiedModel, params: SamplingParams) -> int:
    """The most positions that an answer can take."""
    spec = model.image_spec
    return (params.max_images + 1) * params.max_text_tokens + params.max_images * len(spec.layout)


def fit_to_context(model: UnifiedModel, prompt: TokenRow, params: SamplingParams) -> SamplingParams:
    """The same settings with `max_images` lowered to what fits behind the prompt (0 at least: `sample` says what is too long)."""
    for max_images in range(params.max_images, 0, -1):
        lowered = params.model_copy(update={"max_images": max_images})
        if len(prompt) + context_needed(model, lowered) <= model.max_positions:
            return lowered
    return params.model_copy(update={"max_images": 0})


@torch.no_grad()
def sample(
    model: UnifiedModel, prompts: list[TokenRow], params: SamplingParams, *, num_generations: int = 1, generator: torch.Generator
) -> list[Rollout]:
    """Samples `num_generations` documents for each prompt; those of one prompt are adjacent.

    Raises ValueError where a prompt and the longest possible answer do not fit the context.
    """
    if not prompts:
        raise ValueError("no prompts to sample from")
    params = resolve(params, model)
    longest = max(len(p) for p in prompts)
    if longest + context_needed(model, params) > model.max_positions:
        raise ValueError(
            f"a prompt of {longest} positions and an answer of up to {context_needed(model, params)} exceed the model's "
            f"context of {model.max_positions}; shorten the prompt or lower max_images or max_text_tokens"
        )
    was_training = model.training
    model.eval()
    try:
        return _Lockstep(model, prompts, params, num_generations, generator).run()
    finally:
        model.train(was_training)


class _Lockstep:
    def __init__(
        self, model: UnifiedModel, prompts: list[TokenRow], params: SamplingParams, group: int, generator: torch.Generator
    ) -> None:
        self.model, self.params, self.generator = model, params, generator
        self.spec, self.device = model.image_spec, model.device
        self.grammar = Grammar.of(model, params)
        self.drafts = [Draft(prompt) for prompt in prompts for _ in range(group)]
        self.index = torch.arange(len(self.drafts), device=self.device)  # (B,) which draft a row writes
        self.num_images = torch.zeros_like(self.index)  # (B,) images begun
        self.stream = Stream(model, prompts, torch.arange(len(prompts)).repeat_interleave(group))

    def run(self) -> list[Rollout]:
        while len(self.index):
            draws = self._text_phase()
            self._keep(draws)
            if len(self.index):
                self._image_phase()
        return finish(self.model, self.drafts, self.params)

    def _keep(self, keep: Tensor) -> None:
        if not bool(keep.all()):
            rows = keep.nonzero().squeeze(1)
            self.index, self.num_images = self.index[rows], self.num_images[rows]
            self.stream.keep(rows)

    def _noise(self, width: int) -> Tensor:
        """(B, width) uniform noise from the generator, which lives on the CPU."""
        return torch.rand(len(self.index), width, generator=self.generator).to(self.device)

    def _text_phase(self) -> Tensor:
        """All rows write text until each has begun an image or ended. Returns (B,) bool, True where a row draws."""
        writing = torch.ones(len(self.index), dtype=torch.bool, device=self.device)
        draws = torch.zeros_like(writing)
        truncated = torch.zeros_like(writing)
        tokens, values, wrote = [], [], []
        for count in range(1, self.params.max_text_tokens + 1):
            allowed = self.grammar.allowed(self.num_images)
            log_dist = log_distribution(self.model.text_logits(self.stream.hidden), self.params.text, allowed)
            token = draw(log_dist, self.params.text, self._noise(log_dist.shape[-1]))  # (B,)
            tokens.append(token)
            values.append(log_dist.gather(-1, token[:, None]).squeeze(-1))
            wrote.append(writing)
            begins = writing & (token == self.spec.begin_id)
            draws = draws | begins
            going_on = writing & ~begins & (token != self.model.eos_id)
            if count == self.params.max_text_tokens:
                truncated, going_on = going_on, torch.zeros_like(going_on)
            self.num_images = self.num_images + begins
            if not bool((going_on | begins).any()):
                break
            self.stream.feed_text(token, going_on | begins)
            writing = going_on
            if not bool(writing.any()):
                break
        self._record_text(torch.stack(tokens, 1).cpu(), torch.stack(values, 1).cpu(), torch.stack(wrote, 1).cpu(), truncated)
        return draws

    def _record_text(self, tokens: Tensor, values: Tensor, wrote: Tensor, truncated: Tensor) -> None:
        for i, draft_index in enumerate(self.index.tolist()):
            draft, kept = self.drafts[draft_index], wrote[i]
            draft.pieces.append((Modality.TEXT, tokens[i][kept], values[i][kept]))
            draft.truncated |= bool(truncated[i])

    def _image_phase(self) -> None:
        """Every remaining row draws one image: codes where the layout has them, forced tokens where it says so."""
        twins = self._twins()
        last_code = self.spec.code_offsets[-1]
        all_codes, all_values = [], []
        for offset, kind in enumerate(self.spec.layout):
            streams = [self.stream, *(twins if offset < last_code else [])]
            if kind == CODE:
                codes, values = self._draw_position([twin.hidden for twin in twins])
                all_codes.append(codes)
                all_values.append(values)
                for stream in streams:
                    stream.feed_codes(codes)
            else:
                for stream in streams:
                    stream.feed_text(torch.full_like(self.index, kind))
        images, numbers = torch.stack(all_codes, 1).cpu(), torch.stack(all_values, 1).cpu()  # (B, positions, D)
        for i, draft_index in enumerate(self.index.tolist()):
            self.drafts[draft_index].pieces.append((Modality.IMAGE, images[i], numbers[i]))

    def _draw_position(self, twin_hidden: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The D codes of one position, depth by depth: (B, D) codes and their log-probabilities."""
        codes = torch.empty(len(self.index), 0, dtype=torch.long, device=self.device)
        values = []
        for _ in range(self.spec.depth):
            others = [self.model.image_step(hidden, codes) for hidden in twin_hidden]
            logits = mix(self.model.image_step(self.stream.hidden, codes), others, self.params.image)
            log_dist = log_distribution(logits, self.params.image)
            code = draw(log_dist, self.params.image, self._noise(log_dist.shape[-1]))
            values.append(log_dist.gather(-1, code[:, None]).squeeze(-1))
            codes = torch.cat([codes, code[:, None]], dim=1)
        return codes, torch.stack(values, 1)

    def _twins(self) -> list[Stream]:
        """A stream for each other branch of guidance, at `begin_id`; rows with the same prefix share its prefill."""
        count = num_branches(self.params.image)
        prefixes = []
        for index in self.index.tolist() if count else []:
            draft = self.drafts[index]
            prefixes.append(branch_prefixes(self.model, self.params.image, len(draft.prompt), partial(draft_row, self.model, draft)))
        twins = []
        for branch in zip(*prefixes, strict=True):
            places: dict[tuple[Any, ...], int] = {}
            rows: list[TokenRow] = []
            which: list[int] = []
            for prefix in branch:
                key = (*prefix.text_ids.tolist(), *prefix.codes.flatten().tolist(), *map(id, prefix.pixels))
                if key not in places:
                    places[key] = len(rows)
                    rows.append(prefix)
                which.append(places[key])
            twins.append(Stream(self.model, rows, torch.tensor(which)))
        return twins
