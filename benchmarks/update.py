"""How long one GRPO update takes, against the same update without packing and chunking, and against TRL's on text alone.

    python benchmarks/update.py [--model storyboard|janus-100m|janus-pro-1b|janus-pro-7b] [--quick] [--trl]

Both sides compute the same loss of the same documents (asserted) with exact guidance, backward pass and optimizer step included.
The baseline pads every row to the longest of its micro-batch, computes a prompt again for each document and the prefix of the
other branch of guidance again for each picture, and holds all logits at once.

`--trl`: text-only documents on a plain Llama, against TRL's own `GRPOTrainer` (`pip install trl`), with its loss `dapo`, no KL.

Prints a table, then one JSON line. `ratio`: baseline time / our time, median over interleaved repeats. `limit`: seconds that the
multiplications of our side alone take at the matrix rate measured here.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from _shapes import SIZES, benchmark_model, clock_of, matrix_rate, plain_layers, prompts
from torch import Tensor

from diptych.config import GRPOConfig, SamplingParams, build
from diptych.models import UnifiedModel
from diptych.models.loading import enable_checkpointing
from diptych.runtime import pick_device, versions
from diptych.sampling import logprobs
from diptych.tokens import TokenBatch, TokenRow, collate
from diptych.training import grpo
from diptych.training.optim import make_optimizer, optimizer_step


def documents(model: UnifiedModel, num_prompts: int, group: int, images: int, words: int, prompt_length: int) -> TokenBatch:
    """Prompts as in `rollout.py`; answers of 1 to `images` pictures, each after `words` / 2 to `words` * 3 / 2 tokens of text."""
    spec, generator = model.image_spec, torch.Generator().manual_seed(1)
    legal = torch.tensor(sorted(set(range(model.vocab_size)) - set(model.forbidden_text_ids()) - {spec.begin_id, model.eos_id}))
    rows = []
    for prompt in prompts(model, num_prompts, prompt_length):
        for _ in range(group):
            parts = [prompt]
            for step in range(int(torch.randint(1, images + 1, (), generator=generator)) if images else 1):
                length = int(torch.randint(words // 2, words * 3 // 2 + 1, (), generator=generator))
                ids = legal[torch.randint(len(legal), (length,), generator=generator)]
                parts.append(TokenRow.text(ids.tolist(), spec.depth, chosen=True, step=2 * step))
                if images:
                    codes = torch.randint(spec.codebook_size, (spec.num_positions, spec.depth), generator=generator)
                    parts.append(spec.row(codes, chosen=True, step=2 * step + 1, begin_step=2 * step))
            rows.append(TokenRow.concat([*parts, TokenRow.text([model.eos_id], spec.depth, chosen=True, step=2 * step + 1)]))
    return collate(rows)


def padded_states(model: UnifiedModel, batch: TokenBatch, guidance: SamplingParams | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What `logprobs._states` gives, by the plain way: whole rows, padded; the other branches in a batch of their own."""
    size, width = batch.text_ids.shape
    hidden = model.backbone(model.embed(batch), batch.position_ids, batch.attention_mask).flatten(0, 1)
    place = torch.arange(size * width, device=batch.device).view(size, width)
    if guidance is None:
        return hidden, place, []
    branches = [branch for row in batch.to("cpu").rows() for branch in logprobs.image_branches(model, row, guidance)]
    offsets = torch.tensor(model.image_spec.code_offsets) - 1
    states, at = [hidden], []
    for branch in zip(*branches, strict=True):
        other = collate([TokenRow.concat([prefix, drawn]) for prefix, drawn in branch]).to(batch.device)
        first, width = sum(map(len, states)), other.text_ids.shape[1]
        at.append(torch.cat([first + i * width + len(prefix) + offsets for i, (prefix, _) in enumerate(branch)]).to(batch.device))
        states.append(model.backbone(model.embed(other), other.position_ids, other.attention_mask).flatten(0, 1))
    return torch.cat(states), place, at


class Update:
    """One optimizer step on a batch of documents."""

    def __init__(self, model: UnifiedModel, batch: TokenBatch, config: GRPOConfig) -> None:
        self.model, self.batch, self.config = model, batch.to(model.device), config
        self.rows = torch.arange(len(batch))
        self.optimizer, self.schedule = make_optimizer(model, config.optim, 1000)
        generator = torch.Generator().manual_seed(2)
        self.advantages = torch.randn(len(batch), 1, generator=generator).expand(batch.text_ids.shape).to(model.device)
        replayed = grpo.replay(model, self.batch, config, True).logprobs.cpu()
        # at ratio 1 a clipped loss does not depend on the logits, and comparing the sides would prove nothing
        self.old = (replayed + 0.1 * torch.randn(replayed.shape, generator=generator)).to(model.device)

    def ours(self) -> float:
        sums = grpo.accumulate_gradient(self.model, self.batch, self.rows, self.old, None, self.advantages, self.config)
        optimizer_step(self.model, self.optimizer, self.schedule, self.config.optim)
        return sums["loss"]

    def plain(self) -> float:
        states, chunks = mock.patch.object(logprobs, "_states", padded_states), mock.patch.object(logprobs, "CHUNK_LOGITS", 2**60)
        with states, chunks, mock.patch.object(logprobs, "use"), plain_layers(self.model):
            return self.ours()


