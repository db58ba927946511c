"""The machine a run is on: threads, seeds, random state, versions, and sums over processes."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import datetime
import functools
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch import Tensor, nn

T = TypeVar("T")


class SaidByAll(ValueError):
    """Raised in every process, so that one need tell it."""


def generator(seed: int, *stream: int) -> torch.Generator:
    """A torch generator for one purpose at one step: the same (seed, stream) always gives the same draws, so a run
    that is resumed at a step draws what the uninterrupted run drew."""
    import numpy as np
    import torch

    state = int(np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state & (2**63 - 1))


def rng(seed: int, *stream: int) -> np.random.Generator:
    """The NumPy counterpart of `generator`."""
    import numpy as np

    return np.random.default_rng([seed, *stream])


def seed_everything(seed: int) -> None:
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries may use the global state
    torch.manual_seed(seed)


def set_threads(num_threads: int | None) -> int:
    """Fixes the number of CPU threads, on which bitwise repeatability depends. Returns the number in force."""
    import torch

    if num_threads is not None:
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; at least 1 is needed")
        torch.set_num_threads(num_threads)
    return torch.get_num_threads()


def pick_device(name: str = "auto") -> torch.device:
    """A GPU by its number: that of this process, where none is named. Threads have a GPU of their own in use, and it is the first."""
    import torch

    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but no CUDA device is available; use 'cpu' or 'auto'")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


def versions() -> dict[str, Any]:
    """Versions and hardware, for run folders and results."""
    import torch

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


@functools.cache
def _loop(process: int) -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    """A loop and its thread, of this process: a fork takes no threads along."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="coroutines", daemon=True)
    thread.start()
    return loop, thread


def run_async(awaitable: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, also from within a running event loop (a notebook's cell).

    All run in one loop, in a thread of its own, so that what one of them keeps for the next (a semaphore, a client) stays good; but what
    one of them waits for without `await` (an async reward that calls a judge) has a loop to itself, as it would wait for its own end.
    """
    loop, thread = _loop(os.getpid())
    if threading.current_thread() is thread:
        with ThreadPoolExecutor(1, "coroutine") as pool:
            return pool.submit(asyncio.run, awaitable).result()
    future = asyncio.run_coroutine_threadsafe(awaitable, loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()  # Ctrl-C while it waits
        raise


# --- processes ---------------------------------------------------------------------------------------------------------

_failed = False


@contextlib.contextmanager
def joined_processes() -> Iterator[None]:
    """Joins the process group that torchrun / accelerate launch describes in the environment, if any; each process takes a GPU of its own.

    Counts are summed on the CPU and gradients on the device, so both have a backend. A process that leaves by an exception does not wait
    for the others at its end: it ends at once, and whoever launched them ends the others.

    Raises ValueError where one does not come within DIPTYCH_JOIN_SECONDS (600), or has other code.
    """
    global _failed
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _joined():
            import torch
            import torch.distributed as dist

            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            store, number, count = _meet(float(os.environ.get("DIPTYCH_JOIN_SECONDS", "600")))
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=number, world_size=count)
            atexit.register(_leave)
            agree(_code(), "code of diptych (by its hash)", "Install one version on all machines")
        yield
    except BaseException:
        _failed = True
        raise


def _meet(seconds: float) -> tuple[dist.Store, int, int]:
    """A store that is new to all processes, once all have come; this process's number, and how many there are."""
    import torch.distributed as dist

    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    late = f"the {os.environ['WORLD_SIZE']} processes did not meet at {where} within {seconds:g} s (DIPTYCH_JOIN_SECONDS)"
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=seconds)))
        return dist.PrefixStore(session(store, number, count, seconds), store), number, count
    except (RuntimeError, ValueError, TimeoutError) as error:
        raise ValueError(f"{late}: {' '.join(str(error).split())[:200]}") from error


