"""The only scorer: log-probabilities of sequences that mix text and image codes, by teacher forcing.

With `params` it repeats the policy that sampled: same temperature, legal tokens, truncation, guidance and positions.
Without, it gives the plain model's likelihood (supervised training).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diptych.config import SamplingParams, TextSampling
from diptych.models.base import UnifiedModel
from diptych.sampling.distribution import Grammar, log_distribution, resolve
from diptych.sampling.guidance import branch_prefixes, mix, num_branches
from diptych.tokens import TokenBatch, TokenRow, collate

_PLAIN = TextSampling()
CHUNK_LOGITS = 2**24  # 64 MiB in float32, of which a few copies exist


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of every choice in a batch; 0 where `TokenBatch.choice_mask` is False.

    logprobs: (B, T, D) float32, with gradient; entry t belongs to the token AT t.
    entropy: (B, T, D) float32 in nats; without gradient unless it was asked for.
    """

    logprobs: Tensor
    entropy: Tensor


def score(
    model: UnifiedModel, batch: TokenBatch, params: SamplingParams | None = None, *, guided: bool = True, entropy_gradient: bool = False
) -> Scores:
    """Log-probability and entropy of every choice.

    Args:
        batch: (B, T) sequences; only positions in `completion_mask` are scored.
        params: the settings the batch was sampled with; None for the plain likelihood.
        guided: False ignores guidance (the field's habit, kept to measure its cost).
        entropy_gradient: keep the entropy differentiable (for an entropy bonus).
    Raises:
        ValueError: a chosen token stands at position 0, where nothing predicts it.
    """
    if bool(batch.completion_mask[:, 0].any()):
        raise ValueError("a chosen token stands at position 0; nothing predicts it, so put a prompt before it")
    params = None if params is None else resolve(params, model)
    hidden = model.backbone(model.embed(batch), batch.position_ids, batch.attention_mask)  # (B, T, H)
    # The state at t - 1 predicts the token at t.
    row, column = batch.completion_mask.nonzero(as_tuple=True)  # (N,), row-major
    is_text = batch.text_mask[row, column]
    text_at, image_at = (row[is_text], column[is_text]), (row[~is_text], column[~is_text])

    logprobs = torch.zeros(batch.codes.shape, device=batch.device)  # (B, T, D)
    entropy = torch.zeros_like(logprobs)
    if len(text_at[0]):
        values, bits = _score_text(model, batch, hidden, text_at, params, entropy_gradient)
        logprobs = logprobs.index_put((*text_at, torch.zeros_like(text_at[0])), values)
        entropy = entropy.index_put((*text_at, torch.zeros_like(text_at[0])), bits)
    if len(image_at[0]):
        values, bits = _score_images(model, batch, hidden, image_at, params, guided, entropy_gradient)
        logprobs = logprobs.index_put(image_at, values)
        entropy = entropy.index_put(image_at, bits)
    return Scores(logprobs, entropy)


def _score_text(
    model: UnifiedModel,
    batch: TokenBatch,
    hidden: Tensor,
    at: tuple[Tensor, Tensor],
    params: SamplingParams | None,
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor]:
    row, column = at
    grammar = None if params is None else Grammar.of(model, params)
    num_images = torch.zeros_like(batch.text_ids)  # (B, T)
    if grammar is not None:
        begins = (batch.text_ids == grammar.begin_id) & batch.text_mask & batch.completion_mask
        num_images = begins.long().cumsum(1) - begins.long()  # images begun before each position

    def score_some(states: Tensor, chosen: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        allowed = None if grammar is None else grammar.allowed(drawn)
        log_dist = log_distribution(model.text_logits(states), _PLAIN if params is None else params.text, allowed)  # (n, V)
        return _gather(log_dist, chosen, entropy_gradient)

    return in_chunks(score_some, model.vocab_size, hidden[row, column - 1], batch.text_ids[row, column], num_images[row, column])


def _score_images(
    model: UnifiedModel, batch: TokenBatch, hidden: Tensor, at: tuple[Tensor, Tensor],
    params: SamplingParams | None, guided: bool, entropy_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    row, column = at
    guides = guided and params is not None and num_branches(params.image) > 0
    others = other_image_states(model, batch, row, column, params) if guides and params is not None else []

    def score_some(codes: Tensor, states: Tensor, *other_states: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.image_logits(states, codes)  # (n, D, K)
        if params is None:
            return _gather(log_distribution(logits, _PLAIN), codes, entropy_gradient)
        logits = mix(logits, [model.image_logits(other, codes) for other in other_states], params.image)
        return _gather(log_distribution(logits, params.image), codes, entropy_gradient)

    spec = model.image_spec
    width = spec.depth * spec.codebook_size * (1 + len(others))
    return in_chunks(score_some, width, batch.codes[row, column], hidden[row, column - 1], *others)


def other_image_states(model: UnifiedModel, batch: TokenBatch, row: Tensor, column: Tensor, params: SamplingParams) -> list[Tensor]:
    """The states that predict the codes at (row, column), each (N,), in the other branches of guidance: a list of (N, H)."""
    spec = model.image_spec
    assert len(row) % spec.num_positions == 0, "images are sampled whole"
    codes = batch.codes[row, column].cpu()  # (N, D)
    prompt_lengths = batch.prompt_lengths.tolist()
    prefixes, spans = [], []
    for image in range(len(row) // spec.num_positions):
        first = image * spec.num_positions
        index, begin = int(row[first]), int(column[first]) - 1 - spec.code_offsets[0]
        drawn = codes[first : first + spec.num_positions]
        spans.append(spec.row(drawn, chosen=True, step=0, begin_step=0)[1:])
        context = partial(_context, batch, index, begin)
        prefixes.append(branch_prefixes(model, params.image, prompt_lengths[index], context))
    found = []
    for branch in zip(*prefixes, strict=True):
        other = collate([TokenRow.concat([prefix, span]) for prefix, span in zip(branch, spans, strict=True)]).to(batch.device)
        hidden = model.backbone(model.embed(other), other.position_ids, other.attention_mask)
        at, place = (other.image_mask & other.completion_mask).nonzero(as_tuple=True)
        found.append(hidden[at, place - 1])
    return found


def in_chunks(function: Callable[..., tuple[Tensor, Tensor]], width: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """`function` over the rows of tensors (N, ...), a few at a time, its two results (N, ...) put together again.

    `width`: logits of one row. At most CHUNK_LOGITS exist at once, also in the backward pass, where those of a chunk are computed
    again: memory does not grow with vocabulary times length.
    """
    rows = max(1, CHUNK_LOGITS // width)
    if len(tensors[0]) <= rows:
        return function(*tensors)
    pieces = zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    if torch.is_grad_enabled():
        found = [checkpoint(function, *piece, use_reentrant=False) for piece in pieces]
    else:
        found = [function(*piece) for piece in pieces]
    values, bits = zip(*found, strict=True)
    return torch.cat(values), torch.cat(bits)


def _context(batch: TokenBatch, index: int, begin: int) -> TokenRow:
    return batch.row(index).to("cpu")[:begin]


def _gather(log_dist: Tensor, chosen: Tensor, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
    values = log_dist.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(log_dist.exp() * log_dist.clamp(min=-1e4)).sum(-1)
    return values, entropy
