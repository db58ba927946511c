"""Run by `test_parallel.py` under torchrun: a warm-up that may take so many MiB beside what the libraries hold. Arguments: recipe, MiB."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

from diptych.config import WarmupConfig, load_config
from diptych.runtime import end_process, joined_processes
from diptych.training.warmup import warmup


def private() -> int:
    """Bytes of memory that is the process's own (what RLIMIT_DATA counts)."""
    found = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined_processes():
        config = load_config(WarmupConfig, sys.argv[1])
        limit = private() + int(sys.argv[2]) * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        warmup(config)
    end_process(0)
