"""Run by `test_processes.py` under torchrun: `diptych grpo RECIPE` in which the second process meets a fault. Arguments: fault, recipe."""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter

import diptych.training.experience as experience
import diptych.training.grpo as grpo
from diptych import runtime
from diptych.cli import main
from diptych.training.grpo import ParityError

SECOND = os.environ.get("RANK") == "1"


def raises(error: Exception) -> Any:
    def fault(*_: Any, **__: Any) -> Any:
        raise error

    return fault


def not_finite(*arguments: Any, right: Any = grpo.token_advantages) -> torch.Tensor:
    note_time()
    return right(*arguments) * float("nan")


def note_time() -> None:
    """When the fault came up, as the age of a file."""
    if "FAULT_AT" in os.environ:
        Path(os.environ["FAULT_AT"]).touch()


def full_disk(writer: Any, *arguments: Any, right: Any = FileSystemWriter.write_data, calls: list[int] = []) -> Any:  # noqa: B006
    """At the second checkpoint."""
    calls.append(1)
    if len(calls) < 2:
        return right(writer, *arguments)
    note_time()
    raise OSError(errno.ENOSPC, "No space left on device")


def other_code() -> str:
    note_time()
    return "other"


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "parity": (grpo, "check_parity", raises(ParityError("sampled and replayed differ"))),
    "not finite": (grpo, "token_advantages", not_finite),
    "bad record": (experience, "prompt_row", raises(ValueError("half of a character"))),
    "bug": (grpo, "optimizer_step", raises(KeyError("a fault of ours"))),
    "bug while sampling": (grpo, "collate", raises(KeyError("a fault of ours"))),
    "full disk": (FileSystemWriter, "write_data", full_disk),
    "other code": (runtime, "_code", other_code),
    "none": (grpo, "world_size", grpo.world_size),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    fault, recipe = sys.argv[1:3]
    if SECOND and fault in FAULTS:
        setattr(*FAULTS[fault])
    if SECOND and fault == "late":
        time.sleep(60)
    changes = ["--output_dir", os.environ["OTHER_FOLDER"]] if SECOND and fault == "other folder" else []
    if SECOND and fault == "other settings":
        changes = ["--optim.lr", "0.5"]
    if SECOND and fault == "other machine":
        os.environ["LOCAL_RANK"] = "0"
        os.chdir(os.environ["OTHER_FOLDER"])
    sys.argv = ["diptych", "grpo", recipe, *changes]
    main()
