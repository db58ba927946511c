"""The policy's distribution: one implementation, used by the sampler and by the scorer (design promise 2)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from diptych.config import SamplingParams, TextSampling
from diptych.models.base import UnifiedModel


@dataclasses.dataclass(frozen=True)
class Grammar:
    """Which text tokens are legal. In an image only codes are, which the two heads already ensure."""

    vocab_size: int
    forbidden_ids: tuple[int, ...]
    begin_id: int
    max_images: int

    @classmethod
    def of(cls, model: UnifiedModel, params: SamplingParams) -> Grammar:
        return cls(model.vocab_size, tuple(model.forbidden_text_ids()), model.image_spec.begin_id, params.max_images)

    def allowed(self, num_images: Tensor) -> Tensor:
        """(N,) images begun so far in each answer -> (N, V) bool."""
        allowed = torch.ones(len(num_images), self.vocab_size, dtype=torch.bool, device=num_images.device)
        allowed[:, list(self.forbidden_ids)] = False
        allowed[:, self.begin_id] = num_images < self.max_images
        return allowed


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on logits: u + scale * (c - u). Source: arXiv:2207.12598; scale 1 is no guidance."""
    return unconditional + scale * (conditional - unconditional)


def log_distribution(logits: Tensor, params: TextSampling, allowed: Tensor | None = None) -> Tensor:
    """Log-probabilities (N, V) float32 of the policy that samples with these parameters.

    Temperature first, then the legal tokens, then top-k, then top-p; excluded tokens get -inf. At temperature 0 the
    policy is greedy and the values are those of temperature 1.
    """
    logits = logits.float()
    if params.temperature > 0 and params.temperature != 1:
        logits = logits / params.temperature
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    if 0 < params.top_k < logits.shape[-1]:
        kth = logits.topk(params.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if params.top_p < 1:
        ordered, indices = logits.softmax(-1).sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # probability mass before each token
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, indices, before >= params.top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits.log_softmax(-1)


def draw(log_probs: Tensor, params: TextSampling, noise: Tensor) -> Tensor:
    """One token per row: (N, V) log-probabilities and (N, V) uniform noise -> (N,).

    The Gumbel-max trick, so that the draw of a row depends only on its own noise. Temperature 0: the most likely token.
    """
    if params.temperature == 0:
        return log_probs.argmax(-1)
    gumbel = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))
    return (log_probs + gumbel).argmax(-1)
