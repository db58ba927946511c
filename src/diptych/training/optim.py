"""Optimizer, learning-rate schedule and the optimizer step that both trainings share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from diptych.config import OptimConfig
from diptych.models import UnifiedModel
from diptych.runs import RunFolder
from diptych.runtime import sum_gradients
from diptych.training.parallel import load_shards, save_shards, spread_state


def make_optimizer(model: nn.Module, config: OptimConfig, max_steps: int) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW, fused, over what is trainable (weight decay on matrices only), and linear warm-up, then the chosen decay to 0."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)

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


def restore(
    model: UnifiedModel, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR, state: dict[str, Any], folder: Path
) -> None:
    """Takes up a checkpoint's moments and its place in the schedule, and of one that was written in shards the weights. The learning rate
    is that of today's schedule, which is another one where `max_steps` changed."""
    if state["optimizer"] is None:
        load_shards(model, optimizer, folder)
    else:
        optimizer.load_state_dict(state["optimizer"])
        spread_state(optimizer)
    schedule.load_state_dict(state["schedule"])
    rates = [base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def save_checkpoint(
    run: RunFolder[Any], step: int, model: UnifiedModel, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler
) -> None:
    """Model, optimizer, schedule and step; of a sharded model every process writes its part."""
    state = {"optimizer": None, "schedule": schedule.state_dict(), "step": step}
    if model.sharding is None:
        run.save(step, model, {**state, "optimizer": optimizer.state_dict()})
    else:
        run.save(step, model, state, shards=lambda folder: save_shards(model, optimizer, folder))


def move_state(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """The optimizer's moments to another device, e.g. out of a GPU's memory while documents are sampled."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                state[name] = value.to(device)


def optimizer_step(
    model: UnifiedModel, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, config: OptimConfig
) -> dict[str, float]:
    """Adds up gradients over processes, clips, steps and clears them.

    Raises FloatingPointError before anything is changed where the gradient is not finite.
    """
    if model.sharding is None:
        sum_gradients(model)
    else:
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
