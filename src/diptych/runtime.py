"""The machine a run is on: threads, seeds, random state, versions, and sums over processes."""

from __future__ import annotations

import atexit
import contextlib
import os
import platform
import random
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn


def generator(seed: int, *stream: int) -> torch.Generator:
    """A torch generator for one purpose at one step: the same (seed, stream) always gives the same draws, so a run
    that is resumed at a step draws what the uninterrupted run drew."""
    state = int(np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state & (2**63 - 1))


def rng(seed: int, *stream: int) -> np.random.Generator:
    """The NumPy counterpart of `generator`."""
    return np.random.default_rng([seed, *stream])


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries may use the global state
    torch.manual_seed(seed)


def set_threads(num_threads: int | None) -> int:
    """Fixes the number of CPU threads, on which bitwise repeatability depends. Returns the number in force."""
    if num_threads is not None:
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; at least 1 is needed")
        torch.set_num_threads(num_threads)
    return torch.get_num_threads()


def pick_device(name: str = "auto") -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but no CUDA device is available; use 'cpu' or 'auto'")
    return torch.device(name)


def versions() -> dict[str, Any]:
    """Versions and hardware, for run folders and results."""
    found: dict[str, Any] = {"python": platform.python_version(), "cpu_threads": torch.get_num_threads()}
    for name in ("diptych", "torch", "transformers", "numpy", "vector-quantize-pytorch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["commit"] = _commit()
    found["cpu"] = _cpu_name()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        result = subprocess.run(["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# --- processes ---------------------------------------------------------------------------------------------------------


def init_processes() -> None:
    """Joins the process group that torchrun / accelerate launch describes in the environment, if any; each process takes a GPU of its own.

    Counts are summed on the CPU and gradients on the device, so both have a backend.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(leave_processes)


def leave_processes() -> None:
    """Waits for the others and leaves the group: a process that just ends may make another abort."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # another process died: nothing to wait for
            dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes; the tensor itself where there is one."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def sum_gradients(model: nn.Module) -> None:
    """Adds up the gradients of all processes. Losses divide by global counts, so no mean is taken."""
    if world_size() > 1:
        for parameter in model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
