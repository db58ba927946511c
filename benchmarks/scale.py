"""What several processes gather, send and hold, beside the least that it could be.

    python benchmarks/scale.py [--quick] [--processes 4] [--shard-size 2] [--model storyboard] [--no-data]

A warm start, then one sampling phase and one update of GRPO (replay of the old log-probabilities, `--micro-batches` backward passes, the
optimizer's step), on a CPU over Gloo. For each: all-gathers and bytes that a process receives by them, reduce-scatters and all-reduces of
gradients and the bytes that it sends, counted where they are called.

Least possible: a sampling phase needs each weight once; a backward pass needs each weight of the layers once more than its forward pass,
because they were given up between; gradients of all micro-batches need to be added up over copies once. `alone`: the same work by one
process that holds everything, for the time; processes share the machine's cores here, so this is no speed-up.

`memory`: bytes of weights, gradients and moments that a process holds, beside its share of the whole; peak of what it held beside the
libraries. Then what opening and reading data costs (`benchmarks/data.py`). Prints tables, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from diptych.config import GRPOConfig, build
from diptych.document import Document, Text
from diptych.models import load_model
from diptych.runtime import end_process, gather, generator, joined_processes, rank, versions, world_size
from diptych.sampling.engine import sample
from diptych.tokens import collate
from diptych.training.grpo import accumulate_gradient, replay
from diptych.training.optim import make_optimizer, optimizer_step
from diptych.training.parallel import parallelize

KINDS = {"allgather": "all-gathers", "reduce_scatter": "reduce-scatters", "allreduce": "all-reduces"}
FEW = 64  # collectives of fewer numbers are counts, and left out


class Counted(TorchDispatchMode):
    """Collectives of tensors by kind, and bytes that a ring would carry for this process."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        kind = next((kind for name, kind in KINDS.items() if name in str(function)), None)
        if str(function).startswith("c10d.") and kind is not None:
            group = dist.ProcessGroup.unbox(next(a for a in arguments if isinstance(a, torch.ScriptObject)))
            tensors = [a for a in arguments if isinstance(a, torch.Tensor)] or arguments[0]
            largest = max(tensors, key=torch.Tensor.numel)
            if largest.numel() > FEW:
                self.calls[kind] += 1
                share = (group.size() - 1) / group.size()
                self.bytes[kind] += int(largest.nbytes * share * (2 if kind == "all-reduces" else 1))
        return function(*arguments, **(options or {}))


def held(tensors: Any) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def settings(shard_size: int, micro_batches: int, group: int) -> GRPOConfig:
    return build(
        GRPOConfig,
        {
            "output_dir": "unused", "max_steps": 1, "optim": {"lr": 1e-5}, "rewards": [{"name": "format"}], "num_generations": group,
            "prompts_per_step": world_size(), "micro_batch_size": group // micro_batches,
            "sampling": {"max_images": 1, "max_text_tokens": 16},
            "parallel": {"mode": "shard", "shard_size": shard_size},
        },
    )  # fmt: skip