def session(store: dist.Store, number: int, count: int, seconds: float) -> str:
    """A name that all processes have, and none had before, once all have come. Raises TimeoutError where one does not.

    When torchrun starts processes again it gives them the store of those that died, where addresses stand at which nobody listens, and
    the count of starts is not the same on all machines. So each comes with a name of its own, the first process proposes a session of the
    names that it finds, and all go when each has found its own name in it.
    """

    def said(key: str) -> str | None:
        return store.get(key).decode() if store.check([key]) else None

    mine, deadline = uuid.uuid4().hex, time.monotonic() + seconds
    store.set(f"name/{number}", mine)
    proposed, proposal = "", ""
    while True:
        missing: list[str] = []
        if number == 0:
            names = json.dumps([said(f"name/{one}") for one in range(count)])
            if names != proposed:
                proposed, proposal = names, uuid.uuid4().hex
                store.set("session", json.dumps([proposal, json.loads(names)]))
            missing = [str(one) for one in range(1, count) if not store.check([f"{proposal}/{one}"])]
            if not missing:
                store.set(f"{proposal}/go", "")
        found, those = json.loads(said("session") or '["", []]')
        if those and those[number] == mine:
            store.set(f"{found}/{number}", "")
            if store.check([f"{found}/go"]):
                return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"{', '.join(missing[:8]) or 'some'} did not come. Look at the logs of the machines that should run them")
        time.sleep(0.05)


def _code() -> str:
    """A hash of this package's files."""
    found = hashlib.blake2b(digest_size=8)
    root = Path(__file__).resolve().parent
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return found.hexdigest()


def _leave() -> None:
    """Waits for the others and leaves the group: a process that just ends may make another abort."""
    import torch.distributed as dist

    if dist.is_initialized() and not _failed:
        with contextlib.suppress(RuntimeError):  # another process died: nothing to wait for
            dist.barrier()
        dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Ends the program. One of several processes first leaves the others in order; one that failed does not. Then it ends at once: it waits
    for no thread, and takes nothing of torch apart, where it would abort now and then (a mesh still holds its group of processes).
    """
    if not _joined():
        sys.exit(code)
    if not _failed:
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or int(_failed))


def _joined() -> bool:
    """Whether this is one of several processes that have met; torch is loaded then."""
    loaded = sys.modules.get("torch.distributed")
    return loaded is not None and bool(loaded.is_initialized())


def rank() -> int:
    if not _joined():
        return 0
    import torch.distributed as dist

    return dist.get_rank()


def world_size() -> int:
    if not _joined():
        return 1
    import torch.distributed as dist

    return dist.get_world_size()


def gather(value: T) -> list[T]:
    """What every process has, in their order: small things that pickle."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def on_first(function: Callable[[], T]) -> T:
    """What the function gives in the first process, in all of them. A ValueError there is raised in all of them."""
    if world_size() == 1:
        return function()
    import torch.distributed as dist

    said: list[Any] = [None]
    if rank() == 0:
        try:
            said = [(True, function())]
        except ValueError as error:
            said = [(False, str(error))]
    dist.broadcast_object_list(said, 0)
    good, value = said[0]
    if not good:
        raise SaidByAll(value)
    return value


def agree(value: Any, what: str, remedy: str) -> None:
    """Raises ValueError in all processes where they do not have the same."""
    found = gather(value)
    others = [f"process {number} has {one}" for number, one in enumerate(found) if one != found[0]]
    if others:
        raise SaidByAll(f"the processes do not have the same {what}: process 0 has {found[0]}, {', '.join(others[:3])}. {remedy}")


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes; the tensor itself where there is one."""
    if world_size() > 1:
        import torch.distributed as dist

        value = value.clone()
        dist.all_reduce(value)
    return value


def weights_checksum(model: nn.Module) -> str:
    """Of what is trained: the sum of each tensor's bits, which no order of adding changes."""
    import torch

    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            bits = (
                parameter.detach().contiguous().view({4: torch.int32, 2: torch.int16, 8: torch.int64}.get(parameter.itemsize, torch.uint8))
            )
            digest.update(f"{name} {int(bits.sum(dtype=torch.int64))}\n".encode())
    return digest.hexdigest()


def barrier() -> None:
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier()
