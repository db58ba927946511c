"""The only scorer: log-probabilities of sequences that mix text and image codes, by teacher forcing.

With `params` it repeats the policy that sampled: same temperature, legal tokens, truncation, guidance and positions.
Without, it gives the plain model's likelihood (supervised training).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diptych.config import SamplingParams, TextSampling
from diptych.models.base import UnifiedModel
from diptych.models.packing import pack
from diptych.models.products import use
from diptych.models.steps import prepared
from diptych.sampling.distribution import Grammar, log_distribution, resolve
from diptych.sampling.guidance import branch_prefixes, mix, num_branches
from diptych.tokens import AnswerForm, Modality, TokenBatch, TokenRow

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
    if torch.is_grad_enabled():
        use(model)
    with prepared(model):
        return Scores(*model.run(_score, batch, params, guided, entropy_gradient))


def _score(
    model: UnifiedModel, batch: TokenBatch, params: SamplingParams | None, guided: bool, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    params = None if params is None else resolve(params, model)
    # The state at t - 1 predicts the token at t.
    row, column = batch.completion_mask.nonzero(as_tuple=True)  # (N,), row-major
    is_text = batch.text_mask[row, column]
    text_at, image_at = (row[is_text], column[is_text]), (row[~is_text], column[~is_text])
    guides = guided and params is not None and num_branches(params.image) > 0 and len(image_at[0]) > 0
    hidden, place, others = _states(model, batch, params if guides else None)

    logprobs = torch.zeros(batch.codes.shape, device=batch.device)  # (B, T, D)
    entropy = torch.zeros_like(logprobs)
    if len(text_at[0]):
        states = hidden[place[text_at[0], text_at[1] - 1]]
        values, bits = _score_text(model, batch, states, text_at, params, entropy_gradient)
        logprobs = logprobs.index_put((*text_at, torch.zeros_like(text_at[0])), values)
        entropy = entropy.index_put((*text_at, torch.zeros_like(text_at[0])), bits)
    if len(image_at[0]):
        states = hidden[place[image_at[0], image_at[1] - 1]]
        values, bits = _score_images(model, states, [hidden[at] for at in others], batch.codes[image_at], params, entropy_gradient)
        logprobs = logprobs.index_put(image_at, values)
        entropy = entropy.index_put(image_at, bits)
    if model.sharding is not None and torch.is_grad_enabled():
        logprobs, entropy = model.sharding.watched(logprobs, entropy)
    return logprobs, entropy


def _states(model: UnifiedModel, batch: TokenBatch, guidance: SamplingParams | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One forward pass over the batch's sequences and, with `guidance`, over the other branches of their images.

    Returns:
        hidden (N, H); place (B, T): where each position's state is in it; and for each other branch (M,) int64, where the states are
        that predict the codes of all images, in row-major order.
    """
    rows = batch.to("cpu").rows()
    sequences, beginnings = list(rows), [row.prompt_length for row in rows]
    branches = [branch for row in rows for branch in image_branches(model, row, guidance)] if guidance is not None else []
    sequences += [TokenRow.concat([prefix, drawn]) for branch in branches for prefix, drawn in branch]
    beginnings += [len(prefix) for branch in branches for prefix, _ in branch]
    packed = pack(sequences, beginnings, batch.device)
    hidden = model.backbone(model.embed(packed.batch), packed.batch.position_ids, packed.layout)[0]
    place = torch.nn.utils.rnn.pad_sequence(packed.place[: len(rows)], batch_first=True).to(batch.device)
    places = iter(packed.place[len(rows) :])
    before_codes = torch.tensor(model.image_spec.code_offsets) - 1
    found: list[list[Tensor]] = [[] for _ in (branches[0] if branches else ())]
    for branch in branches:
        for states, (prefix, _) in zip(found, branch, strict=True):
            states.append(next(places)[len(prefix) + before_codes])
    return hidden, place, [torch.cat(states).to(batch.device) for states in found]


def image_branches(model: UnifiedModel, row: TokenRow, params: SamplingParams) -> Iterator[list[tuple[TokenRow, TokenRow]]]:
    """For each image of an answer, and each other branch of its guidance: the sequence up to `begin_id`, and the positions behind it
    whose states predict codes."""
    spec = model.image_spec
    chosen = ((row.modality == Modality.IMAGE) & row.completion_mask).nonzero().squeeze(1)
    assert len(chosen) % spec.num_positions == 0, "images are sampled whole"
    for positions in chosen.view(-1, spec.num_positions):
        begin = int(positions[0]) - 1 - spec.code_offsets[0]
        drawn = spec.row(row.codes[positions], chosen=True, step=0, begin_step=0)[1 : 1 + spec.code_offsets[-1]]
        context = partial(row.__getitem__, slice(0, begin))
        yield [(prefix, drawn) for prefix in branch_prefixes(model, params.image, row.prompt_length, context)]


def _score_text(
    model: UnifiedModel, batch: TokenBatch, states: Tensor, at: tuple[Tensor, Tensor], params: SamplingParams | None, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    row, column = at
    grammar = None if params is None else Grammar.of(model, params)
    may_draw, must_draw = torch.ones_like(row, dtype=torch.bool), torch.zeros_like(row, dtype=torch.bool)  # (N,)
    if grammar is not None:
        forms = batch.forms or (None,) * len(batch)
        limits = torch.tensor([grammar.limit(form) for form in forms], device=batch.device)
        begins = (batch.text_ids == grammar.begin_id) & batch.text_mask & (batch.step_ids >= 0)
        num_images = begins.long().cumsum(1) - begins.long()  # (B, T) images begun before each position
        may_draw = num_images[at] < limits[row]
        must_draw = torch.tensor([form is AnswerForm.TEXT_IMAGE for form in forms], device=batch.device)[row]
    some_must = AnswerForm.TEXT_IMAGE in batch.forms

    def score_some(states: Tensor, chosen: Tensor, may: Tensor, must: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.text_logits(states)  # (n, V)
        if grammar is None or params is None:
            return _gather(log_distribution(logits, _PLAIN), chosen, entropy_gradient)
        return _gather(grammar.log_distribution(logits, params.text, may, must if some_must else None), chosen, entropy_gradient)

    return in_chunks(score_some, model.vocab_size, states, batch.text_ids[row, column], may_draw, must_draw)


def _score_images(
    model: UnifiedModel, states: Tensor, others: list[Tensor], codes: Tensor, params: SamplingParams | None, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    def score_some(codes: Tensor, states: Tensor, *other_states: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.image_logits(states, codes)  # (n, D, K)
        if params is None:
            return _gather(log_distribution(logits, _PLAIN), codes, entropy_gradient)
        logits = mix(logits, [model.image_logits(other, codes) for other in other_states], params.image)
        return _gather(log_distribution(logits, params.image), codes, entropy_gradient)

    spec = model.image_spec
    return in_chunks(score_some, spec.depth * spec.codebook_size * (1 + len(others)), codes, states, *others)


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


def _gather(log_dist: Tensor, chosen: Tensor, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
    values = log_dist.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(log_dist.exp() * log_dist.clamp(min=-1e4)).sum(-1)
    return values, entropy
