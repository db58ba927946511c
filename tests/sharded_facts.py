"""Run by `test_parallel.py` under torchrun: what a process holds, and what is gathered. Prints JSON. Argument: shard_size."""

from __future__ import annotations

import json
import sys

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from diptych.config import OptimConfig, SamplingParams, WarmupConfig, build
from diptych.data import Mixture
from diptych.models import load_model
from diptych.runtime import end_process, gather, generator, joined_processes, rank
from diptych.sampling.engine import sample
from diptych.training.optim import make_optimizer, optimizer_step
from diptych.training.parallel import parallelize
from diptych.training.supervised import encode, supervised_gradient


class Counted(TorchDispatchMode):
    """Counts what is gathered."""

    gathers = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.gathers += "allgather" in str(function)
        return function(*arguments, **(options or {}))


def held(tensors) -> int:
    return sum(t.to_local().numel() * t.element_size() if isinstance(t, DTensor) else t.numel() * t.element_size() for t in tensors)


def whole(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def facts(shard_size: int) -> dict[str, float]:
    parallel = {"mode": "shard", "shard_size": shard_size}
    optim = OptimConfig(lr=1e-4)
    sources = [{"name": "storyboard:interleaved"}]
    common = {"output_dir": "unused", "max_steps": 1, "optim": optim.model_dump(), "sources": sources}
    config = build(WarmupConfig, {**common, "parallel": parallel})
    model = parallelize(load_model("storyboard", dtype="bfloat16"), config, torch.device("cpu"))
    optimizer, schedule = make_optimizer(model, optim, 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = {"weights": held(trained) / whole(trained), "float32": float(all(p.dtype == torch.float32 for p in trained))}
    records = Mixture(config.sources, 0).batch(0, 4)
    supervised_gradient(model, encode(model, records, 0.0, 0, 0), text_weight=1.0, image_weight=1.0)
    gradients = [p.grad for p in trained if p.grad is not None]
    found["gradients"] = held(gradients) / whole(gradients)
    optimizer_step(model, optimizer, schedule, optim)
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    found["moments"] = held(moments) / whole(moments)
    prompts = [model.encode_prompt(record.prompt) for record in records[: 1 + rank()]]  # one process has more to write than another
    with Counted() as counted:
        sample(model, prompts, SamplingParams(max_text_tokens=12, max_images=1), generator=generator(0))
    found["gathers"] = counted.gathers / len(model.sharding.units)
    found["sampled in bfloat16"] = float(model.run(lambda m: m.dtype) == torch.bfloat16)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined_processes():
        everyone = gather(facts(int(sys.argv[1])))
        if rank() == 0:
            print(json.dumps(everyone))
    end_process(0)
