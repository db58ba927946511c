"""Train the learned rewards of the demo on data of their own: right and spoiled pictures, captions and step texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from diptych.document import Document, Image, Text
from diptych.models.storyboard import build_tokenizer
from diptych.models.storyboard.codec import PatchCodec
from diptych.pretrain.codec import all_strips
from diptych.pretrain.muon import MuonAdamW
from diptych.rewards.encoder import DocumentEncoder
from diptych.rewards.image_text import HEAD, agreement_logits
from diptych.rewards.text_critic import critic_input, text_log_likelihoods
from diptych.runs import atomic_folder
from diptych.runtime import rng as make_rng
from diptych.worlds.storyboard import language
from diptych.worlds.storyboard.conversations import VERBS
from diptych.worlds.storyboard.scene import Scene, Split, Thing, in_split, random_scene, random_thing
from diptych.worlds.storyboard.tasks import answer_text, make_task, random_event
from diptych.worlds.storyboard.world import BACKGROUNDS, COLOURS, KINDS, PLACES, SIZES

Log = Callable[[str], None]


class Redrawer:
    """Pictures as the unified model would draw them: through the image tokenizer, sometimes with a wrong patch."""

    def __init__(self, codec: PatchCodec) -> None:
        strips = all_strips()  # (876, 3, 96, 32)
        patches = torch.cat([s for s in strips.split(codec.patch, dim=2)])
        with torch.no_grad():
            decoded = codec.decoder(codec.quantize_patches(patches)[0]).clamp(-1, 1)
        rows = decoded.reshape(codec.grid, len(strips), 3, codec.patch, codec.patch).permute(1, 0, 3, 4, 2)
        self.strips = ((rows.reshape(len(strips), -1, codec.patch, 3) + 1) * 127.5).round().to(torch.uint8).numpy()
        self.things: list[Thing | None] = [None, *(Thing(k, c, s) for k in KINDS for c in COLOURS for s in SIZES)]
        self.index = {thing: i for i, thing in enumerate(self.things)}

    def draw(self, scene: Scene) -> np.ndarray:
        """(96, 96, 3) uint8."""
        first = BACKGROUNDS.index(scene.background) * len(PLACES)
        picks = [(first + p) * len(self.things) + self.index[t] for p, t in enumerate(scene.places)]
        return np.concatenate([self.strips[i] for i in picks], axis=1)


def spoil(rng: np.random.Generator, scene: Scene) -> Scene:
    """The scene with one fact changed."""
    facts = ("background", "colour", "size", "kind", "place", "presence")
    kind = str(rng.choice(facts, p=(0.1, 0.25, 0.2, 0.2, 0.15, 0.1)))
    if kind == "background" or not scene.things:
        return Scene(str(rng.choice([b for b in BACKGROUNDS if b != scene.background])), scene.places)
    where = int(rng.choice([i for i, t in enumerate(scene.places) if t is not None]))
    thing = scene.places[where]
    assert thing is not None
    free = [i for i, t in enumerate(scene.places) if t is None]
    unused = [k for k in KINDS if scene.find(k) is None]
    if kind == "colour":
        return scene.with_place(where, dataclasses.replace(thing, colour=str(rng.choice([c for c in COLOURS if c != thing.colour]))))
    if kind == "size":
        return scene.with_place(where, dataclasses.replace(thing, size="big" if thing.size == "small" else "small"))
    if kind == "kind":
        return scene.with_place(where, dataclasses.replace(thing, kind=str(rng.choice(unused))))
    if kind == "place":
        target = int(rng.choice([i for i in range(len(PLACES)) if i != where]))
        return scene.with_place(where, scene.places[target]).with_place(target, thing)
    if free and rng.random() < 0.5:
        return scene.with_place(int(rng.choice(free)), random_thing(rng, str(rng.choice(unused))))
    return scene.with_place(where, None)


def differences(left: list[Scene], right: list[Scene]) -> Tensor:
    """(N, M): facts in which scenes differ: the background, and per place kind, colour and size (2 for there or not)."""

    def table(scenes: list[Scene]) -> Tensor:
        def facts(thing: Thing | None) -> tuple[int, int, int]:
            if thing is None:
                return -1, -1, -1
            return KINDS.index(thing.kind), COLOURS.index(thing.colour), SIZES.index(thing.size)

        return torch.tensor([[BACKGROUNDS.index(s.background), *(v for t in s.places for v in facts(t))] for s in scenes])

    a, b = table(left)[:, None], table(right)[None]  # (N, 1, 10), (1, M, 10)
    unequal = (a != b).long()
    places = unequal[..., 1:].unflatten(-1, (3, 3)).sum(-1)
    return unequal[..., 0] + places.clamp(max=2).sum(-1)


def _scene(rng: np.random.Generator, split: Split) -> Scene:
    while True:
        scene = random_scene(rng, int(rng.integers(1, 4)) if split == "train" else int(rng.integers(2, 4)))
        if in_split([scene], split):
            return scene


def _caption(rng: np.random.Generator, scene: Scene) -> str:
    words = language.describe(scene) + " ."
    if rng.random() < 0.7:
        event = random_event(rng, _scene(rng, "train"), VERBS)
        if event is not None:
            words = f"{language.tell(event)} . {words}"
    return words


def pair_batch(rng: np.random.Generator, redrawer: Redrawer, size: int, split: Split = "train") -> tuple[list[Image], list[Text], Tensor]:
    """`size` pictures, 3 captions each (right, one fact wrong, one or more wrong), and targets (size, 3 * size) =
    0.5 ** (number of wrong facts), lowered for pictures with a patch that belongs elsewhere."""
    scenes = [_scene(rng, split) for _ in range(size)]
    captions: list[Scene] = []
    for scene in scenes:
        once = spoil(rng, scene)
        captions += [scene, once, spoil(rng, spoil(rng, once)) if rng.random() < 0.5 else spoil(rng, scene)]
    pictures, whole = [], torch.ones(size)
    for i, scene in enumerate(scenes):
        array = redrawer.draw(scene)
        if split == "train" and rng.random() < 0.25:
            other = redrawer.draw(_scene(rng, "train"))
            y, x = (int(v) * 32 for v in rng.integers(3, size=2))
            if np.abs(array[y : y + 32, x : x + 32].astype(int) - other[y : y + 32, x : x + 32]).mean() > 4:
                array = array.copy()
                array[y : y + 32, x : x + 32] = other[y : y + 32, x : x + 32]
                whole[i] = 0.4
        pictures.append(Image(PIL.Image.fromarray(array)))
    targets = 0.5 ** differences(scenes, captions).float() * whole[:, None]
    return pictures, [Text(_caption(rng, s)) for s in captions], targets


def train_image_text(codec: PatchCodec, work: Path, steps: int, seed: int, log: Log) -> DocumentEncoder:
    torch.manual_seed(seed)
    model = DocumentEncoder(build_tokenizer(language.vocabulary()), HEAD)
    redrawer = Redrawer(codec)

    def loss_of(rng: np.random.Generator) -> Tensor:
        size = 40
        pictures, captions, targets = pair_batch(rng, redrawer, size)
        logits = agreement_logits(model, captions, pictures, paired=False)  # (size, 3 * size)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        own = torch.eye(size).repeat_interleave(3, dim=1).bool()
        return losses[own].mean() + losses[~own].mean()

    train_critic(model, loss_of, work / "image_text_checkpoint", steps, 1.5e-3, seed, lambda: measure_image_text(model, redrawer), log)
    return model


@torch.no_grad()
def measure_image_text(model: DocumentEncoder, redrawer: Redrawer) -> dict[str, float]:
    """On scenes of the test split: how often the right caption beats one with a single wrong fact."""
    pictures, captions, _ = pair_batch(make_rng(0, 99), redrawer, 200, "test")
    repeated = [picture for picture in pictures for _ in range(3)]
    values = agreement_logits(model, captions, repeated, paired=True).sigmoid().reshape(-1, 3)
    return {
        "pairwise_accuracy": round(float((values[:, 0] > values[:, 1]).float().mean()), 3),
        "mean_right": round(float(values[:, 0].mean()), 3),
        "mean_one_wrong": round(float(values[:, 1].mean()), 3),
    }


def critic_example(rng: np.random.Generator, split: Split = "train") -> tuple[Document, Document, list[float]]:
    """A prompt, an answer whose texts may be spoiled, and for each text of the answer whether it is right."""
    task = make_task(rng, split)
    truth = task.truth
    right = [language.step_text(e, s) for e, s in zip(truth.events, truth.scenes, strict=True)]
    told = list(right)
    scenes = [task.start, *truth.scenes]
    for i in range(len(told)):
        if rng.random() < 0.6:
            continue
        event, scene = truth.events[i], truth.scenes[i]
        kind = int(rng.integers(6))
        if kind <= 2:
            told[i] = language.step_text(event, spoil(rng, scene))
        elif kind == 3:
            told[i] = language.step_text(event, scenes[i])
        elif kind == 4:
            told[i] = right[int(rng.integers(len(right)))]
        else:
            other = random_event(rng, scenes[i], VERBS)
            told[i] = language.step_text(other, other.apply(scenes[i])) if other else right[i]
    labels = [float(a == b) for a, b in zip(told, right, strict=True)]
    if truth.answer is not None:
        answers = (*language.NUMBER_WORDS, *PLACES, *(t.kind for t in task.start.things))
        said = truth.answer if rng.random() < 0.6 else str(rng.choice(answers))
        told.append(answer_text(said))
        labels.append(float(said == truth.answer))
    elif rng.random() < 0.05:
        told.append(right[-1])
        labels.append(0.0)
    return task.prompt, Document(tuple(Text(t) for t in told)), labels


def train_text_critic(work: Path, steps: int, seed: int, log: Log) -> DocumentEncoder:
    """Next-word likelihood of the right texts, after texts that may be wrong."""
    torch.manual_seed(seed + 1)
    tokenizer = build_tokenizer(language.vocabulary())
    model = DocumentEncoder(tokenizer, tokenizer.get_vocab_size() + 1, layers=4)

    def loss_of(rng: np.random.Generator) -> Tensor:
        logs, labels, lengths = critic_values(model, [critic_example(rng) for _ in range(48)])
        right = labels == 1
        return -logs[right].sum() / lengths[right].sum()

    train_critic(model, loss_of, work / "text_critic_checkpoint", steps, 2e-3, seed, lambda: measure_critic(model), log)
    return model


def critic_values(model: DocumentEncoder, examples: list[tuple[Document, Document, list[float]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-likelihoods of all texts of the answers, whether they are right, and their lengths in words."""
    logs = text_log_likelihoods(model, [(critic_input(prompt, answer)[0], len(prompt)) for prompt, answer, _ in examples])
    labels = torch.tensor([label for _, _, labels in examples for label in labels])
    lengths = torch.tensor([len(s.text.split()) + 1.0 for _, answer, _ in examples for s in answer if isinstance(s, Text)])
    return torch.cat(logs), labels, lengths


