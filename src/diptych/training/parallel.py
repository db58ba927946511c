"""How a model is spread over processes while it is trained: applied from outside, on torch's own engine (FSDP2, device meshes, DCP).

Under `shard` each process keeps a part of every weight, gradient and moment, in float32; a layer's weights are gathered where it is
computed, in the type that the model computes in, and its gradients are added up over processes in float32. `shard_size` processes hold
one copy between them, and copies stand beside each other (HSDP). For a sampling phase all weights are gathered once.

Only what enters through `UnifiedModel.run` finds the weights: FSDP gathers them where a module's forward is entered.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from diptych.config import RunConfig
from diptych.models import UnifiedModel
from diptych.runtime import rank, world_size

SHARDS = "shards"  # folder of a checkpoint with what every process has of weights and moments
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def parallelize(model: UnifiedModel, config: RunConfig, device: torch.device) -> UnifiedModel:
    """The same model, spread as the settings say; itself where each process holds all of it.

    Raises ValueError for a mesh that cannot be, and weights that cannot be sharded.
    """
    if config.parallel.sharded(_trains_half(model)):
        model.sharding = Sharding(model, _mesh(config.parallel.shard_size, device))
    return model


def _trains_half(model: UnifiedModel) -> bool:
    return any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())


def _mesh(shard_size: int | None, device: torch.device) -> DeviceMesh:
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
    """FSDP2 around a model: its decoder layers one by one, and everything else that is not frozen as a whole."""

    def __init__(self, model: UnifiedModel, mesh: DeviceMesh) -> None:
        self.model = model
        if any(type(module).__name__ == "Linear4bit" for module in model.modules()):
            raise ValueError("parallel.mode shard cannot shard 4-bit weights; use replicate, or leave out load_in_4bit")
        computes = model.dtype
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        self.computes = computes if model.adapter is None else None  # adapters compute in float32, beside frozen weights in their own type
        policy = MixedPrecisionPolicy(param_dtype=self.computes, reduce_dtype=torch.float32, cast_forward_inputs=False)
        units: list[nn.Module] = [*model.language_model.layers, model]  # type: ignore[misc]
        frozen = {p for module in model.frozen_modules() for p in module.parameters()}
        for unit in units:
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=frozen)
        self.units = [unit for unit in units if isinstance(unit, FSDPModule)]
        for unit in self.units:
            unit.set_gradient_divide_factor(1.0)  # losses divide by counts of all processes: a sum, no mean
            unit.set_force_sum_reduction_for_comms(True)  # Gloo knows no other
        register_fsdp_forward_method(model, "run")
        inner = {id(p) for layer in model.language_model.layers for p in layer.parameters()}  # type: ignore[union-attr]
        self.outer = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inner]
        self._depth, self._in_backward = 0, False
        self._used = torch.zeros(len(self.outer), dtype=torch.int64)

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

    def save(self, write: Callable[[Path], None], folder: Path) -> None:
        """Has the model written, in the type that it computes in, by the first process, which holds all of it on the CPU while it does.
        Every process must enter."""
        whole: dict[int, nn.Parameter] = {}
        held: list[tuple[nn.Module, str, nn.Parameter]] = []
        for module in self.model.modules():
            for name, parameter in list(module._parameters.items()):
                if not isinstance(parameter, DTensor) or (self.model.adapter is not None and not parameter.requires_grad):
                    continue
                if id(parameter) not in whole:
                    full = parameter.full_tensor().detach()
                    if rank() == 0:
                        whole[id(parameter)] = nn.Parameter(full.to("cpu", self.computes or full.dtype), parameter.requires_grad)
                if rank() == 0:
                    held.append((module, name, parameter))
        try:
            for module, name, parameter in held:
                module._parameters[name] = whole[id(parameter)]
            if rank() == 0:
                write(folder)
        finally:
            for module, name, parameter in held:
                module._parameters[name] = parameter


def _nothing(model: UnifiedModel) -> None:
    pass


# --- checkpoints ---------------------------------------------------------------------------------------------------------


def save_shards(model: UnifiedModel, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """What each process has of weights and moments. Every process must enter."""
    dcp.save(_tensors(model, optimizer), checkpoint_id=folder / SHARDS)


def load_shards(model: UnifiedModel, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Takes up weights and moments, whatever the number of processes that wrote them. Raises ValueError where they are damaged."""
    found = _tensors(model, optimizer)
    try:
        dcp.load(found, checkpoint_id=folder / SHARDS)
    except Exception as error:
        raise ValueError(f"checkpoint {folder} is damaged ({str(error)[:200]}). Delete it to resume from the one before.") from error
    with torch.no_grad():
        for name, parameter in _trained(model).items():
            parameter.copy_(found[f"weight/{name}"])


def _trained(model: UnifiedModel) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _tensors(model: UnifiedModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights in float32 and moments by name; moments that are not there yet are made, as zero."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _trained(model).items():
        state = optimizer.state[parameter]
        if not state:
            state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        tensors[f"weight/{name}"] = parameter.detach().float()
        tensors |= {f"{moment}/{name}": state[moment] for moment in MOMENTS}
    return tensors


def spread_state(optimizer: torch.optim.Optimizer) -> None:
    """Moments that a checkpoint holds whole become those of this process's shards."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(parameter, DTensor) and isinstance(value, Tensor) and not isinstance(value, DTensor) and value.ndim:
                state[name] = distribute_tensor(value.float(), parameter.device_mesh, parameter.placements)
