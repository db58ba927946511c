"""Optimizer, learning-rate schedule and the optimizer step that both trainings share."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from diptych.config import OptimConfig
from diptych.models import UnifiedModel
from diptych.training.eight_bit import EightBitAdamW


def make_optimizer(
    model: nn.Module, config: OptimConfig, max_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW over what is trainable (weight decay on matrices only), and linear warm-up, then the chosen decay to 0.

    Raises ValueError where the library for moments of 8 bits is not installed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    make = partial(torch.optim.AdamW, fused=True) if config.name == "adamw" else EightBitAdamW
    optimizer = make([g for g in groups if g["params"]], lr=config.lr, betas=config.betas)

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        share = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
        if config.schedule == "linear":
            return 1 - share
        if config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * share))
        return 1.0

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def move_state(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """The optimizer's moments to another device, e.g. out of a GPU's memory while documents are sampled."""
    for state in (optimizer.inner if isinstance(optimizer, EightBitAdamW) else optimizer).state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                state[name] = value.to(device)


def optimizer_step(
    model: UnifiedModel, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, config: OptimConfig
) -> dict[str, float]:
    """Clips the gradients, which all processes have added up, steps and clears them.

    Raises FloatingPointError before anything is changed where the gradient is not finite.
    """
    if model.sharding is not None:
        model.sharding.drop_unused()
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.max_grad_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if not torch.isfinite(norm):
        raise FloatingPointError(
            "the gradient is not finite; this optimizer step was not taken. Lower the learning rate, or look at the rewards and "
            "log-probabilities of the last step; earlier checkpoints are intact"
        )
    rate = float(schedule.get_last_lr()[0])
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)
    return {"grad_norm": float(norm), "learning_rate": rate}
