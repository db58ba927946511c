"""A CUDA device for tests that is not there: tensors say `cuda:N` and are computed on the CPU.

`stand_in()` gives a `Machine`. Inside, `torch.zeros(3, device="cuda")`, `model.to("cuda:1")`, autograd, fused AdamW and CUDA graphs work
in every thread, and what would fail on a GPU fails here:

- tensors of two devices meet (a CPU tensor of no dimensions may, and indices on the CPU), also two GPUs;
- `numpy()` of a tensor on a GPU; a generator of another device;
- a GPU is used without a number in a thread whose current device is another one;
- a graph that is recorded waits for the device, or relies on values of Python: a replay repeats only what the device did, at the same
  addresses, and what is recorded is not computed until it is replayed.

`Machine.waits` has a line for each time that the host waited for a device: `.item()`, `.cpu()`, masks as indices, uploads of memory
that is not pinned.

How: a wrapper subclass holds a CPU tensor (`inner`), and every operation on it comes to `_dispatch`. Its C++ device is `ipu`, a type
that nobody else uses (`CARRIER`): autograd's engine asks `cuda` for its streams, and a build without CUDA has none. Tensors that are
made from nothing enter through kernels registered for the dispatch keys of both device types, so all threads are served.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # optimizers import it, and it looks at all functions of torch: before others are put in their places
from torch import Tensor
from torch.utils._device import _device_constructors

_device_constructors()  # kept from its first call on, so it must see torch's own functions
aten = torch.ops.aten
SOURCE = str(Path(__file__).parents[1] / "src")
CARRIER, _IPU = "ipu", 18  # and its place in c10::DeviceType
COPIES = {aten._to_copy.default, aten.copy_.default, aten.copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default, aten._unsafe_index.Tensor}
MEET_SCALARS = (INDEXING - {aten.index.Tensor}) | {aten.fill_.Tensor, aten._fused_adamw_.default}  # besides what is pointwise
WAITING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
    aten.unique_consecutive.default, aten.equal.default, aten.bincount.default,
}  # fmt: skip


class CudaTensor(torch.Tensor):
    inner: Tensor
    gpu: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, gpu: torch.device) -> CudaTensor:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=torch.device(CARRIER, gpu.index), **layout)
        made.inner, made.gpu = inner, gpu
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    device = property(lambda self: self.gpu)
    is_cuda = property(lambda self: True)
    get_device = property(lambda self: lambda: self.gpu.index)
    data_ptr = property(lambda self: self.inner.data_ptr)
    untyped_storage = property(lambda self: self.inner.untyped_storage)

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.gpu} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.gpu)

    def _set_data(self, value: Tensor) -> None:
        assert isinstance(value, CudaTensor), "a parameter changes its device only through Module.to"
        assert (value.shape, value.dtype) == (self.shape, self.dtype)
        self.inner, self.gpu = value.inner, value.gpu

    data = property(lambda self: self.detach(), _set_data)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = CudaTensor(self.inner.detach().clone(), self.gpu)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.detach().__reduce_ex__(protocol)  # saved as if from the CPU; loading must name a device anyway

    def __repr__(self, **_: Any) -> str:
        return f"{self.inner!r} on {self.gpu}"


class _Thread(threading.local):
    device, recording = 0, None


class Machine:
    """waits: operation and place in our code of every time that a thread waited for a GPU."""

    def __init__(self, num_gpus: int) -> None:
        self.num_gpus, self.thread = num_gpus, _Thread()
        self.waits, self.num_replays = list[str](), 0
        self.alone: int | None = None  # the thread whose recording forbids others to wait (capture_error_mode="global")

    def gpu(self, device: Any = None) -> torch.device:
        """With its number: that of the thread, where none is named."""
        device = torch.device("cuda" if device is None else device)
        index = self.thread.device if device.index is None else device.index
        if not 0 <= index < self.num_gpus:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index}, there are {self.num_gpus}")
        return torch.device("cuda", index)

    def wait(self, what: str) -> None:
        if self.thread.recording is not None or self.alone not in (None, threading.get_ident()):
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what} at {_place()})")
        self.waits.append(f"{what} at {_place()}")


def _place() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(SOURCE):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


MACHINE: Machine | None = None  # the one in use


# --- operations --------------------------------------------------------------------------------------------------------


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_map(function, part) for part in value)
    return function(value) if isinstance(value, Tensor) else value


def _tensors(*values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(*value)


def _inner(value: Tensor) -> Tensor:
    return value.inner if isinstance(value, CudaTensor) else value


def _common_gpu(func: Any, args: Any, kwargs: Any) -> torch.device:
    """The GPU of an operation's tensors. Raises RuntimeError where CUDA would find tensors of several devices."""
    met = list(_tensors(*args, *kwargs.values()))
    may_index = set(map(id, _tensors(args[1]))) if func in INDEXING else set()
    if func in INDEXING and not isinstance(args[0], CudaTensor):
        raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor ({args[0].device}), at {_place()}")
    scalars = torch.Tag.pointwise in func.tags or func in MEET_SCALARS or func.__name__.startswith("_foreach")
    names = [argument.name for argument in func._schema.arguments if argument.alias_info is not None and argument.alias_info.is_write]
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    written = set(map(id, _tensors(*(given[name] for name in names if name in given))))
    devices = {one.device for one in met if isinstance(one, CudaTensor)}
    for one in met:
        fits = isinstance(one, CudaTensor) or id(one) in may_index or (scalars and one.dim() == 0 and id(one) not in written)
        devices |= set() if fits else {one.device}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices: {found} ({func} at {_place()})")
    generator = kwargs.get("generator")
    if generator is not None:
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({func} at {_place()})")
    return devices.pop()


