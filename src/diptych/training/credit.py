"""From the rewards of a batch to the advantage of every token, by the configured rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from diptych.config import AdvantageConfig, RewardConfig
from diptych.document import Text
from diptych.rewards import RewardBatch
from diptych.sampling.rollout import Rollout
from diptych.tokens import TokenBatch
from diptych.training import advantages as adv


def of_choices(rewards: RewardBatch, rollouts: Sequence[Rollout]) -> RewardBatch:
    """The same rewards, which say nothing of the given beginnings of answers, but for a given text that went on. (To end behind a given
    picture is a choice of its step, but its value is not that of the picture.)"""
    if not any(rollout.row.given for rollout in rollouts):
        return rewards
    chosen = torch.ones(rewards.applies.shape[1:], dtype=torch.bool)  # (B, J)
    for b, rollout in enumerate(rollouts):
        for step, (given, segment) in enumerate(zip(rollout.row.given, rollout.document, strict=False)):
            chosen[b, step] = isinstance(given, Text) and given != segment
    applies = rewards.applies & chosen
    owed = applies.sum((1, 2)) + rewards.documents_apply.sum(1)  # (R,)
    lost = (applies & rewards.steps.isnan()).sum((1, 2)) + (rewards.documents_apply & rewards.documents.isnan()).sum(1)
    missing = {name: float(n) / max(1, int(of)) for name, n, of in zip(rewards.missing, lost, owed, strict=True)}
    asked = dict(zip(rewards.missing, owed.tolist(), strict=True))
    return dataclasses.replace(rewards, steps=rewards.steps.where(chosen, 0.0), applies=applies, missing=missing, asked=asked)


def token_advantages(
    rewards: RewardBatch, configs: tuple[RewardConfig, ...], group_ids: Tensor, batch: TokenBatch, config: AdvantageConfig
) -> Tensor:
    """(B, T) float32; 0 in the prompt.

    A reward with `modality="image"` trains image choices only, one with "text" text choices only, and one with weight 0 none. A
    reward that speaks of the whole document reaches every token: it is normalised over the group, as if it stood at the last
    step with discount 1.
    """
    trains = {r: reward.modality for r, reward in enumerate(configs) if reward.weight != 0}
    text, image = (
        _advantages([r for r, modality in trains.items() if modality in (kind, "both")], rewards, configs, group_ids, batch, config)
        for kind in ("text", "image")
    )
    return torch.where(batch.image_mask, image, text)


def _advantages(
    chosen: list[int], rewards: RewardBatch, configs: tuple[RewardConfig, ...], group_ids: Tensor, batch: TokenBatch,
    config: AdvantageConfig,
) -> Tensor:  # fmt: skip
    answer = batch.step_ids >= 0  # (B, T)
    if not chosen:
        return torch.zeros(answer.shape)
    weights = torch.tensor([configs[r].weight for r in chosen])
    steps, applies = rewards.steps[chosen], rewards.applies[chosen]  # (R, B, J)
    documents, documents_apply = rewards.documents[chosen], rewards.documents_apply[chosen]  # (R, B)
    result = torch.zeros(answer.shape)
    share = {"outcome": 1.0, "process": 0.0, "mixed": config.outcome_share}[config.credit]
    if share > 0:
        outcome = _outcome(steps, applies, documents, documents_apply, weights, group_ids, config)
        result = result + share * torch.where(answer, outcome[:, None], 0.0)
    if share < 1:
        step_advantages = _per_step(steps, applies, weights, group_ids, config)
        process = adv.spread_over_tokens(adv.collect_later_steps(step_advantages, config.discount), batch.step_ids)
        whole = _per_document(documents, documents_apply, weights, group_ids, config)
        result = result + (1 - share) * (process + torch.where(answer, whole[:, None], 0.0))
    return result


def _per_step(steps: Tensor, applies: Tensor, weights: Tensor, group_ids: Tensor, config: AdvantageConfig) -> Tensor:
    if config.aggregation == "sum_then_normalize":
        values, valid = adv.combine_steps(steps, applies, weights)
        return adv.normalize_steps(values, valid, group_ids, over=config.normalize, scale=config.scale_rewards)
    return sum(
        (
            weight * adv.normalize_steps(s.nan_to_num(), a & ~s.isnan(), group_ids, over=config.normalize, scale=config.scale_rewards)
            for weight, s, a in zip(weights, steps, applies, strict=True)
        ),
        torch.zeros(steps.shape[1:]),
    )


def _per_document(documents: Tensor, apply: Tensor, weights: Tensor, group_ids: Tensor, config: AdvantageConfig) -> Tensor:
    if not bool(apply.any()):
        return torch.zeros(documents.shape[1])
    if config.aggregation == "sum_then_normalize":
        values, valid = adv.combine_steps(documents[..., None], apply[..., None], weights)
        return adv.group_advantages(values[:, 0], valid[:, 0], group_ids, scale=config.scale_rewards)
    return sum(
        (
            weight * adv.group_advantages(d.nan_to_num(), a & ~d.isnan(), group_ids, scale=config.scale_rewards)
            for weight, d, a in zip(weights, documents, apply, strict=True)
        ),
        torch.zeros(documents.shape[1]),
    )


def _outcome(
    steps: Tensor, applies: Tensor, documents: Tensor, documents_apply: Tensor, weights: Tensor, group_ids: Tensor,
    config: AdvantageConfig,
) -> Tensor:  # fmt: skip
    values, speaks, missing = document_rewards(steps, applies, documents, documents_apply)  # (R, B)
    if config.aggregation == "sum_then_normalize":
        total = (values * weights[:, None]).sum(0)
        return adv.group_advantages(total, speaks.any(0) & ~missing.any(0), group_ids, scale=config.scale_rewards)
    return sum(
        (
            weight * adv.group_advantages(v, ok, group_ids, scale=config.scale_rewards)
            for weight, v, ok in zip(weights, values, speaks & ~missing, strict=True)
        ),
        torch.zeros(documents.shape[1]),
    )


def document_rewards(steps: Tensor, applies: Tensor, documents: Tensor, documents_apply: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One number per reward and document: its document value, or the mean over the steps it applies to.

    Returns, each (R, B): values (0 where there is none), speaks (the reward says something about the document), and
    missing (something that it owed is missing).
    """
    missing = (applies & steps.isnan()).any(-1) | (documents_apply & documents.isnan())
    speaks = applies.any(-1) | documents_apply
    mean = torch.where(applies, steps.nan_to_num(), 0.0).sum(-1) / applies.sum(-1).clamp(min=1)
    values = torch.where(documents_apply, documents.nan_to_num(), mean)
    return torch.where(speaks & ~missing, values, 0.0), speaks, missing
