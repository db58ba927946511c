"""What a GRPO step tells of its documents: metrics of the rewards, rewards that say nothing, and documents as they are saved."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from diptych.config import GRPOConfig
from diptych.document import Text, to_json_blocks
from diptych.rewards import RewardBatch, RewardError
from diptych.sampling.rollout import Rollout
from diptych.tokens import Modality
from diptych.training.credit import document_rewards
from diptych.training.experience import Experience, Seen, groups_without_spread, reward_parts, which_train

logger = logging.getLogger(__name__)


def reward_metrics(seen: Seen, config: GRPOConfig) -> dict[str, float]:
    rewards, trains = seen.rewards, which_train(config)
    values, speaks, missing = document_rewards(*reward_parts(rewards, torch.ones_like(trains)))  # (R, B)
    valid = speaks & ~missing
    metrics: dict[str, float] = {}
    for r, reward in enumerate(config.rewards):
        used = values[r][valid[r]]
        if len(used):
            metrics[f"rewards/{reward.key}/mean"] = float(used.mean())
            metrics[f"rewards/{reward.key}/std"] = float(used.std()) if len(used) > 1 else 0.0
        metrics[f"rewards/{reward.key}/missing"] = rewards.missing[reward.key]
    metrics |= {f"rewards/{fault}": float(count) for fault, count in rewards.faults.items()}
    metrics |= {f"rewards/{name}": sum(found) / len(found) for name, found in rewards.metrics.items()}
    totals, complete = weighted_rewards(rewards, config)
    total = totals[complete]
    if len(total):
        metrics["reward"] = float(total.mean())
        metrics["reward_std"] = float(total.std()) if len(total) > 1 else 0.0
    count = len(seen.lengths)
    num_groups = count // config.num_generations
    metrics["frac_reward_zero_std"] = len(groups_without_spread(rewards, config)) / num_groups
    if config.resample_attempts:
        metrics["frac_groups_resampled"] = seen.num_resampled / num_groups
    metrics["completions/mean_length"] = sum(seen.lengths) / count
    metrics["completions/max_length"] = float(max(seen.lengths))
    metrics["completions/mean_images"] = sum(seen.num_images) / count
    metrics["completions/clipped_ratio"] = sum(seen.truncated) / count
    return metrics


def weighted_rewards(rewards: RewardBatch, config: GRPOConfig) -> tuple[Tensor, Tensor]:
    """(B,) the weighted sum of the rewards that train, and (B,) bool: nothing of it is missing."""
    weights = torch.tensor([reward.weight for reward in config.rewards])
    values, _, missing = document_rewards(*reward_parts(rewards, torch.ones_like(weights, dtype=torch.bool)))  # (R, B)
    return (values * weights[:, None]).sum(0), ~missing[which_train(config)].any(0)


class Silence:
    """Notices rewards that train and say nothing of any document, step after step: they teach nothing."""

    LONG = 10  # steps

    def __init__(self, config: GRPOConfig) -> None:
        self.config, self.silent = config, dict.fromkeys((reward.key for reward in config.rewards if reward.weight), 0)

    def heard(self, rewards: RewardBatch) -> None:
        """Warns at the first such step and after 10, 100, ...; raises RewardError where all of them have been silent for LONG steps."""
        speaks = rewards.applies.any(2).any(1) | rewards.documents_apply.any(1)  # (R,)
        for reward, says in zip(self.config.rewards, speaks.tolist(), strict=True):
            if reward.key in self.silent:
                self.silent[reward.key] = 0 if says else self.silent[reward.key] + 1
                if str(self.silent[reward.key]).strip("0") == "1":
                    logger.warning(
                        "reward %s says nothing (None) of any document for %d step(s): it trains nothing. Does it read a column that the "
                        "data set does not have, or judge pictures where the form of the answers has none?",
                        reward.key, self.silent[reward.key],
                    )  # fmt: skip
        if min(self.silent.values()) >= self.LONG:
            raise RewardError(
                f"no reward that trains ({', '.join(self.silent)}) has said anything of a document for {self.LONG} steps, so nothing is "
                "trained: look at what they return, and at the columns that they read"
            )


def sample_records(experience: Experience, advantages: Tensor, config: GRPOConfig) -> list[dict[str, Any]]:
    """The first `sample_groups` groups of a step as JSON: prompt and answer; for each step what every reward said (`steps`) and the
    advantage with which it was trained (`advantages`: of its text or picture; None where nothing of it was chosen); what was said of the
    whole document (`document`); and the weighted sum of the rewards that train (`reward`; None where one is missing).

    advantages: (B, T) float32, as `token_advantages` gives it.
    """
    names = list(experience.rewards.missing)
    totals, complete = weighted_rewards(experience.rewards, config)
    records = []
    for b in range(min(config.sample_groups * config.num_generations, len(experience.rollouts))):
        rollout, rewards = experience.rollouts[b], experience.rewards
        steps = [
            {n: round(float(rewards.steps[r, b, j]), 4) for r, n in enumerate(names) if rewards.applies[r, b, j]}
            for j in range(rollout.num_steps)
        ]
        whole = {n: round(float(rewards.documents[r, b]), 4) for r, n in enumerate(names) if rewards.documents_apply[r, b]}
        records.append(
            {"prompt": to_json_blocks(experience.records[b].prompt), "answer": to_json_blocks(rollout.document),
             "group": b // config.num_generations, "steps": steps, "document": whole,
             "reward": round(float(totals[b]), 4) if complete[b] else None,
             "advantages": _step_advantages(rollout, advantages[b].cpu())}
        )  # fmt: skip
        if rewards.extras:
            records[-1]["extra"] = {name: _plain(values[b]) for name, values in rewards.extras.items()}
    return records


def _step_advantages(rollout: Rollout, advantages: Tensor) -> list[float | None]:
    """The advantage of each step's own choices, which all have the same: a text's tokens, or a picture's codes. `advantages`: (T,)."""
    row, found = rollout.row, []
    for step, segment in enumerate(rollout.document):
        modality = Modality.TEXT if isinstance(segment, Text) else Modality.IMAGE
        chosen = advantages[: len(row)][(row.step_ids == step) & row.completion_mask & (row.modality == modality)]
        found.append(round(float(chosen[0]), 4) if len(chosen) else None)
    return found


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
