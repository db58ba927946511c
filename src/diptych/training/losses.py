"""Policy losses over text and image choices. Pure functions over tensors; nothing of ours is imported.

B rollouts, T positions, D codes per position. Every loss is a weighted sum over single choices (B, T, D); the weights
hold the denominator, which is counted over the global batch, so that micro-batching and processes cannot change a
gradient. To add a loss: one function here and one line in `LOSSES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class ModalityTerms:
    """Weight, clip range and KL weight of one modality."""

    weight: float = 1.0
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0
    entropy_coef: float = 0.0


@dataclasses.dataclass(frozen=True)
class Counts:
    """Denominators over the global batch of one optimizer step."""

    num_rollouts: int
    num_choices: int
    max_choices: int  # the longest rollout that sampling allows (dr_grpo)


@dataclasses.dataclass(frozen=True)
class PolicyBatch:
    """Log-probabilities (B, T, D) of the current policy (with gradient), before the update, and of the reference (or None);
    `advantages` (B, T); `choice_mask` (B, T, D) bool; `image_mask` (B, T) bool; `entropy` (B, T, D)."""

    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    choice_mask: Tensor
    image_mask: Tensor
    entropy: Tensor


Objective = Callable[[PolicyBatch, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(batch, lower (B,T,1), upper (B,T,1)) -> objective to maximise (B,T,D), clipped (B,T,D) bool"""


def clipped_surrogate(batch: PolicyBatch, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """min(ratio * A, clip(ratio) * A), ratio = exp(logprobs - old_logprobs). Source: arXiv:1707.06347, Eq. 7."""
    ratio = (batch.logprobs - batch.old_logprobs).exp()
    return _pessimistic(ratio, batch.advantages[..., None], lower, upper)


def sequence_surrogate(batch: PolicyBatch, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """GSPO: one ratio per rollout, the geometric mean over its choices of both modalities. Source: arXiv:2507.18071, Eq. 5-7.

    The value is the same at each choice and the gradient is spread over them (the paper's GSPO-token form).
    """
    mask = batch.choice_mask
    difference = torch.where(mask, batch.logprobs - batch.old_logprobs, 0.0)
    mean = difference.sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)  # (B,)
    ratio = mean.detach().exp()[:, None, None] * (batch.logprobs - batch.logprobs.detach()).exp()
    return _pessimistic(ratio, batch.advantages[..., None], lower, upper)


def clipped_weight(batch: PolicyBatch, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """CISPO: sg(min(ratio, upper)) * A * logprob; no choice loses its gradient. Source: arXiv:2506.13585, Eq. 4-5.

    Departs: `lower` is not used, as in the paper's experiments.
    """
    ratio = (batch.logprobs - batch.old_logprobs).exp().detach()
    weight = torch.minimum(ratio, upper.expand_as(ratio))
    return weight * batch.advantages[..., None] * batch.logprobs, ratio > upper


def _pessimistic(ratio: Tensor, advantages: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    clipped = torch.minimum(torch.maximum(ratio, lower), upper)
    bound = ((ratio < lower) & (advantages < 0)) | ((ratio > upper) & (advantages > 0))
    return torch.minimum(ratio * advantages, clipped * advantages), bound


def per_rollout(mask: Tensor, counts: Counts) -> Tensor:
    """1/G sum_i 1/|Y_i| sum_t: the paper's mean per sequence, then over sequences."""
    return mask / mask.sum((1, 2), keepdim=True).clamp(min=1) / counts.num_rollouts


def per_choice(mask: Tensor, counts: Counts) -> Tensor:
    """Mean over all choices of the batch. Source: DAPO, arXiv:2503.14476."""
    return mask / counts.num_choices


def per_constant(mask: Tensor, counts: Counts) -> Tensor:
    """Sum over choices divided by a constant length. Source: Dr. GRPO, arXiv:2503.20783."""
    return mask / (counts.num_rollouts * counts.max_choices)


LOSSES: dict[str, tuple[Objective, Callable[[Tensor, Counts], Tensor]]] = {
    "grpo": (clipped_surrogate, per_rollout),
    "dapo": (clipped_surrogate, per_choice),
    "dr_grpo": (clipped_surrogate, per_constant),
    "gspo": (sequence_surrogate, per_rollout),
    "cispo": (clipped_weight, per_choice),
}


def kl_to_reference(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The non-negative unbiased estimate exp(d) - d - 1 with d = ref - current (k3, joschu.net/blog/kl-approx)."""
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1


def policy_loss(
    batch: PolicyBatch, loss_type: str, text: ModalityTerms, image: ModalityTerms, counts: Counts
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a micro-batch and sums for logging.

    Returns:
        loss: scalar; the sum over all micro-batches (and processes) is the loss of the global batch.
        sums: `<modality>/{clipped,kl,entropy,ratio_gap,choices}`, sums over choices (ratio_gap: the maximum).
    Raises:
        ValueError: unknown loss_type, or a KL weight without reference log-probabilities.
    """
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type is {loss_type!r}; allowed are {', '.join(LOSSES)}")
    if batch.ref_logprobs is None and (text.beta > 0 or image.beta > 0):
        raise ValueError("a KL weight beta > 0 needs ref_logprobs")
    objective_of, weights_of = LOSSES[loss_type]
    is_image = batch.image_mask[..., None]  # (B, T, 1)

    def by_modality(name: str) -> Tensor:
        pair = batch.logprobs.new_tensor([getattr(text, name), getattr(image, name)])
        return pair[is_image.long()]  # (B, T, 1)

    objective, clipped = objective_of(batch, 1 - by_modality("epsilon"), 1 + by_modality("epsilon_high"))
    loss = -objective
    kl = torch.zeros_like(batch.logprobs)
    if batch.ref_logprobs is not None:
        kl = kl_to_reference(batch.logprobs, batch.ref_logprobs)
        loss = loss + by_modality("beta") * kl
    if text.entropy_coef or image.entropy_coef:
        loss = loss - by_modality("entropy_coef") * batch.entropy
    weights = weights_of(batch.choice_mask, counts) * by_modality("weight")
    total = torch.where(batch.choice_mask, loss * weights, 0.0).sum()

    sums: dict[str, float] = {}
    gap = ((batch.logprobs - batch.old_logprobs).exp() - 1).abs()
    for name, mask in (("text", batch.choice_mask & ~is_image), ("image", batch.choice_mask & is_image)):
        sums[f"{name}/choices"] = int(mask.sum())
        sums[f"{name}/clipped"] = int((clipped & mask).sum())
        sums[f"{name}/kl"] = float(kl.detach()[mask].sum())
        sums[f"{name}/entropy"] = float(batch.entropy.detach()[mask].sum())
        sums[f"{name}/ratio_gap"] = float(gap.detach()[mask].max()) if mask.any() else 0.0
    return total, sums
