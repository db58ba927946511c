"""How fast documents are sampled, against what peers do and against the machine's limit.

    python benchmarks/rollout.py [--model storyboard|janus-100m|janus-pro-1b|janus-pro-7b|vila-u-7b] [--quick]

The baseline is the loop that frameworks without an engine for their model fall back to, built from transformers' public API: at
every switch between text and picture the whole context is prefilled again, for every member of a group; while drawing, rows are
doubled for guidance, the unconditional half as long as the other; the cache is transformers' `DynamicCache`. Both sides write the
same number of tokens with the same weights: P prompts of mixed length, G documents each, with `--images` pictures.

Prints a table, then one JSON line. `ratio`: baseline time / our time, median over interleaved repeats. `limit`: seconds that the
multiplications of our side alone take at the matrix rate measured here.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
from typing import Any

import torch
from _shapes import SIZES, benchmark_model, clock_of, documents_of, matrix_rate, prompts
from torch import Tensor
from transformers import DynamicCache, LlamaModel

from diptych.config import ImageSampling, SamplingParams
from diptych.models import UnifiedModel
from diptych.models.pixels import to_images
from diptych.runtime import pick_device, versions
from diptych.sampling.engine import sample
from diptych.sampling.rollout import PICTURES_AT_ONCE
from diptych.tokens import TokenRow

# transformers 5.24 renamed the argument of every decoder's forward
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


class Peers:
    """The fallback loop. Rows are left-padded, as `generate` wants them."""

    def __init__(self, model: UnifiedModel, params: SamplingParams) -> None:
        self.model, self.params = model, params
        self.scale = params.image.guidance_scale or 1.0

    @torch.no_grad()
    def rollout(self, rows: list[TokenRow], group: int, images: int, words: int) -> int:
        """Writes all documents and decodes their pictures; returns the positions written."""
        model, spec = self.model, self.model.image_spec
        longest = max(map(len, rows))
        ids = torch.stack([torch.nn.functional.pad(row.text_ids, (longest - len(row), 0)) for row in rows]).to(model.device)
        mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).to(model.device)
        ids, mask = ids.repeat_interleave(group, 0), mask.repeat_interleave(group, 0)  # (B, L)
        context, blank = model.embed_text(ids), model.embed_text(torch.zeros_like(ids))
        written = 0
        for _ in range(images):
            context, mask = self._text(context, mask, words)
            begin = self._token(spec.begin_id, len(context))
            context, mask = torch.cat([context, begin], 1), self._longer(mask, 1)
            blank = torch.cat([blank, blank[:, -1:].expand(-1, context.shape[1] - blank.shape[1] - 1, -1), begin], 1)
            drawn, codes = self._image(context, blank, mask)
            for some in codes.split(PICTURES_AT_ONCE):
                to_images(model.decode_codes(some))
            end = self._token(spec.end_id, len(context))
            context, blank = torch.cat([context, drawn, end], 1), torch.cat([blank, drawn, end], 1)
            mask = self._longer(mask, drawn.shape[1] + 1)
            written += len(context) * (words + drawn.shape[1] + 2)
        return written

    def _token(self, token: int, rows: int) -> Tensor:
        return self.model.embed_text(torch.full((rows, 1), token, device=self.model.device))

    @staticmethod
    def _longer(mask: Tensor, by: int) -> Tensor:
        return torch.cat([mask, mask.new_ones(len(mask), by)], 1)

    def _prefill(self, context: Tensor, mask: Tensor) -> tuple[Tensor, DynamicCache]:
        language_model: Any = self.model.language_model
        cache = DynamicCache(config=language_model.config)
        return self._step(context, mask, cache), cache

    def _step(self, embeds: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """State of the newest position, (B, H)."""
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        language_model: Any = self.model.language_model
        if embeds.shape[1] == 1:
            mask = mask[:, None, None]  # ready for the attention: saves them building it
        arguments = {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": mask, "use_cache": True, CACHE_ARGUMENT: cache}
        return language_model(**arguments).last_hidden_state[:, -1]

    def _text(self, context: Tensor, mask: Tensor, words: int) -> tuple[Tensor, Tensor]:
        hidden, cache = self._prefill(context, mask)
        for _ in range(words):
            token = torch.multinomial(self.model.text_logits(hidden).float().softmax(-1), 1)  # (B, 1)
            embeds = self.model.embed_text(token)
            context, mask = torch.cat([context, embeds], 1), self._longer(mask, 1)
            hidden = self._step(embeds, mask, cache)
        return context, mask

    def _image(self, context: Tensor, blank: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, positions, H) and codes (B, positions, D) of a picture for each row."""
        spec, rows = self.model.image_spec, len(context)
        hidden, cache = self._prefill(torch.cat([context, blank]), mask.repeat(2, 1))  # conditional and unconditional rows
        mask, drawn, chosen = mask.repeat(2, 1), [], []
        for _ in range(spec.num_positions):
            codes = torch.empty(rows, 0, dtype=torch.long, device=hidden.device)
            for _ in range(spec.depth):
                conditional, unconditional = self.model.image_step(hidden, codes.repeat(2, 1)).chunk(2)
                logits = unconditional + self.scale * (conditional - unconditional)
                codes = torch.cat([codes, torch.multinomial(logits.float().softmax(-1), 1)], 1)
            chosen.append(codes)
            embeds = self.model.embed_codes(codes)[:, None]
            drawn.append(embeds)
            mask = self._longer(mask, 1)
            hidden = self._step(embeds.repeat(2, 1, 1), mask, cache)
        return torch.cat(drawn, 1), torch.stack(chosen, 1)


