"""Pretrain the packaged unified model on conversations. Resumable: kill it and run the same command again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from diptych.config import EvaluateConfig, SamplingParams
from diptych.document import Document, Image
from diptych.evaluation.storyboard import answer, same_picture, same_words
from diptych.models.base import UnifiedModel
from diptych.models.pixels import to_pixels
from diptych.models.storyboard.codec import PatchCodec
from diptych.models.storyboard.model import BOS, StoryboardModel, build_tokenizer
from diptych.pretrain.muon import AttentionCap, MuonAdamW
from diptych.pretrain.settings import SETTINGS, STANDARD_COURSE, Course, Lesson, Setting
from diptych.runs import atomic_folder
from diptych.runtime import rng as make_rng
from diptych.tokens import TokenBatch, TokenRow, collate
from diptych.training.supervised import negative_log_likelihood
from diptych.worlds.storyboard.conversations import Turn, follow_up, make_turn, turns_of
from diptych.worlds.storyboard.language import vocabulary
from diptych.worlds.storyboard.world import FULL, World

MEASURED = ("describe", "question", "event", "tell", "recount", "edit", "continue", "look_up", "again")


def new_model(codec: PatchCodec, seed: int, setting: Setting = SETTINGS["standard"]) -> StoryboardModel:
    """Random weights. Embeddings start at unit scale: at 0.02 what a token is drowns in the first layer's output."""
    torch.manual_seed(seed)
    model = StoryboardModel(setting.config(), build_tokenizer(vocabulary(setting.told)))
    with torch.no_grad():
        model.llama.embed_tokens.weight.normal_(0, 1)
        model.code_embeddings.normal_(0, model.config.depth**-0.5)
        model.depth_tie.mul_(0.02)
    model.codec.load_state_dict(codec.state_dict())
    return model


class PatchCodes:
    """Codes of rendered pictures, patch by patch: the standard world draws a few hundred distinct patches, each encoded once. Of larger
    worlds the last 100 000 or so are kept."""

    LIMIT = 100_000

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
            if len(self.codes) > self.LIMIT:
                self.codes = {key: self.codes[key] for key in keys if key in self.codes}
            pixels = to_pixels([PIL.Image.fromarray(tile) for tile in missing.values()], patch)
            with torch.no_grad():
                self.codes |= dict(zip(missing, self.codec.quantize_patches(pixels)[1].long(), strict=True))
        return torch.stack([self.codes[key] for key in keys])

    def fill(self, document: Document) -> Document:
        """The same document with codes beside the pixels."""
        return Document(tuple(Image(s.pixels, self.of(s.pixels)) if isinstance(s, Image) and s.pixels else s for s in document))


def extend(model: StoryboardModel, row: TokenRow | None, turn: Turn) -> TokenRow:
    """<bos> then, for each turn, <user> prompt <assistant> answer <eos>; every answer is trained."""
    prompt, answer = model.encode_prompt(turn[0]), model.encode_segments(turn[1], answer=True)
    if row is None:
        return TokenRow.concat([prompt, answer])
    return TokenRow.concat([row, prompt[1:], answer])


def attention_cap(step: int, steps: int) -> float:
    """50 for two thirds of the steps, so that looking things up can be learned, then geometrically down to 15 within a sixth."""
    share = min(1.0, max(0.0, (step / steps - 2 / 3) * 6))
    return 50.0 * (15.0 / 50.0) ** share


def lesson(step: int, steps: int, from_scratch: bool, course: Course = STANDARD_COURSE) -> Lesson:
    """From scratch a quarter of the steps on facts alone, then a sixth on answers in words; then everything, by turns alone
    and amid other turns.

    Looking up a fact by the name of its thing is learned suddenly, after hundreds of steps at chance, and the number of
    steps counts more than their size: hence few rows. Among other lessons it was not learned in 4500 steps.
    """
    if from_scratch and step < steps // 4:
        return course.facts
    if from_scratch and step < steps // 4 + steps // 6:
        return course.words
    return (course.alone, course.amid)[step % 2]


