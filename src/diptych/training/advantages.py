"""Credit: rewards to advantages. Pure functions over tensors; nothing of ours is imported.

B rollouts, J steps, T positions, R rewards. Rewards that are missing (failed, timed out, not finite) are False in
`valid`: they enter no mean and give no credit.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-4  # TRL's constant in reward / (std + eps)


def normalize(values: Tensor, valid: Tensor, buckets: Tensor, *, scale: bool = True) -> Tensor:
    """Minus the mean, divided by the standard deviation, within each bucket.

    Args:
        values: any shape, float32. valid: same shape, bool. buckets: same shape, int64 labels >= 0.
        scale: divide by (unbiased std + 1e-4); False only subtracts the mean (Dr. GRPO).
    Returns:
        Same shape; 0 where not valid and in buckets with fewer than two valid values.
    """
    flat, ok, label = values.flatten(), valid.flatten(), buckets.flatten()
    size = int(label.max()) + 1
    used = torch.where(ok, flat, 0.0).double()
    count = torch.zeros(size, dtype=torch.double, device=flat.device).index_add(0, label, ok.double())
    mean = torch.zeros_like(count).index_add(0, label, used) / count.clamp(min=1)
    centred = torch.where(ok & (count[label] > 1), used - mean[label], 0.0)
    if scale:
        variance = torch.zeros_like(count).index_add(0, label, centred**2) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt()[label] + EPSILON)
    return centred.float().reshape(values.shape)


def group_advantages(rewards: Tensor, valid: Tensor, group_ids: Tensor, *, scale: bool = True) -> Tensor:
    """One advantage per rollout: (r_i - mean_group r) / std_group r.

    Args:
        rewards: (B,) float32. valid: (B,) bool. group_ids: (B,) int64.
    Returns:
        (B,) float32. Source: arXiv:2402.03300, outcome supervision; arXiv:2603.09538, outcome advantage.
    """
    return normalize(rewards, valid, group_ids, scale=scale)


def normalize_steps(rewards: Tensor, valid: Tensor, group_ids: Tensor, *, over: str = "group", scale: bool = True) -> Tensor:
    """Step rewards (B, J), normalised over the group.

    `over="group"`: one mean and std over all steps of the group (the papers). `over="step"`: one per step index, so that
    a step is compared with the same step of its siblings and not with steps of another kind.
    Source: arXiv:2402.03300, process supervision; arXiv:2603.09538.
    """
    buckets = group_ids[:, None].expand_as(rewards)
    if over == "step":
        num_steps = rewards.shape[1]
        buckets = buckets * num_steps + torch.arange(num_steps, device=rewards.device)
    elif over != "group":
        raise ValueError(f"normalize is {over!r}; allowed are 'group' and 'step'")
    return normalize(rewards, valid, buckets, scale=scale)


def collect_later_steps(step_advantages: Tensor, discount: float = 1.0) -> Tensor:
    """(B, J) -> (B, J): sum over j' >= j of discount ** (j' - j) * value[j'].

    With discount 1 this is A_{i,t} = sum over j with index(j) >= t (arXiv:2603.09538). Invalid steps must be 0.
    """
    collected = step_advantages.clone()
    for j in range(step_advantages.shape[1] - 2, -1, -1):
        collected[:, j] += discount * collected[:, j + 1]
    return collected


def spread_over_tokens(step_advantages: Tensor, step_ids: Tensor) -> Tensor:
    """(B, J) values and (B, T) step of each token (-1: prompt) -> (B, T); prompt tokens get 0."""
    values = step_advantages.gather(1, step_ids.clamp(min=0))
    return torch.where(step_ids >= 0, values, 0.0)


def combine_steps(rewards: Tensor, applies: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of R rewards per step.

    Args:
        rewards: (R, B, J) float32, NaN where missing. applies: (R, B, J) bool, whether a reward says something about a step.
        weights: (R,) float32.
    Returns:
        values (B, J) and valid (B, J): a step is valid where at least one reward applies and none that applies is missing.
    """
    missing = rewards.isnan()
    values = (torch.where(applies & ~missing, rewards, 0.0) * weights[:, None, None]).sum(0)
    return values, applies.any(0) & ~(applies & missing).any(0)