def _waits(func: Any, args: Any, kwargs: Any) -> bool:
    if func in INDEXING:
        return any(one.dtype in (torch.bool, torch.uint8) or not isinstance(one, CudaTensor) for one in _tensors(args[1]))
    return func in WAITING or (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None)


def _copied(func: Any, args: Any, kwargs: Any) -> Any:
    """`_to_copy` and `copy_`, the operations that may cross from device to device."""
    assert MACHINE is not None
    source = args[0] if func is aten._to_copy.default else args[1]
    if func is aten._to_copy.default:
        asked = kwargs["device"] if kwargs.get("device") and kwargs["device"].type != CARRIER else source.device
        target = MACHINE.gpu(asked) if asked.type == "cuda" else asked
    else:
        target = args[0].device
    quick = kwargs.get("non_blocking") or (len(args) > 2 and args[2])  # of use from a GPU only: what a CPU build calls pinned is not
    scalar = func is not aten._to_copy.default and source.dim() == 0  # the value of `x[0] = 1` is an argument of a kernel
    if source.device != target and "cpu" in (source.device.type, target.type) and not (quick and source.is_cuda) and not scalar:
        MACHINE.wait("download" if target.type == "cpu" else "upload")
    if func is aten._to_copy.default:
        kwargs = kwargs | {"device": torch.device("cpu")}
    found = _computed(func, args, kwargs)
    return args[0] if func is aten.copy_.default else CudaTensor(found, target) if target.type == "cuda" else found


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on the CPU. While a graph is recorded it is noted, and nothing that exists is written to."""
    assert MACHINE is not None
    inner_args, inner_kwargs = _map(_inner, args), {name: _map(_inner, value) for name, value in kwargs.items()}
    graph = MACHINE.thread.recording
    if graph is None:
        return func(*inner_args, **inner_kwargs)
    elsewhere = {one.device for one in _tensors(*args, *kwargs.values()) if isinstance(one, CudaTensor)} - {graph.gpu}
    if elsewhere:  # a graph records a stream, which is of one GPU
        raise RuntimeError(f"the graph of {graph.gpu}, the current device, does not record {elsewhere.pop()} ({func} at {_place()})")
    return graph.note(func, inner_args, inner_kwargs)


def _dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    assert MACHINE is not None, "a tensor of a stand-in outlived it"
    if func in COPIES:
        return _copied(func, args, kwargs)
    gpu = _common_gpu(func, args, kwargs)
    if _waits(func, args, kwargs):
        MACHINE.wait(str(func))
    asked = kwargs.get("device")
    if asked is not None:
        gpu = MACHINE.gpu(asked) if asked.type == "cuda" else gpu if asked.type == CARRIER else asked
        kwargs = kwargs | {"device": torch.device("cpu")}
    found = _computed(func, args, kwargs)
    if func._schema.is_mutable:
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        written = [given.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        for one in _tensors(*written):
            if isinstance(one, CudaTensor) and one.shape != one.inner.shape:  # `out=` of no elements takes the size of the result
                torch._C.TensorBase.data.__set__(one, CudaTensor(one.inner, one.gpu))
        if func._schema.returns and func._schema.returns[0].alias_info is not None:
            return written[0] if len(func._schema.returns) == 1 else tuple(written)
    return _map(lambda one: CudaTensor(one, gpu) if gpu.type == "cuda" else one, found)


def _made(func: Any, device: Any, *given: Any, **named: Any) -> Tensor:
    assert MACHINE is not None
    gpu = MACHINE.gpu("cuda" if device.index is None else torch.device("cuda", device.index))
    return CudaTensor(_computed(func, given, named), gpu)


def _empty(size: Any, *, dtype: Any = None, device: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    return _made(aten.empty.memory_format, device, size, dtype=dtype, memory_format=memory_format)


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return _made(aten.empty_strided.default, device, size, stride, dtype=dtype)


def _copy_(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Where `torch.tensor(..., device=)` has switched the subclass's own dispatch off."""
    return _copied(aten.copy_.default, (self, source), {"non_blocking": non_blocking})


# --- graphs ------------------------------------------------------------------------------------------------------------