def make_batch(
    model: StoryboardModel, codes: PatchCodes, seed: int, step: int, plan: Lesson, world: World = FULL
) -> tuple[TokenBatch, TokenBatch]:
    """Conversations filled up to the plan's length; and bare pictures after the unconditional prompt (caption dropout),
    one for every four conversations, apart because they are short."""
    rng = make_rng(seed, 1, step)
    rows: list[TokenRow] = []
    row: TokenRow | None = None
    while len(rows) < plan.rows:
        added = [make_turn(rng, kinds=plan.kinds, world=world)]
        after = follow_up(added[0], world)
        if after is not None and "draw" in plan.kinds and rng.random() < 0.5:
            added.append(after)
        longer = row
        for asked, told in added:
            longer = extend(model, longer, (codes.fill(asked), codes.fill(told)))
        assert longer is not None
        if len(longer) > plan.length and row is not None:
            rows.append(row)
            row = None
        else:
            row = longer
    begin = TokenRow.text([BOS], model.image_spec.depth)
    bare = []
    for _ in range(max(1, plan.rows // 4)):
        image = codes.fill(make_turn(rng, "draw", world=world)[1])
        bare.append(TokenRow.concat([begin, model.encode_segments(image, answer=True)]))
    return collate(rows), collate(bare)


def likelihood_loss(model: UnifiedModel, batches: Sequence[TokenBatch]) -> tuple[Tensor, dict[str, float]]:
    """Mean negative log-likelihood per choice over all batches, text and codes apart, then added."""
    sums = [torch.stack(negative_log_likelihood(model, batch)) for batch in batches]
    counts = [[(b.choice_mask & mask[..., None]).sum() for mask in (b.text_mask, b.image_mask)] for b in batches]
    text, image = torch.stack(sums).sum(0) / torch.tensor(counts).sum(0).clamp(min=1)
    return text + image, {"text_loss": float(text.detach()), "image_loss": float(image.detach())}


def pretrain_base(
    model: StoryboardModel, work: Path, steps: int, seed: int, log: Callable[[str], None], *, from_scratch: bool,
    setting: Setting = SETTINGS["standard"],
) -> StoryboardModel:  # fmt: skip
    """Trains `model` in place; half the learning rates where it has been trained before."""
    lr, muon_lr = (3e-3, 8e-3) if from_scratch else (1.5e-3, 4e-3)
    optimizer = MuonAdamW(model, lr, steps, muon_lr, decay=0.1)
    cap = AttentionCap(model.llama)
    start, saved = 0, work / "base_checkpoint"
    if (saved / "trainer.pt").is_file():
        model.load_state_dict(StoryboardModel.load(saved / "model").state_dict())
        state: dict[str, Any] = torch.load(saved / "trainer.pt", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        log(f"base: resuming at step {start}")
    codes, began, tokens, recent = PatchCodes(model), time.time(), 0, []
    model.train()
    for step in range(start, steps):
        batches = make_batch(model, codes, seed, step, lesson(step, steps, from_scratch, setting.course), setting.told)
        loss, parts = likelihood_loss(model, batches)
        optimizer.step(loss)
        bound = cap.apply(attention_cap(step, steps))
        tokens += sum(int(batch.attention_mask.sum()) for batch in batches)
        recent.append((parts["text_loss"], parts["image_loss"]))
        if step % 50 == 49:
            text, image = np.mean(recent[-50:], axis=0)
            rate = tokens / (time.time() - began)
            losses = f"text {text:.4f} image {image:.4f} nats per choice"
            log(f"base step {step + 1}/{steps}: {losses}, attention {bound:.0f}, {rate:.0f} tokens/s")
        if step % 250 == 249 or step == steps - 1:
            with atomic_folder(saved) as folder:
                model.save_pretrained(folder / "model")
                torch.save({"optimizer": optimizer.state_dict(), "step": step + 1}, folder / "trainer.pt")
    return model.eval()


def measure_answers(model: StoryboardModel, num_prompts: int = 240, world: World = FULL) -> dict[str, float]:
    """Share of held-out prompts of each kind that are answered greedily word for word, or with the right picture."""
    params, config = SamplingParams(max_text_tokens=110, max_images=1).greedy(), EvaluateConfig()
    found = {}
    for kind in MEASURED:
        if kind not in turns_of(world):
            continue
        right = same_picture if kind in ("edit", "continue", "again") else same_words
        random = make_rng(config.seed, 36)
        turns = [make_turn(random, kind, "test", world=world) for _ in range(num_prompts)]
        said = answer(model, [prompt for prompt, _ in turns], params, config)
        found[kind] = round(float(np.mean([right(given, turn, world) for given, turn in zip(said, turns, strict=True)])), 4)
    return found
