"""Supervised learning on records: warm-up's objective, and the term that keeps old skills alive during GRPO."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from diptych.data import Mixture, Record
from diptych.data.background import IN_TURN, Prepare, Reader
from diptych.models import UnifiedModel
from diptych.models.codes import in_two_parts
from diptych.runtime import generator, rank, sum_over_processes, world_size
from diptych.sampling.logprobs import score
from diptych.tokens import TokenBatch, TokenRow, collate


def encode(model: UnifiedModel, records: Sequence[Record], caption_dropout: float, seed: int, step: int) -> TokenBatch:
    """Records to tokens; a share of the bare pictures loses its prompt (caption dropout).

    Raises ValueError for a record without an answer, and one that the model cannot take, with its place.
    """
    draws = _draws(len(records), seed, step)
    return collate([_prepared(model, draws, caption_dropout, place, record)() for place, record in enumerate(records)])


def encode_batch(
    model: UnifiedModel, mixture: Mixture, size: int, caption_dropout: float, seed: int, step: int, reader: Reader = IN_TURN, last: int = 0
) -> TokenBatch:
    """`encode` of a batch of a mixture, which leaves out what cannot be encoded, as far as it may. `reader`: makes it, and those that
    follow before step `last`."""

    def prepare(of: int) -> Prepare:
        return functools.partial(_prepared, model, _draws(size, seed, of), caption_dropout)

    return collate(reader.made(mixture, step, size, prepare, last=last))


def _draws(size: int, seed: int, step: int) -> list[float]:
    return torch.rand(size, generator=generator(seed, 4, step)).tolist()


def _prepared(model: UnifiedModel, draws: Sequence[float], caption_dropout: float, place: int, record: Record) -> Callable[[], TokenRow]:
    unconditional = record.is_drawing and draws[place] < caption_dropout
    return prepared(model, record, functools.partial(example_row, model, record, unconditional=unconditional))


def prepared(model: UnifiedModel, record: Record, make: Callable[[], TokenRow]) -> Callable[[], TokenRow]:
    """A record's row in two parts (`in_two_parts`). A ValueError of either names the record."""
    with _named(record):
        finish = in_two_parts(model, record.prompt, make)

    def finished() -> TokenRow:
        with _named(record):
            return finish()

    return finished


@contextlib.contextmanager
def _named(record: Record) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{record.name}: {error}") from error


def example_row(model: UnifiedModel, record: Record, *, unconditional: bool = False) -> TokenRow:
    """Raises ValueError for a record without an answer, and one that the model cannot take."""
    if record.answer is None:
        raise ValueError("it has no assistant message; supervised learning needs answers")
    return model.encode_example(record.prompt, record.answer, form=record.form, given=record.given, unconditional=unconditional)


def usable_example(model: UnifiedModel, _: int, record: Record) -> Record:
    """The record itself, if it can be encoded with its pictures."""
    prepared(model, record, functools.partial(example_row, model, record))()
    return record


def example_length(model: UnifiedModel, record: Record) -> int:
    """Positions of `example_row`."""
    return len(example_row(model, record))


def supervised_gradient(
    model: UnifiedModel, batch: TokenBatch, *, text_weight: float, image_weight: float, micro_batch_size: int | None = None
) -> dict[str, float]:
    """Backward of text_weight * mean text loss + image_weight * mean image loss; means over the global batch.

    Every process is given the same batch and takes its share of it. It is the last that is computed before the optimizer's step.
    """
    choices = batch.choice_mask
    counts = torch.tensor([(choices & batch.text_mask[..., None]).sum(), (choices & batch.image_mask[..., None]).sum()])
    mine = torch.arange(len(batch))[rank() :: world_size()]  # none, where there are more processes than rows
    sums = torch.zeros(2)
    most = -(-len(batch) // world_size())  # rows of a process that has most
    parts = list(mine.split(micro_batch_size or most)) if len(mine) else []
    idle = -(-most // (micro_batch_size or most)) - len(parts) if model.sharding is not None else 0
    passes = [*parts, *[None] * idle]  # where gradients are added up layer by layer, all must compute as often
    for number, rows in enumerate(passes):
        micro = batch[[0] if rows is None else rows].to(model.device)
        text, image = (part if rows is not None else 0 * part for part in negative_log_likelihood(model, micro))
        loss = text_weight * text / max(1, int(counts[0])) + image_weight * image / max(1, int(counts[1]))
        model.backward(loss, more=number + 1 < len(passes))
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
