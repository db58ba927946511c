"""Run by `test_processes.py` under torchrun: `diptych grpo RECIPE` in which the second process meets a fault. Arguments: fault, recipe."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

import diptych.training.experience as experience
import diptych.training.grpo as grpo
from diptych.cli import main
from diptych.training.grpo import ParityError

SECOND = os.environ.get("RANK") == "1"


def raises(error: Exception) -> Any:
    def fault(*_: Any, **__: Any) -> Any:
        raise error

    return fault


def not_finite(*arguments: Any, right: Any = grpo.token_advantages) -> torch.Tensor:
    return right(*arguments) * float("nan")


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "parity": (grpo, "check_parity", raises(ParityError("sampled and replayed differ"))),
    "not finite": (grpo, "token_advantages", not_finite),
    "bad record": (experience, "prompt_row", raises(ValueError("half of a character"))),
    "bug": (grpo, "optimizer_step", raises(KeyError("a fault of ours"))),
    "bug while sampling": (grpo, "collate", raises(KeyError("a fault of ours"))),
    "none": (grpo, "world_size", grpo.world_size),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    fault, recipe = sys.argv[1:3]
    if SECOND and fault in FAULTS:
        setattr(*FAULTS[fault])
    changes = ["--output_dir", os.environ["OTHER_FOLDER"]] if SECOND and fault == "other folder" else []
    if SECOND and fault == "other machine":
        os.environ["LOCAL_RANK"] = "0"
        os.chdir(os.environ["OTHER_FOLDER"])
    sys.argv = ["diptych", "grpo", recipe, *changes]
    main()
