"""Run by `test_training.py` under torchrun: the gradient of one batch, shared by the processes. Arguments: model, output."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from test_training import grpo_config, warmup_config
from torch.distributed.tensor import DTensor

from diptych.config import MixtureSource
from diptych.data import Mixture
from diptych.models import UnifiedModel, load_model
from diptych.runtime import generator, joined_processes, rank, world_size
from diptych.sampling.engine import sample
from diptych.tokens import TokenBatch, collate
from diptych.training.grpo import accumulate_gradient, add_supervised_gradient, replay
from diptych.training.parallel import parallelize
from diptych.training.supervised import encode, supervised_gradient

PTX = {"sources": [{"name": "storyboard:understanding", "weight": 1}], "coef": 0.5, "batch_size": 5}


def gradient(model: UnifiedModel) -> tuple[torch.Tensor, list[str]]:
    """All of it in one row, and the names of weights that have none."""
    if model.sharding is not None:
        model.sharding.drop_unused()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    values = [torch.zeros(p.shape) if p.grad is None else whole(p.grad) for p in model.parameters() if p.requires_grad]
    return torch.cat([value.flatten() for value in values]), [name for name, value in found.items() if value is None]


def share(batch: TokenBatch) -> TokenBatch:
    return batch[torch.arange(rank(), len(batch), world_size())]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(folder: Path) -> dict[str, tuple[torch.Tensor, list[str]]]:
    """Of a warm-up batch and of a GRPO batch with all its terms, summed over processes."""
    config = warmup_config(folder, Path("unused"))
    model = parallelize(load_model(folder), config, torch.device("cpu"))
    batch = encode(model, Mixture(config.sources, 0).batch(0, 7), 0.1, 0, 0)
    supervised_gradient(model, share(batch), text_weight=1.0, image_weight=0.5, micro_batch_size=2)
    found = {"warmup": gradient(model)}
    model.zero_grad()
    words = Mixture([MixtureSource(name="storyboard:understanding")], 0).batch(0, 4)  # whose answers have no pictures
    supervised_gradient(model, share(encode(model, words, 0.0, 0, 0)), text_weight=1.0, image_weight=1.0)
    found["words"] = gradient(model)

    changes = {"text": {"beta": 0.1, "entropy_coef": 0.01}, "image": {"beta": 0.2, "weight": 0.5}, "micro_batch_size": 2}
    grpo = grpo_config(folder, Path("unused"), ptx=PTX, **changes)
    model = parallelize(load_model(folder), grpo, torch.device("cpu"))
    prompts = [model.encode_prompt(r.prompt) for r in Mixture(grpo.prompts, 0).batch(0, 2)]
    rollouts = sample(model, prompts, grpo.sampling, num_generations=4, generator=generator(0))  # the same in all processes
    batch = collate([r.row for r in rollouts])
    old = replay(model, batch, grpo, True).logprobs + 0.01
    advantages = torch.randn(batch.text_ids.shape, generator=generator(1))
    mine = torch.arange(rank(), len(batch), world_size())
    accumulate_gradient(model, batch, mine, old, old - 0.05, advantages, grpo)
    assert grpo.ptx is not None
    add_supervised_gradient(model, Mixture(grpo.ptx.sources, 0), grpo, 0)
    found["grpo"] = gradient(model)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined_processes():
        result = gradients(Path(sys.argv[1]))
        if rank() == 0:
            torch.save({**result, "world_size": world_size()}, sys.argv[2])
