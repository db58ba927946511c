"""Kills processes of a training at random (-9) while torchrun starts it again, and compares its weights with those of an undisturbed one.

Prints a JSON line. `python tests/random_kills.py --kills 20` takes some minutes; `test_restarts.py` runs it with fewer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from diptych.config import GRPOConfig, build, to_yaml
from diptych.runs import read_jsonl

TESTS = Path(__file__).parent


def settings(model: str, out: Path, steps: int) -> GRPOConfig:
    return build(
        GRPOConfig,
        {
            "model": model, "output_dir": str(out), "max_steps": steps, "save_steps": 1, "num_threads": 1, "device": "cpu",
            "optim": {"lr": 1e-4}, "sampling": {"max_images": 1, "max_text_tokens": 6}, "parallel": {"mode": "shard"},
            "prompts": [{"name": "storyboard:prompts"}], "rewards": [{"name": "toy_rewards:per_step"}], "num_generations": 2,
            "prompts_per_step": 2, "text": {"beta": 0.01}, "image": {"beta": 0.01},
        },
    )  # fmt: skip


def launch(config: GRPOConfig, path: Path, restarts: int, processes: int) -> subprocess.Popen[bytes]:
    path.write_text(to_yaml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1", "-m", "diptych", "grpo", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def workers(launcher: int) -> list[int]:
    """Its child processes."""
    found = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(process) for process in found]


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    folder = out / "checkpoints" / f"step_{step}" / "model"
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", default="storyboard")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draws, steps = random.Random(asked.seed), 2 * asked.kills
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        if launch(settings(asked.model, whole, steps), Path(folder) / "whole.yaml", 0, asked.processes).wait(1800):
            raise SystemExit("the undisturbed training failed")
        times = [line["step_time"] for line in read_jsonl(whole / "metrics.jsonl")]
        began, kills, during_saving = time.monotonic(), 0, 0
        process = launch(settings(asked.model, killed, steps), Path(folder) / "killed.yaml", 3 * asked.kills, asked.processes)
        seen = 0
        while kills < asked.kills and process.poll() is None:
            lines = len(read_jsonl(killed / "metrics.jsonl"))
            alive = workers(process.pid)
            if lines <= seen or len(alive) < asked.processes:  # each life does one step at least
                time.sleep(0.01)
                continue
            time.sleep(draws.uniform(0, 1.5 * max(times[1:])))
            during_saving += any((killed / "checkpoints").glob(".tmp-*"))
            seen = max(seen, len(read_jsonl(killed / "metrics.jsonl")))
            try:
                os.kill(draws.choice(alive), signal.SIGKILL)
                kills += 1
            except ProcessLookupError:
                pass
        code = process.wait(1800)
        one, other = weights(whole, steps), weights(killed, steps)
        same = bool(one) and one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
        facts = {"kills": kills, "while saving": during_saving, "exit code": code, "steps": steps, "processes": asked.processes}
        print(json.dumps({**facts, "same weights": same, "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
