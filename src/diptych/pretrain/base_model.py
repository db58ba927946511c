"""Pretrain the packaged unified model on conversations. Resumable: kill it and run the same command again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from diptych.document import Document, Image
from diptych.logprobs import score
from diptych.models.base import UnifiedModel
from diptych.models.pixels import to_pixels
from diptych.models.storyboard.codec import PatchCodec
from diptych.models.storyboard.model import BOS, StoryboardConfig, StoryboardModel, build_tokenizer
from diptych.runs import atomic_folder
from diptych.runtime import rng as make_rng
from diptych.tokens import TokenBatch, TokenRow, collate
from diptych.worlds.storyboard.conversations import Turn, follow_up, make_turn
from diptych.worlds.storyboard.language import vocabulary


def new_model(codec: PatchCodec, seed: int) -> StoryboardModel:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(vocabulary())
    model = StoryboardModel(StoryboardConfig(vocab_size=tokenizer.get_vocab_size()), tokenizer)
    model.codec.load_state_dict(codec.state_dict())
    return model


class PatchCodes:
    """Codes of rendered pictures, patch by patch: the world draws a few hundred distinct patches, each encoded once."""

    def __init__(self, model: StoryboardModel) -> None:
        self.codec = model.codec
        self.codes: dict[bytes, Tensor] = {}

    def of(self, image: PIL.Image.Image) -> Tensor:
        """(num_positions, depth) codes, equal to `model.encode_images`."""
        patch, array = self.codec.patch, np.asarray(image)
        tiles = [
            array[y : y + patch, x : x + patch]
            for y in range(0, array.shape[0], patch) for x in range(0, array.shape[1], patch)
        ]  # fmt: skip
        keys = [tile.tobytes() for tile in tiles]
        missing = {key: tile for key, tile in zip(keys, tiles, strict=True) if key not in self.codes}
        if missing:
            pixels = to_pixels([PIL.Image.fromarray(tile) for tile in missing.values()], patch)
            with torch.no_grad():
                self.codes |= dict(zip(missing, self.codec.quantize_patches(pixels)[1].long(), strict=True))
        return torch.stack([self.codes[key] for key in keys])

    def fill(self, document: Document) -> Document:
        """The same document with codes beside the pixels."""
        return Document(tuple(Image(s.pixels, self.of(s.pixels)) if isinstance(s, Image) and s.pixels else s for s in document))


def conversation_row(model: StoryboardModel, turns: list[Turn]) -> TokenRow:
    """<bos> then, for each turn, <user> prompt <assistant> answer <eos>; every answer is trained."""
    rows: list[TokenRow] = []
    for prompt, answer in turns:
        wrapped = model.encode_prompt(prompt)
        rows.append(TokenRow(*(getattr(wrapped, f)[1:] for f in TokenRow.__dataclass_fields__)) if rows else wrapped)
        rows.append(model.encode_segments(answer, answer=True))
    return TokenRow.concat(rows)


def make_batch(model: StoryboardModel, codes: PatchCodes, seed: int, step: int, batch_size: int, length: int = 192) -> TokenBatch:
    """Conversations filled up to `length` positions, and bare images after the unconditional prompt (caption dropout)."""
    rng = make_rng(seed, 1, step)
    rows: list[TokenRow] = []
    turns: list[Turn] = []
    row: TokenRow | None = None
    while len(rows) < batch_size:
        added = [make_turn(rng)]
        after = follow_up(added[0])
        if after is not None and rng.random() < 0.5:
            added.append(after)
        turns += [(codes.fill(prompt), codes.fill(answer)) for prompt, answer in added]
        longer = conversation_row(model, turns)
        if len(longer) > length and row is not None:
            rows.append(row)
            turns, row = [], None
        else:
            row = longer
    begin = TokenRow.text([BOS], model.image_spec.depth)
    for _ in range(max(1, batch_size // 4)):
        image = codes.fill(make_turn(rng, "draw")[1])
        rows.append(TokenRow.concat([begin, model.encode_segments(image, answer=True)]))
    return collate(rows)


def likelihood_loss(model: UnifiedModel, batch: TokenBatch, image_weight: float) -> tuple[Tensor, dict[str, float]]:
    """Mean negative log-likelihood per choice, text and codes apart, then added with `image_weight`."""
    logprobs = score(model, batch).logprobs
    choices = batch.choice_mask
    text, image = choices & batch.text_mask[..., None], choices & batch.image_mask[..., None]
    text_loss = -logprobs[text].mean()
    image_loss = -logprobs[image].mean()
    return text_loss + image_weight * image_loss, {"text_loss": text_loss.item(), "image_loss": image_loss.item()}


def pretrain_base(
    model: StoryboardModel, work: Path, steps: int, lr: float, batch_size: int, seed: int, log: Callable[[str], None]
) -> StoryboardModel:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, s / steps))))
    )
    start, saved = 0, work / "base_checkpoint"
    if (saved / "trainer.pt").is_file():
        model.load_state_dict(StoryboardModel.load(saved / "model").state_dict())
        state: dict[str, Any] = torch.load(saved / "trainer.pt", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]
        log(f"base: resuming at step {start}")
    codes, began, tokens, recent = PatchCodes(model), time.time(), 0, []
    model.train()
    for step in range(start, steps):
        batch = make_batch(model, codes, seed, step, batch_size)
        loss, parts = likelihood_loss(model, batch, image_weight=1.0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        tokens += int(batch.attention_mask.sum())
        recent.append((parts["text_loss"], parts["image_loss"]))
        if step % 50 == 49:
            text, image = np.mean(recent[-50:], axis=0)
            rate = tokens / (time.time() - began)
            log(f"base step {step + 1}/{steps}: text {text:.4f} image {image:.4f} nats per choice, {rate:.0f} tokens/s")
        if step % 250 == 249 or step == steps - 1:
            with atomic_folder(saved) as folder:
                model.save_pretrained(folder / "model")
                state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "step": step + 1}
                torch.save(state, folder / "trainer.pt")
    return model.eval()
