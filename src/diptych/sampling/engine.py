"""The rollout engine: whole documents as one decoding trajectory with one carried cache.

Phase-aligned lockstep. Rows share cache slots. In a text phase every row writes text until it begins an image or ends;
a row that waits writes a masked slot, so the attention mask has holes and positions count real tokens. In an image
phase the rows that draw take exactly `num_positions` steps, with an unconditional twin in a second short cache that
restarts at each image. Prompts are prefilled once per group; finished rows are dropped at the end of a phase.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from diptych.config import SamplingParams
from diptych.models.base import UnifiedModel
from diptych.sampling.distribution import Grammar, draw, guide, log_distribution
from diptych.sampling.rollout import Draft, Rollout, finish
from diptych.tokens import Modality, TokenBatch, TokenRow, collate


def context_needed(model: UnifiedModel, params: SamplingParams) -> int:
    """The most positions that an answer can take."""
    spec = model.image_spec
    return (params.max_images + 1) * params.max_text_tokens + params.max_images * (spec.num_positions + 1)


@torch.no_grad()
def sample(
    model: UnifiedModel, prompts: list[TokenRow], params: SamplingParams, *, num_generations: int = 1, generator: torch.Generator
) -> list[Rollout]:
    """Samples `num_generations` documents for each prompt; those of one prompt are adjacent.

    Raises ValueError where a prompt and the longest possible answer do not fit the context.
    """
    if not prompts:
        raise ValueError("no prompts to sample from")
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


@dataclasses.dataclass
class _Rows:
    """The rows still being written. B rows, S cache slots."""

    index: Tensor  # (B,) which draft
    hidden: Tensor  # (B, H) state that predicts the next token
    position: Tensor  # (B,) real tokens so far
    attention: Tensor  # (B, S) bool, False where a slot is empty
    num_images: Tensor  # (B,) images begun

    def select(self, keep: Tensor) -> _Rows:
        return _Rows(*(getattr(self, f.name)[keep] for f in dataclasses.fields(self)))


class _Lockstep:
    def __init__(
        self, model: UnifiedModel, prompts: list[TokenRow], params: SamplingParams, group: int, generator: torch.Generator
    ) -> None:
        self.model, self.params, self.generator = model, params, generator
        self.spec, self.device = model.image_spec, model.device
        self.grammar = Grammar.of(model, params)
        self.drafts = [Draft(prompt) for prompt in prompts for _ in range(group)]
        self.cache: Any = model.new_cache()
        self.rows = self._prefill(prompts, group)

    def run(self) -> list[Rollout]:
        while len(self.rows.index):
            draws = self._text_phase()
            self._keep(draws)
            if len(self.rows.index):
                self._image_phase()
        return finish(self.model, self.drafts, self.params)

    def _prefill(self, prompts: list[TokenRow], group: int) -> _Rows:
        batch = collate(prompts).to(self.device)
        lengths = batch.attention_mask.sum(1)  # (P,)
        hidden = self.model.backbone(self.model.embed(batch), batch.position_ids, batch.attention_mask, self.cache)
        last = hidden[torch.arange(len(prompts), device=self.device), lengths - 1]  # (P, H)
        expand = torch.arange(len(prompts), device=self.device).repeat_interleave(group)
        self.cache.batch_select_indices(expand)
        return _Rows(
            torch.arange(len(expand), device=self.device), last[expand], lengths[expand],
            batch.attention_mask[expand], torch.zeros_like(expand),
        )  # fmt: skip

    def _keep(self, keep: Tensor) -> None:
        if not bool(keep.all()):
            self.rows = self.rows.select(keep)
            self.cache.batch_select_indices(keep.nonzero().squeeze(1))

    def _noise(self, width: int) -> Tensor:
        return torch.rand(len(self.rows.index), width, generator=self.generator).to(self.device)

    def _forward(self, text_ids: Tensor, codes: Tensor | None, active: Tensor) -> None:
        """Feeds one token per row; rows that are not active write a masked slot and keep their state."""
        rows, n = self.rows, len(text_ids)
        batch = TokenBatch(
            text_ids=text_ids[:, None],
            codes=torch.zeros(n, 1, self.spec.depth, dtype=torch.long, device=self.device) if codes is None else codes[:, None],
            modality=torch.full((n, 1), Modality.TEXT if codes is None else Modality.IMAGE, device=self.device),
            position_ids=rows.position[:, None],
            step_ids=torch.zeros_like(text_ids)[:, None],
            completion_mask=torch.ones(n, 1, dtype=torch.bool, device=self.device),
        )
        attention = torch.cat([rows.attention, torch.ones_like(active)[:, None]], dim=1)  # a slot sees at least itself
        hidden = self.model.backbone(self.model.embed(batch), batch.position_ids, attention, self.cache)[:, -1]
        rows.hidden = torch.where(active[:, None], hidden, rows.hidden)
        rows.position = rows.position + active
        attention[:, -1] = active
        rows.attention = attention

    def _text_phase(self) -> Tensor:
        """All rows write text until each has begun an image or ended. Returns (B,) bool, True where a row draws."""
        n = len(self.rows.index)
        writing = torch.ones(n, dtype=torch.bool, device=self.device)
        draws = torch.zeros_like(writing)
        truncated = torch.zeros_like(writing)
        tokens, values, wrote = [], [], []
        for count in range(1, self.params.max_text_tokens + 1):
            allowed = self.grammar.allowed(self.rows.num_images)
            log_dist = log_distribution(self.model.text_logits(self.rows.hidden), self.params.text, allowed)
            token = draw(log_dist, self.params.text, self._noise(log_dist.shape[-1]))  # (B,)
            tokens.append(token)
            values.append(log_dist.gather(-1, token[:, None]).squeeze(-1))
            wrote.append(writing)
            begins = writing & (token == self.spec.begin_id)
            draws = draws | begins
            going_on = writing & ~begins & (token != self.model.eos_id)
            if count == self.params.max_text_tokens:
                truncated, going_on = going_on, torch.zeros_like(going_on)
            self.rows.num_images = self.rows.num_images + begins
            if not bool((going_on | begins).any()):
                break
            self._forward(token, None, going_on | begins)
            writing = going_on
            if not bool(writing.any()):
                break
        self._record_text(torch.stack(tokens, 1).cpu(), torch.stack(values, 1).cpu(), torch.stack(wrote, 1).cpu(), truncated)
        return draws

    def _record_text(self, tokens: Tensor, values: Tensor, wrote: Tensor, truncated: Tensor) -> None:
        for i, draft_index in enumerate(self.rows.index.tolist()):
            draft, kept = self.drafts[draft_index], wrote[i]
            draft.pieces.append((Modality.TEXT, tokens[i][kept], values[i][kept]))
            draft.truncated |= bool(truncated[i])

    def _image_phase(self) -> None:
        """Every remaining row draws one image, then its end token is forced."""
        n, scale = len(self.rows.index), self.params.image.guidance_scale
        everyone = torch.ones(n, dtype=torch.bool, device=self.device)
        nothing = torch.zeros(n, dtype=torch.long, device=self.device)
        twin = self._unconditional_twin(n) if scale != 1 else None
        all_codes, all_values = [], []
        for position in range(self.spec.num_positions):
            codes, values = self._draw_position(twin[0] if twin else None)
            all_codes.append(codes)
            all_values.append(values)
            self._forward(nothing, codes, everyone)
            if twin and position + 1 < self.spec.num_positions:
                twin = self._advance_twin(twin, codes)
        self._forward(nothing + self.spec.end_id, None, everyone)
        images, numbers = torch.stack(all_codes, 1).cpu(), torch.stack(all_values, 1).cpu()  # (B, positions, D)
        for i, draft_index in enumerate(self.rows.index.tolist()):
            self.drafts[draft_index].pieces.append((Modality.IMAGE, images[i], numbers[i]))

    def _draw_position(self, twin_hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """The D codes of one position, depth by depth: (B, D) codes and their log-probabilities."""
        codes = torch.empty(len(self.rows.index), 0, dtype=torch.long, device=self.device)
        values = []
        for _ in range(self.spec.depth):
            logits = self.model.image_step(self.rows.hidden, codes)
            if twin_hidden is not None:
                logits = guide(logits, self.model.image_step(twin_hidden, codes), self.params.image.guidance_scale)
            log_dist = log_distribution(logits, self.params.image)
            code = draw(log_dist, self.params.image, self._noise(log_dist.shape[-1]))
            values.append(log_dist.gather(-1, code[:, None]).squeeze(-1))
            codes = torch.cat([codes, code[:, None]], dim=1)
        return codes, torch.stack(values, 1)

    def _unconditional_twin(self, n: int) -> tuple[Tensor, Any, int]:
        """State after `unconditional prompt, <begin>` for n rows: (hidden (B, H), cache, length)."""
        head = TokenRow.text([*self.model.unconditional_prompt(), self.spec.begin_id], self.spec.depth)
        batch, cache = collate([head]).to(self.device), self.model.new_cache()
        hidden = self.model.backbone(self.model.embed(batch), batch.position_ids, batch.attention_mask, cache)
        cache.batch_select_indices(torch.zeros(n, dtype=torch.long, device=self.device))
        return hidden[:, -1].expand(n, -1), cache, len(head)

    def _advance_twin(self, twin: tuple[Tensor, Any, int], codes: Tensor) -> tuple[Tensor, Any, int]:
        _, cache, length = twin
        batch = collate([TokenRow.image(row[None]) for row in codes.cpu()]).to(self.device)
        mask = torch.ones(len(codes), length + 1, dtype=torch.bool, device=self.device)
        hidden = self.model.backbone(self.model.embed(batch), batch.position_ids + length, mask, cache)
        return hidden[:, -1], cache, length + 1
