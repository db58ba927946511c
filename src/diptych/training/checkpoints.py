"""Checkpoints of both trainings: written while training goes on where the model is spread over processes, and resumed from.

A spread model is written by torch's distributed checkpoints: what each process holds is copied to the host's memory, and written from
there. From these files the first process then writes the model in its family's layout, through files mapped into memory, so that no
process ever holds all of it. A folder gets its name when everything is in it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor, distribute_tensor

from diptych.models import UnifiedModel
from diptych.runs import RunFolder
from diptych.runtime import barrier, on_first, rank, world_size
from diptych.training.eight_bit import EightBitAdamW
from diptych.training.preemption import Preempted

SHARDS = "shards"  # folder of a checkpoint with what every process has of weights and moments
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
logger = logging.getLogger(__name__)
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # `export` reads by itself, at each checkpoint


class Checkpoints:
    """Those of a run. Every process must call the same methods."""

    def __init__(
        self,
        run: RunFolder[Any],
        model: UnifiedModel,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
    ) -> None:
        self.run, self.model, self.optimizer, self.schedule = run, model, optimizer, schedule
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._group = dist.new_group(backend="gloo") if model.sharding is not None else None  # training has its own meanwhile
        run.ending.callback(self._end)

    def due(self, step: int, signal: str) -> bool:
        """Whether the step is to be saved: by the settings, or because the process was asked to stop."""
        config = self.run.config
        return step % config.save_steps == 0 or step == config.max_steps or bool(signal)

    def after(self, step: int, signal: str = "") -> None:
        """Behind a step: saves it where that is due. Raises what came up while an earlier one was written."""
        if self._writing is not None and self._writing.done():
            self._writing.result()
        if self.due(step, signal):
            self._save(step)

    def stop(self, step: int, signal: str) -> None:
        """Raises Preempted behind a step, once it is saved, where the process was asked to stop before the last one."""
        if signal and step < self.run.config.max_steps:
            self.finish()
            raise Preempted(f"{signal}: step {step} of {self.run.config.max_steps} is saved in {self.run.path}; the same command resumes")

    def _save(self, step: int) -> None:
        state = {"optimizer": None, "schedule": self.schedule.state_dict(), "step": step}
        if self.model.sharding is None:
            eight_bits = isinstance(self.optimizer, EightBitAdamW)
            moments = {"moments": _moments(self.model, self.optimizer)} if eight_bits else {"optimizer": self.optimizer.state_dict()}
            self.run.save(step, self.model, state | moments)
            return
        self.finish()
        stack = contextlib.ExitStack()
        folder = on_first(lambda: stack.enter_context(self.run.new_checkpoint(step)))
        upload = dcp.async_save(
            {**_weights(self.model), **_moments(self.model, self.optimizer)}, checkpoint_id=folder / SHARDS, process_group=self._group,
            async_stager=BlockingAsyncStager(),
        )  # fmt: skip
        assert isinstance(upload, Future)
        self._writing = self._pool.submit(self._complete, stack, upload, folder, state)

    def finish(self) -> None:
        """Waits for what is still being written, and raises what came up."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None
            barrier()  # the first process has written more than the others

    def _end(self) -> None:
        """One process completes the checkpoint that is being written, whatever ends the training: the folder is its own until then. Several
        do not: where one fails, none waits for the others."""
        alone = world_size() == 1
        if alone and self._writing is not None and not self._writing.done():
            logger.warning("the last checkpoint is still being written; Ctrl-C gives it up")
        self._pool.shutdown(wait=alone)

    def _complete(self, stack: contextlib.ExitStack, upload: Future[Any], folder: Path, state: dict[str, Any]) -> None:
        with stack:
            try:
                upload.result()
            except CheckpointException as error:  # is no Exception
                raise ValueError(f"the checkpoint of step {state['step']} could not be written: {_said(error)}") from error
            if rank() == 0:
                assert self.model.sharding is not None
                export(self.model.sharding.skeleton, folder / SHARDS, folder / "model")
                torch.save(state, folder / "trainer.pt")


def export(skeleton: UnifiedModel, shards: Path, folder: Path) -> None:
    """Writes the model of a checkpoint in shards as its family does (of one with an adapter, the adapter).

    `skeleton`: without the weights that are spread. They are read into files beside `folder`, which are mapped into memory.
    """
    stored = dcp.FileSystemReader(shards).read_metadata().state_dict_metadata
    with contextlib.ExitStack() as stack:
        wanted = {}
        for number, (name, parameter) in enumerate(skeleton.named_parameters()):
            if f"weight/{name}" in stored and parameter.is_meta:
                path = folder.with_name(f"weight_{number}")
                stack.callback(path.unlink, missing_ok=True)
                wanted[name] = _mapped(path, parameter)
        dcp.load({f"weight/{name}": tensor for name, tensor in wanted.items()}, checkpoint_id=shards, no_dist=True)
        with _filled(skeleton, wanted):
            skeleton.save(folder)