def operations(update: Update) -> float:
    """Multiplications and additions of our side's forward and backward pass: decoder and heads; attention left out."""
    model, batch = update.model, update.batch
    seen = []
    right = model.backbone
    guidance = update.config.sampling if batch.image_mask.any() else None
    with torch.no_grad(), mock.patch.object(model, "backbone", lambda embeds, *a: (seen.append(embeds.shape[1]), right(embeds, *a))[1]):
        for index in grpo.micro_batches(update.rows, update.config.micro_batch_size):
            logprobs._states(model, batch[index], guidance)
    decoder = sum(p.numel() for name, p in model.language_model.named_parameters() if ".layers." in f".{name}" and p.ndim == 2)
    text_head = model.vocab_size * int(model.language_model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    return 6.0 * (decoder * sum(seen) + text_head * int((batch.completion_mask & batch.text_mask).sum()))


def compare(
    sides: dict[str, Callable[[], float]], repeats: int, device: torch.device, dtype: torch.dtype, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each side, interleaved; the first round warms up. Their losses, of the order of 0.1, agree as far as the dtype goes."""
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(-1, repeats):
        losses = {}
        for name, run in sides.items():
            began = clock()
            losses[name] = run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat >= 0:
                found[name].append(clock() - began)
        first, *others = losses.values()
        assert all(abs(first - other) <= tolerance for other in others), losses
    return found


def trl_update(update: Update, checkpointing: bool) -> Callable[[], float]:
    """TRL's own update of the same tokens, on a Llama with the same weights."""
    from _trl import TRLUpdate
    from transformers import LlamaForCausalLM

    model: Any = update.model
    llama = LlamaForCausalLM(model.hf.config.text_config).to(model.device, model.dtype)
    llama.model.load_state_dict(model.language_model.state_dict())
    llama.lm_head.load_state_dict(model.hf.lm_head.state_dict())
    rows = update.batch.to("cpu").rows()
    prompts = [row.text_ids[: row.prompt_length].tolist() for row in rows]
    completions = [row.text_ids[row.prompt_length :].tolist() for row in rows]
    old = [values[row.prompt_length : len(row), 0].cpu() for values, row in zip(update.old, rows, strict=True)]
    size = update.config.micro_batch_size
    trl = TRLUpdate(
        llama, prompts, completions, update.advantages[:, 0].cpu(), old, micro_batch_size=size, learning_rate=1e-9, scored_only=True
    )
    return trl.run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="storyboard", choices=("storyboard", *SIZES))
    parser.add_argument("--quick", action="store_true", help="ends within a minute on two cores")
    parser.add_argument("--trl", action="store_true", help="text alone, against TRL (the model must be a Janus size)")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--images", type=int, default=3, help="at most, in a document")
    parser.add_argument("--words", type=int, default=24, help="text tokens before each picture (with --trl: of an answer), on the average")
    parser.add_argument("--prompt-length", type=int, default=48)
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cpu-seconds", action="store_true", help="seconds of one thread, not of the clock: others use the machine too")
    parser.add_argument("--grid", type=int, help="codes a side of a Janus' pictures; left out: the size's own")
    parser.add_argument("--checkpointing", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.prompts, arguments.group = 4, 4
    if arguments.trl:
        arguments.images = 0
    device = pick_device(arguments.device)
    model = benchmark_model(arguments.model, device, arguments.grid)
    if arguments.checkpointing:
        enable_checkpointing(model)
    settings = {
        "output_dir": "unused", "max_steps": 1, "optim": {"lr": 1e-9}, "rewards": [{"name": "format"}],
        "micro_batch_size": arguments.micro_batch_size, "loss_type": "dapo",
        "sampling": {"max_images": max(1, arguments.images), "max_text_tokens": 2 * arguments.words, "image": {"guidance_scale": 2.0}},
    }  # fmt: skip
    config = build(GRPOConfig, settings)
    if arguments.trl:
        model._legal = torch.ones(model.vocab_size, dtype=torch.bool, device=device)  # TRL forbids no token
    shape = (arguments.prompts, arguments.group, arguments.images, arguments.words, arguments.prompt_length)
    update = Update(model, documents(model, *shape), config)
    baseline, theirs = ("TRL", trl_update(update, arguments.checkpointing)) if arguments.trl else ("padded, whole logits", update.plain)
    seconds = compare({"diptych": update.ours, baseline: theirs}, arguments.repeats, device, model.dtype, clock_of(arguments.cpu_seconds))
    report(arguments, update, seconds, baseline)


def report(arguments: argparse.Namespace, update: Update, seconds: dict[str, list[float]], baseline: str) -> None:
    model, device = update.model, update.model.device
    width = int(model.language_model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    limit = operations(update) / matrix_rate(device, model.dtype, width, 2048, clock_of(arguments.cpu_seconds))
    ratio = statistics.median(b / a for a, b in zip(seconds["diptych"], seconds[baseline], strict=True))
    positions = int(update.batch.attention_mask.sum())
    content = f"1 to {arguments.images} pictures" if arguments.images else "text"
    print(f"{arguments.model}: {len(update.batch)} documents of {content}, {positions} positions, {device}")
    for name in (baseline, "diptych"):
        median = statistics.median(seconds[name])
        spread = f"(spread {min(seconds[name]):.2f} to {max(seconds[name]):.2f})"
        print(f"  {name:<21} {median:8.2f} s   {positions / median:8.0f} positions/s   {spread}")
    print(f"  {'limit':<21} {limit:8.2f} s   multiplications alone")
    print(f"  {ratio:.2f} times as fast; {statistics.median(seconds['diptych']) / limit:.1f} times the limit's time")
    found = {
        "name": "update", "model": arguments.model, "baseline": baseline, "ratio": ratio, "limit": limit,
        "seconds": statistics.median(seconds["diptych"]), "baseline_seconds": statistics.median(seconds[baseline]),
        "ours": seconds["diptych"], "theirs": seconds[baseline], "sizes": vars(arguments), "device": str(device),
        "dtype": str(model.dtype), "versions": versions(),
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
