"""The checks of docs/gpu_todo.md that a single GPU can do in ten minutes, in order of worth, each in a process of its own.

    python benchmarks/gpu_check.py [--seconds 570] [--only NAME ...] [--out FOLDER]
    python benchmarks/gpu_check.py --quick        # on any machine, at toy size: that every check runs

A check that has no time left is skipped and said to be. Output of each goes to FOLDER/NAME.txt. Prints a line a check as it ends, then one
JSON line; exits with 1 where one failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from diptych.runtime import versions

HERE = Path(__file__).parent
LEAST = 20  # seconds that a check must have to be begun


@dataclasses.dataclass(frozen=True)
class Check:
    """`command` on a GPU, `quick` anywhere; `seconds`: the most that it may take. OUT in a command is a folder of its own."""

    name: str
    command: tuple[str, ...]
    quick: tuple[str, ...]
    seconds: int


def script(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, str(HERE / f"{name}.py"), *arguments)


def training(*changes: str) -> tuple[str, ...]:
    """Three steps of GRPO on the packaged model; parity stops it where the scorer leaves the sampler."""
    common = ("--model=storyboard", "--max_steps=3", "--prompts_per_step=4", "--num_minibatches=1", "--output_dir=OUT", "--save_steps=3")
    return (sys.executable, "-m", "diptych", "grpo", "grpo", *common, *changes)


TESTS = (sys.executable, "-m", "pytest", "-q", str(HERE.parent / "tests"))
SMALL = ("--num_generations=2", "--device=cpu", "--num_threads=1")
BFLOAT16 = ("--dtype=bfloat16", "--parity_bound=1")
DRAWING = (sys.executable, "-m", "diptych", "grpo", "text_to_image", "--output_dir=OUT")
CHECKS = (
    Check("tests marked gpu", (*TESTS, "-m", "gpu"), (*TESTS, "-m", "gpu", "--collect-only"), 120),
    Check("grpo in float32", training("--device=cuda"), training(*SMALL), 60),
    Check("grpo in bfloat16, weights in float32", training("--device=cuda", *BFLOAT16), training(*SMALL, *BFLOAT16), 60),
    Check("grpo sharded", training("--device=cuda", "--parallel.mode=shard"), training(*SMALL, "--parallel.mode=shard"), 60),
    Check("text to image", (*DRAWING, "--max_steps=3", "--device=cuda"), (*DRAWING, "--max_steps=1", "--prompts_per_step=2", *SMALL), 60),
    Check(
        "real size 1b", script("real_size", "--size", "janus-pro-1b", "--images", "2"), script("real_size", "--quick", "--group", "2"), 150
    ),
    Check("rollout 1b", script("rollout", "--model", "janus-pro-1b", "--prompts", "8", "--images", "1"), script("rollout", "--quick"), 150),
    Check("update 1b", script("update", "--model", "janus-pro-1b", "--prompts", "4", "--images", "1"), script("update", "--quick"), 150),
)


def run(check: Check, quick: bool, seconds: float, folder: Path) -> dict[str, object]:
    """Whether it passed, how long it took, and the last line that it said."""
    own = folder / check.name.replace(" ", "_").replace(",", "")
    own.mkdir(parents=True, exist_ok=True)
    command = [
        str(own / "run") if part == "OUT" else part.replace("=OUT", f"={own / 'run'}") for part in (check.quick if quick else check.command)
    ]
    began = time.perf_counter()
    with (own.with_suffix(".txt")).open("w") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=seconds).returncode
            result = "passed" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            result = f"failed: not done in {seconds:.0f} s"
    said = [line for line in own.with_suffix(".txt").read_text(errors="replace").splitlines() if line.strip()]
    return {"name": check.name, "result": result, "seconds": round(time.perf_counter() - began, 1), "said": said[-1] if said else ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes, on any machine")
    parser.add_argument("--seconds", type=float, default=570, help="for all checks together")
    parser.add_argument("--only", nargs="*", choices=[check.name for check in CHECKS], help="these checks alone")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not arguments.quick and not torch.cuda.is_available():
        parser.error("no GPU is here; --quick runs every check at toy size on a CPU")
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="gpu_check_"))
    began, found = time.perf_counter(), []
    for check in CHECKS:
        if arguments.only and check.name not in arguments.only:
            continue
        left = arguments.seconds - (time.perf_counter() - began)
        if left < LEAST:
            row: dict[str, object] = {"name": check.name, "result": "skipped: no time left", "seconds": 0.0, "said": ""}
        else:
            row = run(check, arguments.quick, min(left, 3 * check.seconds if arguments.quick else check.seconds), folder)
        found.append(row)
        print(f"{row['name']:<40} {row['result']:<32} {row['seconds']:>7} s", flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(
        json.dumps(
            {"name": "gpu_check", "quick": arguments.quick, "device": device, "rows": found, "folder": str(folder), "versions": versions()}
        )
    )
    sys.exit(any(str(row["result"]).startswith("failed") for row in found))


if __name__ == "__main__":
    main()