def _mapped(path: Path, like: Tensor) -> Tensor:
    """A tensor in a file of its own, for which there is room: a full disk would end the process (SIGBUS) where it is written to."""
    with path.open("wb") as stream:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            try:
                os.posix_fallocate(stream.fileno(), 0, max(1, like.numel() * like.itemsize))
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # what file systems say that cannot
                    raise
    return torch.from_file(str(path), shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)


@contextlib.contextmanager
def _filled(model: UnifiedModel, tensors: dict[str, Tensor]) -> Iterator[None]:
    """The weights of a skeleton, under all names of those that have several, for as long as this lasts."""
    whole = {id(p): nn.Parameter(tensors[name], p.requires_grad) for name, p in model.named_parameters() if name in tensors}
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in whole
    ]
    try:
        for module, name, parameter in places:
            module._parameters[name] = whole[id(parameter)]
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


# --- going on --------------------------------------------------------------------------------------------------------------


def restore(
    model: UnifiedModel, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR, state: dict[str, Any], folder: Path
) -> None:
    """Takes up a checkpoint's moments and its place in the schedule, and of one that was written in shards the weights. The learning rate
    is that of today's schedule, which is another one where `max_steps` changed. Raises ValueError where it is damaged."""
    if state["optimizer"] is None:
        _take_up(model, optimizer, folder, state.get("moments"))
    else:
        optimizer.load_state_dict(state["optimizer"])
        _spread(optimizer)
    schedule.load_state_dict(state["schedule"])
    rates = [base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def _take_up(model: UnifiedModel, optimizer: torch.optim.Optimizer, folder: Path, stored: dict[str, Tensor] | None) -> None:
    """Moments that are `stored`, or weights and moments in shards, whatever the number of processes that wrote them."""
    moments = _moments(model, optimizer)
    found = dict(moments) if stored is not None else {**_weights(model), **moments}
    try:
        if stored is None:
            dcp.load(found, checkpoint_id=folder / SHARDS, no_dist=not dist.is_initialized())
        else:
            for name, tensor in found.items():
                tensor.copy_(stored[name])
    except (Exception, CheckpointException) as error:
        said = _said(error)
        if isinstance(optimizer, EightBitAdamW):
            raise ValueError(
                f"the moments in {folder} are not those of adamw_8bit with this parallel.shard_size ({said}): blocks of 8 bits cannot be "
                "divided anew. Go on with as many processes and the optim.name with which it was written"
            ) from error
        raise ValueError(f"checkpoint {folder} is damaged ({said}). Delete it to resume from the one before.") from error
    with torch.no_grad():
        for name, parameter in _trained(model).items():
            if stored is None:
                parameter.copy_(found[f"weight/{name}"])
            if isinstance(optimizer, EightBitAdamW):
                steps = [int(value) for key, value in found.items() if key.startswith(f"step/{name}/")]
                optimizer.set_step(parameter, max(steps, default=0))


def _said(error: BaseException) -> str:
    """What came up first, of an error that torch has gathered from several processes."""
    first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) and error.failures else error
    return f"{first}"[:200]


def _trained(model: UnifiedModel) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _weights(model: UnifiedModel) -> dict[str, Tensor]:
    """In float32, by name."""
    return {f"weight/{name}": parameter.detach().float() for name, parameter in _trained(model).items()}


def _moments(model: UnifiedModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Those of the optimizer themselves, by name; what is not there yet is made, as zero. Those in 8 bits are named by the part of the
    weight that they belong to, because their blocks are those of the part."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _trained(model).items():
        if isinstance(optimizer, EightBitAdamW):
            part = parameter.device_mesh.get_local_rank("shard") if isinstance(parameter, DTensor) else 0
            tensors |= {f"{moment}/{name}/{part}": value for moment, value in optimizer.moments(parameter).items()}
            continue
        state = optimizer.state[parameter]
        if not state:
            state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        tensors |= {f"{moment}/{name}": state[moment] for moment in MOMENTS}
    return tensors


def _spread(optimizer: torch.optim.Optimizer) -> None:
    """Moments that a checkpoint holds whole become those of this process's shards."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(parameter, DTensor) and isinstance(value, Tensor) and not isinstance(value, DTensor) and value.ndim:
                state[name] = distribute_tensor(value.to(parameter.dtype), parameter.device_mesh, parameter.placements)
