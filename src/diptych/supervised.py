"""Supervised learning on records: warm-up's objective, and the term that keeps old skills alive during GRPO."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diptych.data import Record
from diptych.logprobs import score
from diptych.models import UnifiedModel
from diptych.runtime import generator, rank, sum_over_processes, world_size
from diptych.tokens import TokenBatch, collate


def encode(model: UnifiedModel, records: Sequence[Record], caption_dropout: float, seed: int, step: int) -> TokenBatch:
    """Records to tokens; a share of the bare pictures loses its prompt (caption dropout).

    Raises ValueError for a record without an answer.
    """
    draws = torch.rand(len(records), generator=generator(seed, 4, step)).tolist()
    rows = []
    for record, value in zip(records, draws, strict=True):
        if record.answer is None:
            raise ValueError(f"a record of {record.source} has no assistant message; supervised learning needs answers")
        dropped = record.is_drawing and value < caption_dropout
        try:
            rows.append(model.encode_example(record.prompt, record.answer, unconditional=dropped))
        except ValueError as error:
            raise ValueError(f"a record of {record.source} ({record.prompt.text[:60]!r}): {error}") from error
    return collate(rows)


def supervised_gradient(
    model: UnifiedModel, batch: TokenBatch, *, text_weight: float, image_weight: float, micro_batch_size: int | None = None
) -> dict[str, float]:
    """Backward of text_weight * mean text loss + image_weight * mean image loss; means over the global batch.

    Every process is given the same batch and takes its share of it.
    """
    choices = batch.choice_mask
    counts = torch.tensor([(choices & batch.text_mask[..., None]).sum(), (choices & batch.image_mask[..., None]).sum()])
    mine = torch.arange(rank(), len(batch), world_size())  # none, where there are more processes than rows
    sums = torch.zeros(2)
    for rows in mine.split(micro_batch_size or max(1, len(mine))) if len(mine) else ():
        micro = batch[rows].to(model.device)
        text, image = negative_log_likelihood(model, micro)
        loss = text_weight * text / max(1, int(counts[0])) + image_weight * image / max(1, int(counts[1]))
        loss.backward()
        sums += torch.stack([text, image]).detach().cpu()
    sums = sum_over_processes(sums)
    text_loss, image_loss = (sums / counts.clamp(min=1)).tolist()
    return {"loss/text": text_loss, "loss/image": image_loss, "num_tokens": float(batch.attention_mask.sum())}


def negative_log_likelihood(model: UnifiedModel, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the text choices and over the image choices, in nats, with gradient."""
    logprobs, choices = score(model, batch).logprobs, batch.choice_mask
    text = -(logprobs * (choices & batch.text_mask[..., None])).sum()
    image = -(logprobs * (choices & batch.image_mask[..., None])).sum()
    return text, image