class Graph:
    """Stands in for torch.cuda.CUDAGraph: what was recorded, and where it left its results."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.steps: list[tuple[Any, Any, Any, Any]] = []
        self.gpu = torch.device("cuda")

    def note(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func._schema.is_mutable:  # nothing is computed while it is recorded, save the size of what is new
            self.steps.append((func, args, kwargs, None))
            return func(*args, **kwargs) if any(one.numel() == 0 for one in _tensors(kwargs.get("out"))) else None
        found = func(*args, **kwargs)
        known = {one.untyped_storage().data_ptr() for one in _tensors(*args, *kwargs.values())}
        fresh = [one for one in _tensors(found) if one.untyped_storage().data_ptr() not in known]
        if fresh:
            self.steps.append((func, args, kwargs, found))
        for one in fresh:
            if one.is_floating_point():
                one.fill_(torch.nan)
        return found

    def replay(self) -> None:
        assert MACHINE is not None
        MACHINE.num_replays += 1
        for func, args, kwargs, found in self.steps:
            again = func(*args, **kwargs)
            if found is not None:
                for old, new in zip(_tensors(found), _tensors(again), strict=True):
                    old.copy_(new)


@contextlib.contextmanager
def _graph(graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
    assert MACHINE is not None
    assert MACHINE.thread.recording is None
    MACHINE.wait("synchronize")  # as torch does before it records
    MACHINE.thread.recording, graph.gpu = graph, MACHINE.gpu()
    MACHINE.alone = threading.get_ident() if capture_error_mode == "global" else None
    try:
        yield
    finally:
        MACHINE.thread.recording, MACHINE.alone = None, None


# --- the machine -------------------------------------------------------------------------------------------------------


def _synchronize(device: Any = None) -> None:
    assert MACHINE is not None
    MACHINE.wait("synchronize")


def _numbered(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function to which `cuda` is the thread's GPU; torch would ask its guard of CUDA, which a build without CUDA lacks."""

    def number(value: Any) -> Any:
        return MACHINE.gpu(value) if MACHINE and str(value) == "cuda" else value

    def numbered(*args: Any, **kwargs: Any) -> Any:
        kwargs = {name: number(value) if name == "device" else value for name, value in kwargs.items()}
        return function(*(number(one) if isinstance(one, str | torch.device) else one for one in args), **kwargs)

    return numbered


@contextlib.contextmanager
def _guard_of_carrier() -> Iterator[None]:
    """C++ code sets the current device around some operations; for the carrier's it does what it does on a CPU: nothing."""
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (_IPU + 1)).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[_IPU]
    guards[_IPU] = guards[0]
    try:
        yield
    finally:
        guards[_IPU] = before


@contextlib.contextmanager
def stand_in(num_gpus: int = 2) -> Iterator[Machine]:
    global MACHINE
    machine = MACHINE = Machine(num_gpus)
    properties = types.SimpleNamespace(name="stand-in", total_memory=2**34, major=9, minor=0, multi_processor_count=1)

    def nothing() -> Callable[..., None]:
        return lambda *_, **__: None

    def set_device(device: Any) -> None:
        machine.thread.device = machine.gpu(torch.device("cuda", device) if isinstance(device, int) else device).index

    @contextlib.contextmanager
    def in_use(device: Any) -> Iterator[None]:
        before = machine.thread.device
        set_device(device)
        try:
            yield
        finally:
            machine.thread.device = before

    named: dict[str, Any] = {
        "_lazy_init": nothing(), "init": nothing(), "is_available": lambda: True, "is_initialized": lambda: True,
        "device_count": lambda: num_gpus, "current_device": lambda: machine.thread.device, "set_device": set_device, "device": in_use,
        "get_device_name": lambda *_: "stand-in", "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0), "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda *_: (2**34, 2**34), "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": nothing(), "empty_cache": nothing(), "synchronize": _synchronize,
        "get_rng_state": lambda *_: torch.get_rng_state(), "set_rng_state": nothing(), "manual_seed": nothing(),
        "manual_seed_all": nothing(), "CUDAGraph": Graph, "graph": _graph,
        "Stream": mock.Mock, "current_stream": mock.Mock, "stream": lambda *_: contextlib.nullcontext(),
    }  # fmt: skip
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    threads = torch.autograd.is_multithreading_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_guard_of_carrier())
        for name, value in named.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "to")):
            stack.enter_context(mock.patch.object(owner, name, _numbered(getattr(owner, name))))
        stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda self, device=None, **_: self.to(machine.gpu(device))))
        library = torch.library.Library("aten", "IMPL")
        stack.callback(library._destroy)
        for key in ("CUDA", "IPU"):
            for name, kernel in (("empty.memory_format", _empty), ("empty_strided", _empty_strided), ("copy_", _copy_)):
                library.impl(name, kernel, key)
        torch.__future__.set_swap_module_params_on_conversion(True)  # parameters keep their identity, as they do between CPU and CUDA
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        torch._C._set_multithreading_enabled(False)  # the engine has no thread for the carrier
        stack.callback(torch._C._set_multithreading_enabled, threads)
        try:
            yield machine
        finally:
            MACHINE = None
