"""Products of linear layers in float32 on a CPU, by oneDNN.

torch multiplies float32 matrices by MKL, which keeps to AVX2 on processors that are not Intel's; oneDNN does not, and is about twice as
fast there. Both sum in float32, in orders of their own (tests/test_products.py: how far they differ).
"""

from __future__ import annotations

import functools
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

FEWEST_ROWS = 4  # below, MKL is as fast
WORTH_IT = 128  # rows from which it pays to lay out a weight for one product


def available(model: nn.Module | None = None) -> bool:
    """Whether torch has oneDNN. Not for a sharded model, which is short of memory: laid out, weights and states are held twice."""
    if model is not None and getattr(model, "sharding", None) is not None:
        return False
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def fits(module: nn.Module) -> TypeGuard[nn.Linear]:
    """A plain linear layer without bias, in float32 on the CPU, whole."""
    if type(module) is not nn.Linear or module.bias is not None:
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and not isinstance(weight.data, DTensor) and weight.dtype == torch.float32 and weight.is_cpu


def product(states: Tensor, weight: Tensor) -> Tensor:
    """`nn.functional.linear`, without gradients: states (..., width) by weight (out, width), plain, transposed or laid out."""
    return torch.ops.mkldnn._linear_pointwise.default(states, weight, None, "none", [], "")


class Prepared:
    """Weights (out, width) laid out once for many products, during which they must not change."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())

    def __call__(self, states: Tensor) -> Tensor:
        return product(states, self.weight)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        return product(states, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        states, weight = ctx.saved_tensors
        to_states, to_weight = ctx.needs_input_grad
        rows = gradient.flatten(0, -2).t(), states.flatten(0, -2).t()
        return product(gradient, weight.t()) if to_states else None, product(*rows) if to_weight else None


def use(model: nn.Module) -> None:
    """From now on the model's linear layers multiply by oneDNN where that is faster. (For good, because gradient checkpointing calls
    layers again during the backward pass.)"""
    for layer in filter(fits, model.modules()) if available(model) else ():
        if "forward" not in layer.__dict__:
            layer.forward = functools.partial(_forward, layer)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, states: Tensor) -> Tensor:
    if states.numel() < WORTH_IT * states.shape[-1] or states.dtype != torch.float32 or not fits(layer) or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(states, layer.weight, layer.bias)
    return _Differentiable.apply(states, layer.weight)
