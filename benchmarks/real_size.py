"""Memory and time of real backbones: sample illustrated documents, score them, take one LoRA GRPO step.

    python benchmarks/real_size.py --model FOLDER_OR_HUB_ID           # a released checkpoint
    python benchmarks/real_size.py --size janus-pro-7b                # random weights in the release's size, nothing downloaded
    python benchmarks/real_size.py --quick                            # toy sizes of all families, on any machine

Prints a table, then one JSON line. Random weights do not decide to draw: every document is made to draw `--images` pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from diptych.config import GRPOConfig, LoraConfig, build
from diptych.doctor import DocumentSize, Sizes, estimate
from diptych.document import Document, Text
from diptych.grpo import accumulate_gradient, micro_batches
from diptych.logprobs import score
from diptych.models import UnifiedModel, load_model
from diptych.models.loading import enable_checkpointing
from diptych.models.lora import attach_lora
from diptych.models.vila_u.config import VisionConfig
from diptych.models.vila_u.model import VilaUModel
from diptych.models.vila_u.vision import Projector, VisionTower
from diptych.optim import make_optimizer, optimizer_step
from diptych.runtime import pick_device, versions
from diptych.sampling.engine import sample
from diptych.tokens import collate

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from toy_checkpoints import MAKERS, VILA_U  # tokenizers and layouts of the families

GIB = 2**30
JANUS_VISION = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 16,
    "num_image_tokens": 576,
}
JANUS_VQ = {
    "num_embeddings": 16384,
    "embed_dim": 8,
    "latent_channels": 256,
    "base_channels": 128,
    "channel_multiplier": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
}
# text_config of each release; the rest of a Janus follows its width
TEXT = {
    "janus-pro-1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16},
    "janus-pro-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30, "num_attention_heads": 32},
}  # fmt: skip
SIZES = (*TEXT, "vila-u-7b")


def random_model(size: str, device: torch.device, folder: Path) -> UnifiedModel:
    """Random bfloat16 weights of a release's size, made on the device; tokenizer and templates are a toy's."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return random_vila_u(device) if size == "vila-u-7b" else random_janus(TEXT[size], device, folder)
    finally:
        torch.set_default_dtype(torch.float32)


def random_janus(text: dict[str, int], device: torch.device, folder: Path) -> UnifiedModel:
    toy = load_model(MAKERS["janus"](folder))
    config = toy.hf.config
    width = text["hidden_size"]
    heads = text["num_attention_heads"]
    sizes: dict[str, dict[str, Any]] = {
        "text_config": {
            **text,
            "num_key_value_heads": heads,
            "vocab_size": 102400,
            "max_position_embeddings": 16384,
            "head_dim": width // heads,
        },
        "vision_config": {**JANUS_VISION, "projection_dim": width},
        "vq_config": {**JANUS_VQ, "num_patches": 24, "projection_dim": width, "image_token_embed_dim": width},
    }
    for part, values in sizes.items():
        for name, value in values.items():
            setattr(getattr(config, part), name, value)
    with device:
        hf = type(toy.hf)(config)
    hf.generation_config = toy.hf.generation_config
    return type(toy)(hf, toy.tokenizer, toy.image_processor, folder)


def random_vila_u(device: torch.device) -> UnifiedModel:
    """As `spec`: Llama-2 7B with linear RoPE scaling, SigLIP large, a codebook of 16384, a depth transformer of width 2560."""
    toy = load_model(VILA_U)
    llm = LlamaConfig(
        vocab_size=32004, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=4096, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    )  # fmt: skip
    vision = VisionConfig.from_dicts(
        {
            "rqvaesiglip": {
                "embed_dim": 1024, "n_embed": 16384, "latent_shape": [16, 16, 1024], "code_shape": [16, 16, 4], "shared_codebook": True,
                "ddconfig": {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "resolution": 256,
                             "z_channels": 256},
            },
            "rqtransformer": {
                "block_size": [16, 16, 4], "input_embed_dim_1": 1024, "input_embed_dim_2": 4096, "embed_dim": 2560, "vocab_size": 16384,
                "head": {"n_layer": 6, "block": {"n_head": 40}},
            },
        }
    )  # fmt: skip
    with device:
        parts = LlamaForCausalLM(llm), VisionTower(vision), Projector(1024, 4096)
    parts[1].rqvaesiglip.siglip_model.fill_position_ids(device)
    return VilaUModel(*parts, toy.tokenizer, VILA_U)


def draw_always(model: UnifiedModel, images: int, words: int) -> None:
    """`images` times: some words, then a picture; then the end. Weights stay as they are; only which text token comes is decided."""
    plain = model.encode_text("a")[-1]
    plan = ([plain] * words + [model.image_spec.begin_id]) * images + [model.eos_id]
    state = {"at": 0}
    head = model.text_logits

    def decided(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)
        if not torch.is_grad_enabled() and state["at"] < len(plan) and hidden.ndim == 2 and state.get("sampling"):
            logits = logits.index_fill(-1, torch.tensor([plan[state["at"]]], device=logits.device), 1e4)
            state["at"] += 1
        return logits

    model.text_logits = decided  # type: ignore[method-assign]
    model._plan = state  # type: ignore[attr-defined]


def timed(device: torch.device, run: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, seconds, and peak memory in GiB on the device (0 on a CPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return result, time.perf_counter() - began, torch.cuda.max_memory_allocated() / GIB
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
    draw_always(model, images, words)
    prompt = model.encode_prompt(Document((Text("tell me how to fold a paper boat"),)))

    def rollout() -> Any:
        model._plan.update(at=0, sampling=True)  # type: ignore[attr-defined]
        found = sample(model, [prompt], config.sampling, num_generations=group, generator=torch.Generator().manual_seed(0))
        model._plan["sampling"] = False  # type: ignore[attr-defined, index]
        return found

    rollouts, sample_seconds, sample_peak = timed(device, rollout)
    batch = collate([r.row for r in rollouts]).to(device)
    rows = torch.arange(len(batch))

    @torch.no_grad()
    def replay() -> torch.Tensor:
        parts = [score(model, batch[index], config.sampling).logprobs for index in micro_batches(batch, rows, 1)]
        return torch.cat(parts)[micro_batches(batch, rows, len(rows))[0].argsort()]

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