def operations(model: UnifiedModel, rows: list[TokenRow], group: int, images: int, words: int) -> float:
    """Multiplications and additions of our side: decoder and heads; attention left out."""
    spec, language_model = model.image_spec, model.language_model
    decoder = sum(p.numel() for name, p in language_model.named_parameters() if ".layers." in f".{name}" and p.ndim == 2)
    documents = len(rows) * group
    answer = images * (words + 1 + len(spec.layout))
    unconditional = images * spec.num_positions
    text_head = model.vocab_size * int(language_model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    return 2.0 * (decoder * (sum(map(len, rows)) + documents * (answer + unconditional)) + text_head * documents * images * (words + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="storyboard", choices=("storyboard", *SIZES))
    parser.add_argument("--quick", action="store_true", help="ends within a minute on two cores")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--words", type=int, default=24, help="text tokens before each picture")
    parser.add_argument("--prompt-length", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cpu-seconds", action="store_true", help="seconds of one thread, not of the clock: others use the machine too")
    parser.add_argument("--grid", type=int, help="codes a side of a Janus' pictures; left out: the size's own")
    arguments = parser.parse_args()
    if arguments.quick:
        small = (4, 4, 3, 24) if arguments.model == "storyboard" else (2, 2, 1, 4)
        arguments.prompts, arguments.group, arguments.images, arguments.words = small
    device, clock = pick_device(arguments.device), clock_of(arguments.cpu_seconds)
    model = benchmark_model(arguments.model, device, arguments.grid)
    params = SamplingParams(image=ImageSampling(guidance_scale=2.0), max_images=arguments.images, max_text_tokens=arguments.words + 1)
    rows, shape = prompts(model, arguments.prompts, arguments.prompt_length), (arguments.images, arguments.words)
    peers, ours, theirs = Peers(model, params), [], []

    def seconds(run: Any) -> float:
        began = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - began

    def sample_ours(seed: int) -> None:
        with documents_of(model, *shape):
            found = sample(model, rows, params, num_generations=arguments.group, generator=torch.Generator().manual_seed(seed))
        assert all(len(rollout.document.images) == arguments.images for rollout in found)

    for repeat in range(-1, arguments.repeats):  # the first one warms up
        times = seconds(lambda r=repeat: sample_ours(r + 1)), seconds(lambda: peers.rollout(rows, arguments.group, *shape))
        print(f"{'warm-up' if repeat < 0 else f'round {repeat + 1}'}: {times[0]:.2f} s, the loop {times[1]:.2f} s", file=sys.stderr)
        if repeat >= 0:
            ours.append(times[0])
            theirs.append(times[1])
    documents = arguments.prompts * arguments.group
    positions = documents * arguments.images * (arguments.words + 1 + len(model.image_spec.layout))
    width = int(model.language_model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    limit = operations(model, rows, arguments.group, *shape) / matrix_rate(device, model.dtype, width, documents, clock)
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    print(f"{arguments.model}: {documents} documents of {arguments.images} pictures, {positions} positions written, {device}")
    for name, times in (("peers' loop", theirs), ("diptych", ours)):
        median = statistics.median(times)
        print(f"  {name:<12} {median:8.2f} s   {positions / median:8.0f} positions/s   (spread {min(times):.2f} to {max(times):.2f})")
    print(f"  {'limit':<12} {limit:8.2f} s   multiplications alone, decoding in batches of {documents}")
    print(f"  {ratio:.2f} times as fast as the loop; {statistics.median(ours) / limit:.1f} times the limit's time")
    report = {
        "name": "rollout", "model": arguments.model, "ratio": ratio, "limit": limit, "seconds": statistics.median(ours),
        "baseline_seconds": statistics.median(theirs), "ours": ours, "theirs": theirs, "sizes": vars(arguments), "device": str(device),
        "dtype": str(model.dtype), "versions": versions(),
    }  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
