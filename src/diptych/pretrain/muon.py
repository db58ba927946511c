"""The optimizer of pretraining: Muon for the matrices of transformer layers, AdamW for everything else, and a cap on attention."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaModel


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` (Nesterov momentum 0.95, `match_rms_adamw`), in float32 and with matrices of one shape as a batch.

    torch's iterates in bfloat16, which a CPU without bfloat16 units emulates: 3.5 ms for a product of 160 x 432 matrices
    where float32 takes 0.3 ms, and a step of the base model has more than 600 products. Raises ValueError for a parameter that
    is no matrix.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration, five times

    def __init__(self, matrices: Sequence[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        for matrix in matrices:
            if matrix.ndim != 2:
                raise ValueError(f"Muon takes matrices; got a parameter of shape {tuple(matrix.shape)}")
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for shape, matrices in by_shape.items():
                updates = orthogonalise(torch.stack([self._momentum(matrix, group["momentum"]) for matrix in matrices]))
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _momentum(self, matrix: nn.Parameter, momentum: float) -> Tensor:
        assert matrix.grad is not None
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        buffer: Tensor = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(buffer, momentum)


def orthogonalise(matrices: Tensor) -> Tensor:
    """(N, A, B) -> (N, A, B): about U V^T of each U S V^T, with singular values between 0.7 and 1.2."""
    a, b, c = Muon.COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonAdamW:
    """Both optimizers with one schedule (linear warm-up, then a cosine to 1 %) and gradients clipped at norm 1.

    Muon orthogonalises the momentum of each matrix. On the base model it reached in 250 steps the held-out text loss for
    which AdamW alone took more than 300.
    """

    def __init__(self, model: nn.Module, lr: float, steps: int, muon_lr: float = 8e-3, decay: float = 0.01) -> None:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        names = {name for name, p in trained if ".layers." in name and p.ndim == 2}
        matrices = [p for name, p in trained if name in names]
        others = [p for name, p in trained if name not in names]
        self.parameters = [*matrices, *others]
        warm = max(1, min(100, steps // 10))

        def rate(step: int) -> float:
            return min((step + 1) / warm, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

        self.optimizers = [
            Muon(matrices, muon_lr, decay),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
        ]
        self.schedules = [LambdaLR(optimizer, rate) for optimizer in self.optimizers]

    def step(self, loss: Tensor) -> None:
        """Backward of `loss` and one update."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [o.state_dict() for o in self.optimizers], "schedules": [s.state_dict() for s in self.schedules]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        for schedule, kept in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(kept)


class AttentionCap:
    """Keeps attention logits small (QK-clip, arXiv:2507.20534, Sec. 2.1), so that their rounding stays small too.

    Per head, max |q| * max |k| / sqrt(head_dim) bounds every logit, rotary positions included. After an optimizer step a head above `cap`
    has its query and key rows scaled down to it. Muon grows them without limit: the second package reached 151, where one
    rounding of a logit in float32 is 1e-5, and sampling and scoring then differed by more than 1e-4 at rare choices.
    Departs: the bound instead of the largest logit seen, which is cheaper and never too small.
    """

    def __init__(self, model: LlamaModel) -> None:
        self.attentions: list[Any] = [layer.self_attn for layer in model.layers]
        self.largest: dict[nn.Module, Tensor] = {}
        for attention in self.attentions:
            for projection in (attention.q_proj, attention.k_proj):
                projection.register_forward_hook(self._remember)

    def _remember(self, projection: nn.Module, _: Any, output: Tensor) -> None:
        heads = output.detach().unflatten(-1, (-1, self.attentions[0].head_dim))  # (B, T, heads, head_dim)
        norms = heads.norm(dim=-1).flatten(0, -2).amax(0)  # (heads,)
        earlier = self.largest.get(projection)
        self.largest[projection] = norms if earlier is None else torch.maximum(norms, earlier)

    @torch.no_grad()
    def apply(self, cap: float) -> float:
        """Scales down what is above the cap; returns the largest bound since the last call, before scaling."""
        worst = 0.0
        for attention in self.attentions:
            query, key = attention.q_proj, attention.k_proj
            bound = self.largest[query] * self.largest[key] * attention.head_dim**-0.5  # (heads,)
            factor = (cap / bound).clamp(max=1).sqrt().repeat_interleave(attention.head_dim)
            query.weight.mul_(factor[:, None])
            key.weight.mul_(factor[:, None])
            worst = max(worst, float(bound.max()))
        self.largest.clear()
        return worst
