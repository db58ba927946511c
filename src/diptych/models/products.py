"""Products of linear layers in float32 on a CPU, by oneDNN.

torch multiplies float32 matrices by MKL, which keeps to AVX2 on processors that are not Intel's; oneDNN does not, and is about twice as
fast there. Sums are taken in MKL's order (by blocks of the width, each from its first to its last term), so that on such a processor
both give the same bits, gradients included: tests/test_products.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BLOCK = 192  # terms that MKL sums before it adds them to the result
FEWEST_ROWS = 4  # below, MKL sums in another order, and there is little to gain
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


def block_size(width: int) -> int:
    """How many terms MKL sums at a time."""
    if width <= BLOCK:
        return width
    return width // 2 if width <= 2 * BLOCK else BLOCK  # of an odd width one term is left for a third block


def multiply(states: Tensor, weight: Tensor) -> Tensor:
    """states (..., width) by weight (out, width), plain or laid out: (..., out); the width is summed at once."""
    return torch.ops.mkldnn._linear_pointwise(states, weight, None, "none", [], "")


def product(states: Tensor, weight: Tensor) -> Tensor:
    """`nn.functional.linear`, without gradients."""
    size = block_size(states.shape[-1])
    parts = zip(states.split(size, -1), weight.split(size, 1), strict=True)
    return _added(multiply(part.contiguous(), block.contiguous()) for part, block in parts)


def _added(terms: Iterator[Tensor]) -> Tensor:
    found = next(terms)
    for term in terms:
        found += term
    return found


class Prepared:
    """Weights (out, width) laid out once for many products, during which they must not change."""

    def __init__(self, weight: Tensor) -> None:
        self.size = block_size(weight.shape[1])
        self.blocks = [torch.ops.mkldnn._reorder_linear_weight(part.contiguous()) for part in weight.detach().split(self.size, 1)]

    def __call__(self, states: Tensor) -> Tensor:
        if len(self.blocks) == 1:
            return multiply(states, self.blocks[0])
        parts = zip(states.split(self.size, -1), self.blocks, strict=True)
        return _added(multiply(part.contiguous(), block) for part, block in parts)


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
