"""The policy's distribution: one implementation, used by the sampler and by the scorer (design promise 2)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from diptych.config import SamplingParams, TextSampling
from diptych.models.base import UnifiedModel
from diptych.tokens import AnswerForm

FOREVER = 2**31


@dataclasses.dataclass(frozen=True)
class Grammar:
    """Which text tokens are legal. In an image only codes are, and forced tokens are never sampled.

    legal: (V,) bool, what the family allows in text. end_ids: (E,) int64, the tokens that would end an answer. `begin_id` is legal where a
    picture may be begun. Where one must be, under `text_image`, it stands for those that would end: their probabilities are added.
    """

    legal: Tensor
    begin_id: int
    end_ids: Tensor
    max_images: int

    @classmethod
    def of(cls, model: UnifiedModel, params: SamplingParams) -> Grammar:
        ends = torch.tensor(sorted({model.eos_id, model.answer_end_ids[0]}), device=model.device)
        return cls(model.legal_text(), model.image_spec.begin_id, ends, params.max_images)

    def limit(self, form: AnswerForm | None) -> int:
        """The most pictures of an answer of this form after which text may be chosen, and one more be begun."""
        return {AnswerForm.TEXT: 0, AnswerForm.TEXT_IMAGE: FOREVER}.get(form or AnswerForm.FREE, self.max_images)

    def log_distribution(self, logits: Tensor, params: TextSampling, may_draw: Tensor, must_draw: Tensor | None) -> Tensor:
        """Log-probabilities (N, V) float32 of the next text token. `may_draw`, `must_draw`: (N,) bool; None: nowhere."""
        allowed = self.legal.expand(len(may_draw), -1).clone()
        allowed[:, self.begin_id] = may_draw
        if must_draw is not None:
            plain, begin = logits.float(), logits[:, self.begin_id].float()
            joined = torch.logaddexp(begin, plain.index_select(1, self.end_ids).logsumexp(1))
            logits = plain.index_copy(1, self.end_ids.new_full((1,), self.begin_id), torch.where(must_draw, joined, begin)[:, None])
            allowed[:, self.end_ids] &= ~must_draw[:, None]
        return log_distribution(logits, params, allowed)


def resolve(params: SamplingParams, model: UnifiedModel) -> SamplingParams:
    """The same settings with the family's own guidance where none was set."""
    image = params.image
    if image.guidance_scale is None:
        image = image.model_copy(update={"guidance_scale": model.default_sampling.image.guidance_scale})
    return params.model_copy(update={"image": image})


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


def draw(log_probs: Tensor, params: TextSampling, uniforms: Tensor) -> Tensor:
    """One token per row: (N, V) log-probabilities and a uniform number in [0, 1) for each, (N,) float64 -> (N,).

    The token in whose share of the cumulative distribution the number falls. Temperature 0: the most likely token. Where
    log-probabilities are NaN, any token; the sampler refuses such documents.
    """
    if params.temperature == 0:
        return log_probs.argmax(-1)
    upto = log_probs.exp().cumsum(-1, dtype=torch.float64)  # (N, V)
    total = upto[:, -1:]
    mark = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
    first = torch.searchsorted(upto, mark, right=True).squeeze(-1)  # that exceeds the mark; never one of probability 0
    return first.clamp(max=log_probs.shape[-1] - 1)
