"""Supervised learning on records: warm-up's objective, and the term that retains existing skills during GRPO."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from diptych.data import Mixture, Record
from diptych.data.background import IN_TURN, Prepare, Reader
from diptych.models import UnifiedModel
from diptych.models.codes import in_two_parts
from diptych.runtime import gather, generator, rank, sum_over_processes, world_size
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
) -> TokenBatch | None:
    """This process's share of `encode` of a batch of a mixture, which leaves out what cannot be encoded, as far as it may; None where there
    are more processes than rows. `reader`: makes it, and those that follow before step `last`."""

    def prepare(of: int) -> Prepare:
        return functools.partial(_prepared, model, _draws(size, seed, of), caption_dropout)

    places = range(rank(), size, world_size())
    return collate(reader.made(mixture, step, size, prepare, last=last, places=places)) if places else None


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
    model: UnifiedModel, batch: TokenBatch | None, *, text_weight: float, image_weight: float, micro_batch_size: int | None = None
) -> dict[str, float]:
    """Backward of text_weight * mean text loss + image_weight * mean image loss; means over the batches of all processes.

    `batch`: this process's share (`encode_batch`). It is the last that is computed before the optimizer's step.
    """
    counts = sum_over_processes(choices_of(batch))
    sums = torch.zeros(2)
    passes = equal_passes(model, batch, micro_batch_size)
    for number, (micro, counted) in enumerate(passes):
        text, image = (part if counted else 0 * part for part in negative_log_likelihood(model, micro.to(model.device)))
        loss = text_weight * text / max(1, int(counts[0])) + image_weight * image / max(1, int(counts[1]))
        model.backward(loss, more=number + 1 < len(passes))
        sums += torch.stack([text, image]).detach().cpu()
    text_loss, image_loss = (sum_over_processes(sums) / counts.clamp(min=1)).tolist()
    num_tokens = 0 if batch is None else int(batch.attention_mask.sum())
    return {"loss/text": text_loss, "loss/image": image_loss, "num_tokens": float(sum(gather(num_tokens)))}


@torch.no_grad()
def supervised_loss(model: UnifiedModel, batch: TokenBatch, micro_batch_size: int | None = None) -> tuple[float, float]:
    """Mean text loss and mean image loss of a batch that all processes have: each computes its share."""
    mine = torch.arange(len(batch))[rank() :: world_size()]
    sums = torch.zeros(2)
    for micro, counted in equal_passes(model, batch[mine] if len(mine) else None, micro_batch_size):
        sums += counted * torch.stack(negative_log_likelihood(model, micro.to(model.device))).cpu()
    text, image = (sum_over_processes(sums) / choices_of(batch).clamp(min=1)).tolist()
    return text, image


def choices_of(batch: TokenBatch | None) -> torch.Tensor:
    """(2,) int64: choices of text tokens and of image codes."""
    if batch is None:
        return torch.zeros(2, dtype=torch.long)
    return torch.stack([(batch.choice_mask & mask[..., None]).sum() for mask in (batch.text_mask, batch.image_mask)])


def equal_passes(model: UnifiedModel, batch: TokenBatch | None, size: int | None) -> list[tuple[TokenBatch, bool]]:
    """Parts of `size` rows (None: as many as a process has at most), and whether they count. Where gradients are added up layer by layer
    all processes must compute as often: those with fewer parts compute a row that does not count."""
    number = 0 if batch is None else len(batch)
    most = max(gather(number))
    parts = [] if batch is None else [(batch[rows], True) for rows in torch.arange(number).split(size or most)]
    if model.sharding is None or not most:
        return parts
    idle = _shortest_row(model) if batch is None else batch[[0]]
    return parts + [(idle, False)] * (-(-most // (size or most)) - len(parts))


def _shortest_row(model: UnifiedModel) -> TokenBatch:
    depth, ends = model.image_spec.depth, [model.eos_id]
    return collate([TokenRow.concat([TokenRow.text(ends, depth, chosen=False, step=-1), TokenRow.text(ends, depth, chosen=True, step=0)])])


def negative_log_likelihood(model: UnifiedModel, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the text choices and over the image choices, in nats, with gradient."""
    logprobs, choices = score(model, batch).logprobs, batch.choice_mask
    text = -(logprobs * (choices & batch.text_mask[..., None])).sum()
    image = -(logprobs * (choices & batch.image_mask[..., None])).sum()
    return text, image