def measured(name: str, shard_size: int, micro_batches: int, group: int) -> dict[str, Any]:
    """Of this process: collectives by phase, bytes, seconds."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = settings(shard_size, micro_batches, group)
    model = parallelize(load_model(name, dtype="bfloat16"), config, torch.device("cpu"))
    optimizer, schedule = make_optimizer(model, config.optim, 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    prompt = model.encode_prompt(Document((Text("a red ball ."),)))
    model.run(lambda m: m.dtype)  # the first pass sets torch's engine up
    found: dict[str, Any] = {"values": sum(p.numel() for p in trained), "units": len(model.sharding.units)}
    began = time.perf_counter()
    with Counted() as sampling:
        rollouts = sample(model, [prompt], config.sampling, num_generations=group, generator=generator(rank()))
    found["sampling seconds"] = time.perf_counter() - began
    batch = collate([rollout.row for rollout in rollouts])
    began = time.perf_counter()
    with Counted() as scoring:
        old = replay(model, batch, config, True)
    with Counted() as update:
        advantages = torch.randn(batch.text_ids.shape, generator=generator(1))
        accumulate_gradient(model, batch, torch.arange(len(batch)), old.logprobs, None, advantages, config)
        found["gradients"] = held(p.grad for p in trained if p.grad is not None)
        optimizer_step(model, optimizer, schedule, config.optim)
    found["update seconds"] = time.perf_counter() - began
    found["weights"] = held(trained)
    found["moments"] = held(value for state in optimizer.state.values() for name, value in state.items() if name != "step")
    found["peak MiB"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    for phase, counted in (("sampling", sampling), ("replay", scoring), ("update", update)):
        found[phase] = {"calls": dict(counted.calls), "bytes": dict(counted.bytes)}
    return found


def least(found: dict[str, Any], shard_size: int, copies: int, micro_batches: int) -> dict[str, dict[str, dict[str, int]]]:
    """Calls and bytes of each phase that nothing could do without."""
    once = int(found["values"] * 2 * (shard_size - 1) / shard_size)  # bfloat16
    gradients = int(found["values"] * 4 * (shard_size - 1) / shard_size)  # float32
    part = int(2 * found["values"] * 4 / shard_size * (copies - 1) / copies)
    units, passes = found["units"], micro_batches
    update = {
        "calls": {"all-gathers": 2 * units * passes, "reduce-scatters": units * passes, "all-reduces": units if copies > 1 else 0},
        "bytes": {"all-gathers": 2 * once * passes, "reduce-scatters": gradients * passes, "all-reduces": part},
    }
    replayed = {"calls": {"all-gathers": units * passes}, "bytes": {"all-gathers": once * passes}}
    return {"sampling": {"calls": {"all-gathers": units}, "bytes": {"all-gathers": once}}, "replay": replayed, "update": update}


def in_processes(arguments: argparse.Namespace, count: int, shard_size: int) -> list[dict[str, Any]]:
    passed = ["--inside", "--shard-size", str(shard_size), "--model", arguments.model, "--micro-batches", str(arguments.micro_batches)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), __file__, *passed]
    launch += ["--group", str(arguments.group)]
    done = subprocess.run(launch, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def show(everyone: list[dict[str, Any]], alone: dict[str, Any], shard_size: int, copies: int, micro_batches: int) -> dict[str, Any]:
    """A table of what the process with most did; the JSON of it."""
    worst = max(everyone, key=lambda one: sum(one["update"]["bytes"].values()))
    lowest = least(worst, shard_size, copies, micro_batches)
    print(f"{len(everyone)} processes, shards of {shard_size}, {micro_batches} micro-batches; MB that one process receives or sends")
    report: dict[str, Any] = {}
    for phase, counts in lowest.items():
        for kind in counts["calls"]:
            calls, size = worst[phase]["calls"].get(kind, 0), worst[phase]["bytes"].get(kind, 0)
            fewest, smallest = counts["calls"][kind], counts["bytes"][kind]
            print(f"{phase:9s} {kind:16s} {calls:5d} (least {fewest:4d})  {size / 1e6:9.2f} MB (least {smallest / 1e6:.2f})")
            report[f"{phase} {kind}"] = {"calls": calls, "least": fewest, "bytes": size, "least bytes": smallest}
    for item in ("weights", "gradients", "moments"):
        share = alone[item] / shard_size
        print(f"{item:9s} {max(one[item] for one in everyone) / 1e6:9.2f} MB a process; share {share / 1e6:.2f}")
        report[item] = {"bytes": max(one[item] for one in everyone), "share": share}
    for item in ("peak MiB", "sampling seconds", "update seconds"):
        report[item] = {"most": max(one[item] for one in everyone), "alone": alone[item]}
        print(f"{item:16s} {report[item]['most']:8.2f} (alone {alone[item]:.2f})")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer records to open and read")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--shard-size", type=int, default=2)
    parser.add_argument("--model", default="storyboard")
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--group", type=int, default=4, help="documents of a prompt")
    parser.add_argument("--no-data", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        torch.set_num_threads(1)
        with joined_processes():
            everyone = gather(measured(arguments.model, arguments.shard_size, arguments.micro_batches, arguments.group))
            if rank() == 0:
                print(json.dumps(everyone))
        end_process(0)
    (alone,) = in_processes(arguments, 1, 1)
    everyone = in_processes(arguments, arguments.processes, arguments.shard_size)
    copies = arguments.processes // arguments.shard_size
    report: dict[str, Any] = {
        "name": "scale",
        "processes": arguments.processes,
        "shard_size": arguments.shard_size,
        "model": arguments.model,
    }
    report |= show(everyone, alone, arguments.shard_size, copies, arguments.micro_batches)
    if not arguments.no_data:
        command = [sys.executable, str(Path(__file__).with_name("data.py")), *(["--quick"] if arguments.quick else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print("\n".join(done.stdout.splitlines()[:-1]))
        data = json.loads(done.stdout.splitlines()[-1])
        report["data"] = {name: data[name] for name in ("start_up", "reading", "ratio", "limit")}
    print(json.dumps({**report, "versions": versions()}))


if __name__ == "__main__":
    main()