@torch.no_grad()
def measure_critic(model: DocumentEncoder) -> dict[str, float]:
    """Accuracy on tasks of the test split, calling a text right from 0.3 on, and the mean values of right and wrong texts."""
    rng = make_rng(0, 98)
    logs, labels, _ = critic_values(model, [critic_example(rng, "test") for _ in range(240)])
    values, right = logs.exp(), labels == 1
    return {
        "accuracy": round(float(((values > 0.3) == right).float().mean()), 3),
        "mean_right": round(float(values[right].mean()), 3),
        "mean_wrong": round(float(values[~right].mean()), 3),
    }


def train_critic(
    model: nn.Module, loss_of: Callable[[np.random.Generator], Tensor], saved: Path, steps: int, lr: float, seed: int,
    measure: Callable[[], dict[str, float]], log: Log,
) -> None:  # fmt: skip
    """Resumable from `saved`."""
    optimizer = MuonAdamW(model, lr, steps)
    start = 0
    if (saved / "trainer.pt").is_file():
        state: dict[str, Any] = torch.load(saved / "trainer.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    model.train()
    for step in range(start, steps):
        loss = loss_of(make_rng(seed, 21, step))
        optimizer.step(loss)
        if step % 100 == 99 or step == steps - 1:
            log(f"{saved.name} step {step + 1}/{steps}: loss {loss.item():.4f}, {measure()}")
        if step % 250 == 249 or step == steps - 1:
            with atomic_folder(saved) as folder:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, folder / "trainer.pt")
    model.eval()
