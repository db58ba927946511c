"""How a model is spread over processes while it is trained: applied from outside, on torch's own engine (FSDP2, device meshes).

Under `shard` each process keeps a part of every weight, gradient and moment, in float32; a layer's weights are gathered where it is
computed, in the type that the model computes in, and its gradients are added up over processes in float32. `shard_size` processes hold
one copy between them, and copies stand beside each other (HSDP). Under `replicate` copies stand beside each other only: the same engine
on a mesh whose shards are whole, around what is trained; what is frozen (4 bits, say) it leaves alone. For a sampling phase all weights
are gathered once.

Only what enters through `UnifiedModel.run` finds the weights: FSDP gathers them where a module's forward is entered.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from diptych.config import RunConfig
from diptych.models import UnifiedModel
from diptych.runtime import rank, world_size


def parallelize(model: UnifiedModel, config: RunConfig, device: torch.device, policy: UnifiedModel | None = None) -> UnifiedModel:
    """The same model on the device, spread as the settings say; given on the CPU, the device never holds all of a sharded one.

    `policy`: of a frozen model, the one that is trained beside it, as which it is sharded or not.

    Raises ValueError for a mesh that cannot be, and weights that cannot be sharded.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    trains_half = any(p.dtype in (torch.bfloat16, torch.float16) for p in trained)
    if config.parallel.sharded(trains_half) if policy is None else policy.is_sharded:
        model.sharding = Sharding(model, _mesh(config.parallel.shard_size, device), replicated=False)
    elif world_size() > 1 and trained:
        model.sharding = Sharding(model, _mesh(1, device), replicated=True)
    return model.to(device)


def _mesh(shard_size: int | None, device: torch.device) -> DeviceMesh:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # FSDP takes the GPU in use, which is the first where the settings name another
    if not dist.is_initialized():  # one process by itself
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)
    everyone = world_size()
    size = shard_size or min(everyone, int(os.environ.get("LOCAL_WORLD_SIZE", everyone)))
    if everyone % size:
        raise ValueError(f"parallel.shard_size is {size}, which does not divide the {everyone} processes; choose a divisor")
    if everyone == size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (everyone // size, size), mesh_dim_names=("replicate", "shard"))


class Sharding:
    """FSDP2 around a model: its decoder layers one by one, and everything else that is not frozen as a whole.

    skeleton: in the first process, the same model without the weights that are spread ("meta"), for `checkpoints.export`.
    """

    def __init__(self, model: UnifiedModel, mesh: DeviceMesh, *, replicated: bool) -> None:
        self.model, self.replicated = model, replicated
        if not replicated and any(type(module).__name__ == "Linear4bit" for module in model.modules()):
            raise ValueError("parallel.mode shard cannot shard 4-bit weights; use replicate, or leave out load_in_4bit")
        left_alone = {p for module in model.frozen_modules() for p in module.parameters()}
        if any(p.requires_grad for p in left_alone):  # their gradients would be added up by nobody
            raise ValueError("the adapter trains weights of the image tokenizer or the vision encoder; train it on in one process")
        if replicated:
            left_alone |= {p for p in model.parameters() if not p.requires_grad}
        # adapters by themselves compute in float32, beside frozen weights in their own type; what is trained in full beside them cannot
        alone = model.adapter is not None and not model.adapter.train_in_full
        computes = None if replicated or alone else model.dtype
        self.skeleton = _skeleton(model, left_alone, None if model.adapter is not None else computes) if rank() == 0 else None
        policy = MixedPrecisionPolicy(param_dtype=computes, reduce_dtype=torch.float32, cast_forward_inputs=False)
        self.units: list[FSDPModule] = []
        for unit in (*model.language_model.layers, model):  # type: ignore[misc]
            for parameter in unit.parameters():
                if parameter.requires_grad and not replicated and not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.float()
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=left_alone)
            self.units.append(unit)
        for unit in self.units:
            unit.set_gradient_divide_factor(1.0)  # losses divide by counts of all processes: a sum, no mean
            unit.set_force_sum_reduction_for_comms(True)  # Gloo knows no other
        register_fsdp_forward_method(model, "run")
        inner = {id(p) for layer in model.language_model.layers for p in layer.parameters()}  # type: ignore[union-attr]
        self.outer = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inner]
        if self.outer:
            first: Any = model.language_model.layers[0]  # type: ignore[index]
            first.register_forward_pre_hook(_with_gradient, prepend=True, with_kwargs=True)  # before FSDP's own
        self._depth, self._in_backward = 0, False
        self._used = torch.zeros(len(self.outer), dtype=torch.int64)

    def sum_copies(self, now: bool) -> None:
        """Whether the next backward pass adds up the gradients of copies too, with those of earlier passes that waited for it."""
        for unit in self.units:
            unit.set_requires_all_reduce(now, recurse=False)

    def watched(self, *results: Tensor) -> tuple[Tensor, ...]:
        """The same results of the model, whose backward pass ends with gradients for every weight outside the layers.

        One process draws pictures where another has words alone, and both must have gradients of the same weights to add up: what a process
        did not use is 0 there. What none used has no gradient at the optimizer's step, as in one process (`drop_unused`).
        """
        for result in results:
            if result.requires_grad:
                result.register_hook(self._begin_backward)  # before FSDP's own, which then end later than ours
        return results

    def _begin_backward(self, _: Tensor) -> None:
        if not self._in_backward:
            self._in_backward = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._in_backward = False
        parameters = dict(self.model.named_parameters())
        for number, name in enumerate(self.outer):
            if parameters[name].grad is None:
                parameters[name].grad = torch.zeros_like(parameters[name])
            else:
                self._used[number] = 1

    def drop_unused(self) -> None:
        """Takes the gradient from weights that no process used since the last time."""
        used = self._used.clone()
        dist.all_reduce(used)
        self._used.zero_()
        parameters = dict(self.model.named_parameters())
        for name, count in zip(self.outer, used.tolist(), strict=True):
            if not count:
                parameters[name].grad = None

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """All weights in every process: gathered once, however many tokens are sampled meanwhile. Every process must enter."""
        self._depth += 1
        try:
            if self._depth == 1:
                for unit in self.units:
                    unit.set_reshard_after_forward(False, recurse=False)
                self.model.run(_nothing)  # gathers the root; before its first forward FSDP does not know it as one
                for unit in self.units:
                    unit.unshard()
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for unit in self.units:
                    unit.reshard()
                    unit.set_reshard_after_forward(True, recurse=False)


def _nothing(model: UnifiedModel) -> None:
    pass


def _with_gradient(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first layer's input asks for a gradient in every process, else FSDP adds up the layer's gradients earlier in those whose
    embeddings are trained and used (pictures, say, beside adapters) than in the others, which wait for something else then."""

    def asking(value: Any) -> Any:
        plain = isinstance(value, Tensor) and value.is_floating_point() and torch.is_grad_enabled() and not value.requires_grad
        return value.detach().requires_grad_() if plain else value

    if arguments:
        return (asking(arguments[0]), *arguments[1:]), options
    return arguments, {name: asking(value) if name == "hidden_states" else value for name, value in options.items()}


def _skeleton(model: UnifiedModel, kept: set[nn.Parameter], dtype: torch.dtype | None) -> UnifiedModel:
    """A copy that shares buffers and the weights that are kept, and has the others on "meta", what is trained in the type that it is saved
    in."""
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*model.buffers(), *kept)}
    for parameter in model.parameters():
        if parameter not in kept:
            empty = torch.empty_like(parameter, dtype=dtype or parameter.dtype, device="meta")
            memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    return copy.deepcopy(model, memo)
