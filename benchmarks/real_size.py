"""Memory and time of real backbones: sample illustrated documents, score them, take one LoRA GRPO step.

    python benchmarks/real_size.py --model FOLDER_OR_HUB_ID           # a released checkpoint
    python benchmarks/real_size.py --size janus-pro-7b                # random weights in the release's size, nothing downloaded
    python benchmarks/real_size.py --quick                            # toy sizes of all families, on any machine

Prints a table, then one JSON line. Random weights do not decide to draw: every document is made to draw `--images` pictures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _shapes import SIZES, documents_of, random_model
from toy_checkpoints import MAKERS

from diptych.config import GRPOConfig, LoraConfig, build
from diptych.doctor import DocumentSize, Sizes, estimate
from diptych.document import Document, Text
from diptych.models import UnifiedModel, load_model
from diptych.models.loading import enable_checkpointing
from diptych.models.lora import attach_lora
from diptych.runtime import pick_device, versions
from diptych.sampling.engine import sample
from diptych.sampling.logprobs import score
from diptych.tokens import collate
from diptych.training.grpo import accumulate_gradient, micro_batches
from diptych.training.optim import make_optimizer, optimizer_step

GIB = 2**30


def timed(device: torch.device, run: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, seconds, and peak memory in GiB on the device (0 on a CPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return result, time.perf_counter() - began, torch.cuda.max_memory_allocated(device) / GIB
    return result, time.perf_counter() - began, 0.0


def measure(name: str, make: Callable[[], UnifiedModel], device: torch.device, group: int, images: int, words: int) -> dict[str, Any]:
    model, load_seconds, _ = timed(device, lambda: make().to(device).eval())
    stated = estimate(Sizes.of(model), DocumentSize(num_images=images, num_generations=group, text_tokens=words * images + 32), "lora")
    config = build(
        GRPOConfig,
        {
            "output_dir": "unused", "max_steps": 1, "optim": {"lr": 1e-5}, "rewards": [{"name": "format"}], "num_generations": group,
            "prompts_per_step": 1, "micro_batch_size": 1, "sampling": {"max_images": images, "max_text_tokens": words + 1},
        },
    )  # fmt: skip
    attach_lora(model, LoraConfig(), {"source": name})
    enable_checkpointing(model)
    prompt = model.encode_prompt(Document((Text("tell me how to fold a paper boat"),)))

    def rollout() -> Any:
        with documents_of(model, images, words):
            return sample(model, [prompt], config.sampling, num_generations=group, generator=torch.Generator().manual_seed(0))

    rollouts, sample_seconds, sample_peak = timed(device, rollout)
    batch = collate([r.row for r in rollouts]).to(device)
    rows = torch.arange(len(batch))

    @torch.no_grad()
    def replay() -> torch.Tensor:
        return torch.cat([score(model, batch[index], config.sampling).logprobs for index in micro_batches(rows, 1)])

    old, score_seconds, score_peak = timed(device, replay)
    advantages = torch.randn(batch.text_ids.shape, generator=torch.Generator().manual_seed(1)).to(device)
    optimizer, schedule = make_optimizer(model, config.optim, 1)

    def update() -> dict[str, float]:
        sums = accumulate_gradient(model, batch, rows, old, None, advantages, config)
        return sums | optimizer_step(model, optimizer, schedule, config.optim)

    sums, update_seconds, update_peak = timed(device, update)
    codes = int(batch.choice_mask[batch.image_mask].sum())
    return {
        "model": name, "documents": group, "images": images, "positions": int(batch.attention_mask.sum()), "codes": codes,
        "load_seconds": load_seconds, "sample_seconds": sample_seconds, "score_seconds": score_seconds, "update_seconds": update_seconds,
        "codes_per_second": codes / sample_seconds, "sample_peak_gib": sample_peak, "score_peak_gib": score_peak,
        "update_peak_gib": update_peak, "stated_lora_gib": stated.total, "first_ratio_gap": sums["image/ratio_gap"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder or hub id")
    parser.add_argument("--size", choices=SIZES, help="random weights in this size")
    parser.add_argument("--quick", action="store_true", help="toy sizes of all families")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--words", type=int, default=48, help="text tokens before each picture")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device, found = pick_device(arguments.device), []
    with tempfile.TemporaryDirectory() as scratch:
        makers: dict[str, Callable[[], UnifiedModel]] = {}
        if arguments.model:
            makers[arguments.model] = lambda: load_model(arguments.model)
        elif arguments.size:
            makers[arguments.size] = lambda: random_model(arguments.size, device, Path(scratch) / "toy")
        else:
            for name, maker in MAKERS.items():
                size = 32 if name == "emu3" else None
                makers[f"toy {name}"] = lambda n=name, m=maker, s=size: load_model(m(Path(scratch) / n), image_size=s)  # type: ignore[misc]
        for name, make in makers.items():
            row = measure(name, make, device, arguments.group, arguments.images, 8 if arguments.quick else arguments.words)
            found.append(row)
            stages = [
                f"{stage} {row[f'{stage}_seconds']:7.2f} s, {row[f'{stage}_peak_gib']:5.1f} GiB" for stage in ("sample", "score", "update")
            ]
            print(f"{name:<18} {'   '.join(stages)} (stated {row['stated_lora_gib']:.1f})   {row['codes_per_second']:6.0f} codes/s sampled")
    print(json.dumps({"name": "real_size", "device": str(device), "rows": found, "versions": versions()}))


if __name__ == "__main__":
    main()
