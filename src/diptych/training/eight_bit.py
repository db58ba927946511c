"""AdamW with moments in 8 bits, by blocks of 256 (bitsandbytes; arXiv:2110.02861): of this process's part of weights that are sharded.

A moment takes 1 byte and 1/64 where it takes 4 otherwise; weights and gradients stay as they are. Parts of fewer than 4096 values keep
moments of 32 bits.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

MOMENTS = ("state1", "state2", "absmax1", "absmax2")


class EightBitAdamW(torch.optim.Optimizer):
    """The library's optimizer over plain tensors that share memory with the parts; groups, rates and states are its own."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        """Raises ValueError where the library is not installed."""
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional CPU kernels at import
        try:
            library = importlib.import_module("bitsandbytes.optim")
        except ImportError as error:
            raise ValueError("optim.name: adamw_8bit needs the extra: pip install 'diptych[gpu]'") from error
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})
        self.parts = {p: _part(p) for group in groups for p in group["params"]}
        parts = [[part for p in group["params"] if (part := self.parts[p]).numel()] for group in self.param_groups]
        self.inner = library.AdamW8bit([{"params": some or [nn.Parameter(torch.zeros(1))]} for some in parts], lr=lr, betas=betas)
        self._places = {part: (group, place) for group, some in enumerate(parts) for place, part in enumerate(some)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner |= {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        for whole, part in self.parts.items():
            gradient = whole.grad.to_local() if isinstance(whole.grad, DTensor) else whole.grad
            part.grad = None if gradient is None else gradient.to(part.dtype)
        self.inner.step()
        for part in self.parts.values():
            part.grad = None

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What is kept of a weight, by the library's names; `step` as a tensor of its own. Empty where this process has no part of it."""
        part = self.parts[parameter]
        if not part.numel():
            return {}
        self._begin(part)
        state = self.inner.state[part]
        return {"step": torch.tensor(state["step"]), **{name: state[name] for name in MOMENTS if name in state}}

    def set_step(self, parameter: nn.Parameter, step: int) -> None:
        if self.parts[parameter].numel():
            self.inner.state[self.parts[parameter]]["step"] = step

    def _begin(self, part: nn.Parameter) -> None:
        if not self.inner.state[part]:
            group, place = self._places[part]
            self.inner.init_state(self.inner.param_groups[group], part, group, place)


def _part(parameter: nn.Parameter) -> nn.Parameter:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    assert local.is_contiguous()  # the library would step a copy
    return nn.Parameter(local.detach())
