"""What the tests of model families share: documents, pictures, JSONL records, settings, and pictures drawn at once."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from diptych.config import ImageSampling, SamplingParams, TextSampling
from diptych.document import Document, Image, Text
from diptych.models import UnifiedModel
from diptych.sampling.engine import sample
from diptych.sampling.rollout import Rollout
from diptych.tokens import AnswerForm, TokenRow

SIZE = {"emu3": 32}  # pixels a side; the other toys draw 32 anyway


LIKING = {"emu3": (9.0, 0.0)}  # nats for beginning a picture and for ending, see `eager`; this toy's logits are the widest


@contextlib.contextmanager
def eager(model: UnifiedModel) -> Iterator[UnifiedModel]:
    """With a head that likes to begin pictures and to end, so that a few short documents cover both."""
    head = next(module for name, module in model.named_modules() if name.endswith("lm_head"))
    liked = torch.zeros(model.vocab_size)
    liked[[model.image_spec.begin_id, model.eos_id]] = torch.tensor(LIKING.get(model.family, (4.0, 4.0)))
    hook = head.register_forward_hook(lambda module, inputs, logits: logits + liked.to(logits))
    try:
        yield model
    finally:
        hook.remove()


def picture(seed: int, width: int = 40, height: int = 52) -> PIL.Image.Image:
    """Smooth colours, so that neighbouring patches differ and resizing is exercised."""
    noise = np.random.default_rng(seed).integers(0, 255, (5, 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((width, height), PIL.Image.Resampling.BICUBIC)


def prompts() -> list[Document]:
    """Three prompts of different lengths: without, with one, and with two pictures."""
    return [
        Document((Text("tell a story"),)),
        Document((Image(picture(1)), Text("what happens next? tell it in words and pictures"))),
        Document((Text("look at this"), Image(picture(2, 64, 30)), Text("and"), Image(picture(3, 32, 32)))),
    ]


def answer() -> Document:
    return Document((Text("a red cat."), Image(picture(4)), Text("then a bird."), Image(picture(5, 30, 90))))


def write_records(folder: Path) -> Path:
    """Four records: two illustrated answers, one bare picture, one answer in words."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(6):
        picture(seed).save(folder / f"{seed}.png")

    def content(*parts: str) -> list[dict[str, str]]:
        return [{"type": "image", "image": p} if p.endswith(".png") else {"type": "text", "text": p} for p in parts]

    records = [
        (content("tell a story"), content("a red cat.", "0.png", "then a bird.", "1.png")),
        (content("2.png", "and then?"), content("it rains.", "3.png")),
        (content("draw a cat"), content("4.png")),
        (content("5.png", "what is it?"), content("a bird on the mat.")),
    ]
    path = folder / "records.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}], "num_images": 2}
        for asked, told in records
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def params(scale: float | None = None, **changes) -> SamplingParams:
    return SamplingParams(
        text=TextSampling(temperature=1.2), image=ImageSampling(temperature=0.8, guidance_scale=scale, **changes),
        max_images=2, max_text_tokens=10,
    )  # fmt: skip


def drawn(model: UnifiedModel, prompt: TokenRow, settings: SamplingParams) -> Rollout:
    """A picture behind a prompt of form `image`."""
    assert prompt.form is AnswerForm.IMAGE
    return sample(model, [prompt], settings, generator=torch.Generator())[0]
