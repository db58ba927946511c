"""What the machine is, and which models it can run."""

from __future__ import annotations

import dataclasses
import os
from contextlib import suppress
from importlib import metadata
from typing import Any

import torch

from diptych.doctor.memory import GIB, DocumentSize, Sizes, estimate
from diptych.doctor.scale import Fleet, Plan, plan
from diptych.runtime import versions

REFERENCE_MODES = ("sampling", "lora", "qlora")


@dataclasses.dataclass(frozen=True)
class Gpu:
    name: str
    gib: float
    bf16: bool


# Sizes of the released checkpoints; the first two numbers of each are counted from the stock classes (`tests/test_doctor.py` counts again).
# Sources: Janus-Pro, a third party's table of its config (the hub's own was out of reach); VILA-U, arXiv:2409.04429 and the files
# that the release lists; Emu3 and Chameleon-7B, the defaults of transformers' configs, which are those of the releases; Chameleon-34B, the
# widths of Llama's 34B (arXiv:2308.12950), which have the layers and heads of the release and add up to the 34B that it states.
REFERENCES: dict[str, Sizes] = {
    "Janus-Pro-1B": Sizes(
        weight_bytes=4_153_273_622, trained=1_701_064_704, hidden=2048, intermediate=5632, layers=24, heads=16, kv_heads=16,
        head_dim=128, vocab=102_400, codebook=16_384, positions=576, depth=1, length=578, context=16_384, branches=1,
    ),
    "Janus-Pro-7B": Sizes(
        weight_bytes=14_815_546_646, trained=7_032_201_216, hidden=4096, intermediate=11_008, layers=30, heads=32, kv_heads=32,
        head_dim=128, vocab=102_400, codebook=16_384, positions=576, depth=1, length=578, context=16_384, branches=1,
    ),
    "VILA-U-7B": Sizes(
        weight_bytes=15_307_211_014, trained=7_286_574_080, hidden=4096, intermediate=11_008, layers=32, heads=32, kv_heads=32,
        head_dim=128, vocab=32_004, codebook=16_384, positions=256, depth=4, length=258, context=8192, branches=1,
    ),
    "Emu3-8B": Sizes(
        weight_bytes=17_525_503_806, trained=8_492_011_520, hidden=4096, intermediate=14_336, layers=32, heads=32, kv_heads=8,
        head_dim=128, vocab=184_622, codebook=32_768, positions=8100, depth=1, length=8199, context=9216, branches=1,
    ),
    "Chameleon-7B": Sizes(
        weight_bytes=14_086_180_864, trained=7_013_666_816, hidden=4096, intermediate=11_008, layers=32, heads=32, kv_heads=32,
        head_dim=128, vocab=65_536, codebook=8192, positions=1024, depth=1, length=1026, context=4096, branches=0,
    ),
    "Chameleon-34B": Sizes(
        weight_bytes=68_647_464_960, trained=34_294_308_864, hidden=8192, intermediate=22_016, layers=48, heads=64, kv_heads=8,
        head_dim=128, vocab=65_536, codebook=8192, positions=1024, depth=1, length=1026, context=4096, branches=0,
    ),
}  # fmt: skip


def gpus() -> list[Gpu]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(Gpu(properties.name, properties.total_memory / GIB, properties.major >= 8))  # bf16 units since Ampere
    return found


def machine(document: DocumentSize | None = None) -> dict[str, Any]:
    """Versions, processor, memory (GiB), GPUs, and what fits.

    Returns:
        `models`: name -> `num_images` (of the document, at most as many as its context holds) and, for each of REFERENCE_MODES, `gib` and
        `fits`, which is None without a GPU and otherwise says whether the largest one suffices.
    """
    document, found = document or DocumentSize(), gpus()
    environment = versions()
    return {
        **{name: environment[name] for name in ("diptych", "python", "torch", "transformers")},
        "peft": _version("peft"),
        "bitsandbytes": _version("bitsandbytes"),
        "cpu": environment["cpu"],
        "cpu_cores": _cores(),
        "ram_gib": _ram_gib(),
        "gpus": [dataclasses.asdict(gpu) for gpu in found],
        "demo": True,  # 3 M parameters, on any CPU
        "models": {name: _needs(sizes, document, found) for name, sizes in REFERENCES.items()},
    }


def fleet(gpus_each: int | None, gpu_gib: float | None, nodes: int | None, shard_size: int | None) -> Fleet | None:
    """What `--gpus`, `--gpu-memory`, `--nodes` and `--shard-size` say; None where they say nothing. Memory that is not given is that of
    this machine's smallest GPU.

    Raises ValueError where it cannot be.
    """
    if gpus_each is None:
        for name, value in (("--gpu-memory", gpu_gib), ("--nodes", nodes), ("--shard-size", shard_size)):
            if value is not None:
                raise ValueError(f"{name} is about several GPUs; say how many each machine has: --gpus 8")
        return None
    if gpu_gib is None:
        gpu_gib = min((gpu.gib for gpu in gpus()), default=None)
    if gpu_gib is None:
        raise ValueError("this machine has no GPU to take the memory from; give it in GiB: --gpu-memory 80")
    return Fleet(gpus_each, gpu_gib, 1 if nodes is None else nodes, shard_size)


def released(name: str) -> str | None:
    """The name of a released size as REFERENCES has it, however its letters are written."""
    return next((known for known in REFERENCES if known.lower() == name.lower()), None)


def plans(
    asked: Fleet, document: DocumentSize | None = None, *, kl: bool = False, adamw_8bit: bool = False, only: str | None = None
) -> dict[str, Plan]:
    """What each GPU needs for the released sizes, or for one of them; with as many pictures as a context holds, at most those asked for."""
    document = document or DocumentSize()
    return {
        name: plan(sizes, asked, _fitting(sizes, document), kl=kl, adamw_8bit=adamw_8bit)
        for name, sizes in REFERENCES.items()
        if only in (None, name)
    }


def _fitting(sizes: Sizes, document: DocumentSize) -> DocumentSize:
    images = max(0, min(document.num_images, (sizes.context - document.text_tokens) // sizes.length))
    return dataclasses.replace(document, num_images=images)


def _needs(sizes: Sizes, document: DocumentSize, found: list[Gpu]) -> dict[str, Any]:
    fitting, largest = _fitting(sizes, document), max((gpu.gib for gpu in found), default=None)
    needs: dict[str, Any] = {"num_images": fitting.num_images}
    for mode in REFERENCE_MODES:
        memory = estimate(sizes, fitting, mode)
        needs[mode] = {"gib": memory.total, "fits": None if largest is None else memory.fits(largest)}
    return needs


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ram_gib() -> float | None:
    with suppress(ValueError, OSError, AttributeError):  # not on Windows
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return None
