"""Run by `test_parallel.py` under torchrun: trainings one after the other in one group of processes. Arguments: recipes."""

from __future__ import annotations

import sys

from diptych.config import GRPOConfig, WarmupConfig, load_config
from diptych.runtime import end_process, joined_processes
from diptych.training.grpo import grpo
from diptych.training.warmup import warmup

if __name__ == "__main__":
    with joined_processes():
        for recipe in sys.argv[1:]:
            if "grpo" in recipe.rsplit("/", 1)[-1]:
                grpo(load_config(GRPOConfig, recipe))
            else:
                warmup(load_config(WarmupConfig, recipe))
    end_process(0)
