"""What one GRPO step learns from: documents sampled from the policy, and what the rewards said of them.

Rewards may run in a thread of their own: those of one batch while the next is sampled, and the last while the scorer replays. Nothing
else changes: `Sampled.rewarded` waits for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from diptych.config import GRPOConfig, SamplingParams
from diptych.data import Mixture, Record
from diptych.data.background import IN_TURN, Reader
from diptych.models import UnifiedModel
from diptych.rewards import RewardBatch, RewardError, call_rewards
from diptych.rewards.base import merge
from diptych.rewards.protocol import Context, Progress
from diptych.runtime import gather, generator, rank, world_size
from diptych.sampling.engine import check_room, context_needed, noise_of, sample
from diptych.sampling.rollout import Rollout
from diptych.tokens import AnswerForm, Modality, TokenRow
from diptych.training.credit import document_rewards, of_choices
from diptych.training.supervised import prepared

logger = logging.getLogger(__name__)
_EVALUATION = 2**20  # in the place of an attempt: random numbers of its own
RewardFunctions = Sequence[tuple[Any, Callable[..., Any]]]


@dataclasses.dataclass(frozen=True)
class Experience:
    """B rollouts (P prompts, G each, groups adjacent) of this process with everything an update needs."""

    records: list[Record]  # (B,)
    rollouts: list[Rollout]  # (B,)
    rewards: RewardBatch
    group_ids: Tensor  # (B,)
    num_resampled: int = 0  # groups without spread whose place others took


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the metrics of a step are about: the documents of all processes, in the order that one process would have them."""

    rewards: RewardBatch
    lengths: list[int]  # (B,) positions of the answers
    num_images: list[int]  # (B,)
    truncated: list[bool]  # (B,)
    num_resampled: int


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Rollouts whose rewards may still be on their way: one call for each batch of whole groups."""

    records: list[Record]  # (B,)
    rollouts: list[Rollout]  # (B,)
    calls: list[Future[RewardBatch]]
    num_resampled: int = 0

    def experience(self, config: GRPOConfig) -> Experience:
        """Waits for the rewards. Raises RewardError where one broke its contract."""
        rewards = of_choices(merge([call.result() for call in self.calls]), self.rollouts)
        group_ids = torch.arange(len(self.rollouts) // config.num_generations).repeat_interleave(config.num_generations)
        return Experience(self.records, self.rollouts, rewards, group_ids, self.num_resampled)


def seen_by_all(experience: Experience, config: GRPOConfig) -> Seen:
    """Process r has the prompts r, r + W, ... of the step; here they stand in their order again."""
    rollouts = experience.rollouts
    mine = Seen(
        dataclasses.replace(experience.rewards, extras={}),  # values of any kind, which only saved samples need
        [len(r.row) - r.prompt_length for r in rollouts],
        [len(r.document.images) for r in rollouts],
        [r.truncated for r in rollouts],
        experience.num_resampled,
    )
    parts = gather(mine)
    if len(parts) == 1:
        return mine
    sizes = [len(part.lengths) for part in parts]
    begins = [sum(sizes[:r]) for r in range(len(parts))]
    group = config.num_generations
    order = [
        begins[r] + at * group + member
        for at in range(max(sizes) // group)
        for r in range(len(parts))
        for member in range(group)
        if at * group < sizes[r]
    ]

    def ordered(name: str) -> list[Any]:
        values = [value for part in parts for value in getattr(part, name)]
        return [values[place] for place in order]

    rewards = rearranged(merge([part.rewards for part in parts]), order)
    resampled = sum(part.num_resampled for part in parts)
    return Seen(rewards, ordered("lengths"), ordered("num_images"), ordered("truncated"), resampled)


def rearranged(rewards: RewardBatch, places: list[int]) -> RewardBatch:
    """The rewards of some of the documents, in the order of `places`."""
    return dataclasses.replace(
        rewards,
        extras={name: [values[i] for i in places] for name, values in rewards.extras.items()},
        **{name: getattr(rewards, name)[:, places] for name in ("steps", "applies", "documents", "documents_apply")},
    )


def collect(
    model: UnifiedModel, prompts: Mixture, reward_functions: RewardFunctions, config: GRPOConfig, step: int, reader: Reader = IN_TURN
) -> Sampled:
    """Samples this process's share of the step's prompts and has them rewarded; groups without spread are sampled again from
    other prompts, `resample_attempts` times at most. Which documents are sampled does not depend on the number of processes."""
    places = list(range(rank(), config.prompts_per_step, world_size()))
    prompt = functools.partial(_encoded, model, config)
    prepared_prompt = functools.partial(_prepared, model, config)
    columns = prompts.columns
    with model.gathered(), background(config, model.device) as submit:  # gathered once: processes may sample again more or less often
        asked = reader.made(prompts, step, config.prompts_per_step, lambda _: prepared_prompt, last=config.max_steps, places=places)
        sampled = _collect_once(model, asked, reward_functions, config, (step, 0), submit, places, columns)
        for attempt in range(1, config.resample_attempts + 1):
            experience = sampled.experience(config)
            flat = groups_without_spread(experience.rewards, config)
            everywhere = sorted(place for found in gather([places[g] for g in flat]) for place in found)
            if not everywhere:
                break
            fresh = [everywhere.index(places[g]) for g in flat]  # the k-th of all flat groups takes the k-th of the new prompts
            asked = prompts.made(step + attempt * 1_000_003, config.prompts_per_step, prompt, fresh)
            if asked:
                again = _collect_once(model, asked, reward_functions, config, (step, attempt), submit, fresh, columns)
                sampled = _replace_groups(experience, flat, again.experience(config), config.num_generations)
    return sampled


Asked = tuple[Record, TokenRow]  # a record, and its prompt in tokens


def _encoded(model: UnifiedModel, config: GRPOConfig, _: int, record: Record) -> Asked:
    """Raises ValueError naming the record where the model cannot take its prompt with the longest possible answer."""
    return _prepared(model, config, 0, record)()


def _prepared(model: UnifiedModel, config: GRPOConfig, _: int, record: Record) -> Callable[[], Asked]:
    finish = prepared(model, record, functools.partial(prompt_row, model, record, config.sampling))
    return lambda: (record, finish())


def usable_prompt(model: UnifiedModel, config: GRPOConfig, place: int, record: Record) -> Record:
    """The record itself, if the model can take its prompt with its pictures."""
    return _encoded(model, config, place, record)[0]


def prompt_row(model: UnifiedModel, record: Record, params: SamplingParams) -> TokenRow:
    """Raises ValueError where the prompt cannot be encoded, or the longest possible answer does not fit behind it."""
    row = model.encode_prompt(record.prompt, record.form or params.form, record.given)
    check_room(model, row, params)
    return row


def prompt_length(model: UnifiedModel, params: SamplingParams, record: Record) -> int:
    """Positions of `prompt_row` and the longest answer."""
    row = prompt_row(model, record, params)
    return len(row) + context_needed(model, params, row)


def _collect_once(
    model: UnifiedModel, asked: Sequence[Asked], reward_functions: RewardFunctions, config: GRPOConfig, stream: tuple[int, int],
    submit: Callable[..., Future[RewardBatch]], places: Sequence[int], columns: Sequence[str],
) -> Sampled:  # fmt: skip
    """`places`: of the prompts among those of the step, by which each has its random numbers."""
    noise = noise_of(model, config.sampling, config.num_generations, generator(config.seed, 10, *stream, 0), places)
    size = config.rollout_batch_size or len(asked)
    found = Sampled([], [], [])
    for begin in range(0, len(asked), size):
        some = slice(begin, begin + size)
        rows = [row for _, row in asked[some]]
        rollouts = sample(model, rows, config.sampling, num_generations=config.num_generations, generator=noise[some])
        repeated = [record for record, _ in asked[some] for _ in range(config.num_generations)]
        keys = sorted({*columns, *(key for record, _ in asked for key in record.columns)})
        values: dict[str, list[Any]] = {key: [record.columns.get(key) for record in repeated] for key in keys}
        values["truncated"] = [rollout.truncated for rollout in rollouts]
        values["answer_form"] = [(rollout.row.form or AnswerForm.FREE).value for rollout in rollouts]
        context = Context(Progress(stream[0], config.max_steps), [_chosen_ids(rollout) for rollout in rollouts])
        call = submit(call_rewards, reward_functions, [r.prompt for r in repeated], [r.document for r in rollouts], values, context)
        found = Sampled(found.records + repeated, found.rollouts + rollouts, [*found.calls, call])
    return found


@torch.no_grad()
def held_out_rewards(
    model: UnifiedModel, records: list[Record], columns: Sequence[str], reward_functions: RewardFunctions, config: GRPOConfig, step: int
) -> dict[str, float]:
    """Means of what the rewards say of greedy answers to prompts that are not trained on: `eval/rewards/KEY/mean`, `/missing`. Every
    process answers its share.

    Nothing is learned from them, and values that are missing stop no run. A reward that trains and one that watches part here where a
    hole is found.
    """
    rows = (config.rollout_batch_size or config.prompts_per_step) * config.num_generations
    greedy = config.model_copy(update={"sampling": config.sampling.greedy(), "num_generations": 1, "rollout_batch_size": rows})
    places = list(range(rank(), len(records), world_size()))
    mine = None
    with model.gathered():  # also in a process that has nothing to ask
        asked = [_encoded(model, greedy, place, records[place]) for place in places]
        if asked:
            sampled = _collect_once(model, asked, reward_functions, greedy, (step, _EVALUATION), _at_once, places, columns)
            mine = sampled.experience(greedy).rewards
    rewards = merge([part for part in gather(mine) if part is not None])
    values, speaks, missing = document_rewards(rewards.steps, rewards.applies, rewards.documents, rewards.documents_apply)  # (R, B)
    metrics = {f"eval/rewards/{key}/missing": share for key, share in rewards.missing.items()}
    for reward, value, known in zip(config.rewards, values, speaks & ~missing, strict=True):
        if known.any():
            metrics[f"eval/rewards/{reward.key}/mean"] = float(value[known].mean())
    return metrics


def _chosen_ids(rollout: Rollout) -> list[int]:
    """The answer for `completion_ids`: text tokens, and -1 for each position of a picture, without what was forced."""
    row = rollout.row
    return row.text_ids.masked_fill(row.modality == Modality.IMAGE, -1)[row.completion_mask].tolist()


@contextlib.contextmanager
def background(config: GRPOConfig, device: torch.device) -> Iterator[Callable[..., Future[RewardBatch]]]:
    """What calls a function and gives its result as a future: in one thread of its own, or at once. Leaving waits for nothing."""
    if device.type == "cpu" if config.background_rewards is None else not config.background_rewards:
        yield _at_once
        return
    waiting: queue.SimpleQueue[tuple[Future[RewardBatch], Callable[[], RewardBatch]] | None] = queue.SimpleQueue()

    def work() -> None:
        while (task := waiting.get()) is not None:
            future, call = task
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

    def submit(function: Callable[..., RewardBatch], *arguments: Any) -> Future[RewardBatch]:
        future: Future[RewardBatch] = Future()
        waiting.put((future, functools.partial(function, *arguments)))
        return future

    threading.Thread(target=work, name="rewards", daemon=True).start()  # no program waits at its end for a reward that hangs
    try:
        yield submit
    finally:
        waiting.put(None)


def _at_once(function: Callable[..., RewardBatch], *arguments: Any) -> Future[RewardBatch]:
    future: Future[RewardBatch] = Future()
    future.set_result(function(*arguments))
    return future


def refuse_missing(rewards: RewardBatch, config: GRPOConfig) -> None:
    """Raises RewardError where too much is missing of a reward that trains."""
    worst = max((reward.key for reward in config.rewards if reward.weight), key=rewards.missing.__getitem__)
    if rewards.missing[worst] > config.max_missing_rewards:
        raise RewardError(
            f"{rewards.missing[worst]:.0%} of the values of reward {worst!r} are missing (allowed: {config.max_missing_rewards:.0%}); "
            f"last error: {rewards.errors.get(worst, 'values that are not finite')}. Nothing was trained on "
            "them: mend the reward and run the same command again to resume"
        )


def groups_without_spread(rewards: RewardBatch, config: GRPOConfig) -> list[int]:
    """Groups in which every reward that trains gives all members the same: nothing can be learned from them."""
    parts = reward_parts(rewards, which_train(config))
    values, speaks, missing = document_rewards(*parts)  # (R, B)
    steps, applies = (part.permute(0, 2, 1).flatten(0, 1) for part in parts[:2])  # (R * J, B): each step is compared with the same step
    everything = torch.cat([values, steps.nan_to_num()])
    known = torch.cat([speaks & ~missing, applies & ~steps.isnan()])
    high = everything.masked_fill(~known, -torch.inf).unflatten(1, (-1, config.num_generations)).amax(-1)
    low = everything.masked_fill(~known, torch.inf).unflatten(1, (-1, config.num_generations)).amin(-1)
    return [g for g, spread in enumerate((high > low).any(0).tolist()) if not spread]


def which_train(config: GRPOConfig) -> Tensor:
    """(R,) bool: the rewards that do more than watch."""
    return torch.tensor([reward.weight != 0 for reward in config.rewards])


def reward_parts(rewards: RewardBatch, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return rewards.steps[chosen], rewards.applies[chosen], rewards.documents[chosen], rewards.documents_apply[chosen]


def _replace_groups(old: Experience, groups: list[int], new: Experience, group_size: int) -> Sampled:
    """The experience with some groups exchanged for new ones, in place of the old."""
    source = list(range(len(old.rollouts)))
    for position, group in enumerate(groups):
        for member in range(group_size):
            source[group * group_size + member] = len(old.rollouts) + position * group_size + member
    kept = rearranged(merge([old.rewards, new.rewards]), source)
    records, rollouts = old.records + new.records, old.rollouts + new.rollouts
    num_resampled = old.num_resampled + len(groups)
    return Sampled([records[i] for i in source], [rollouts[i] for i in source], [_at_once(lambda: kept)], num_resampled)
