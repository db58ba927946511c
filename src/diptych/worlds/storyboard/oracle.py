"""The hidden truth: reads generated text by grammar and generated pixels by analysis, and judges a whole document.

It is the evaluation, never a reward. Its own accuracy is measured by `tests/test_world.py` and `benchmarks/oracle.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import PIL.Image

from diptych.document import Document, Image, Text
from diptych.worlds.storyboard import language
from diptych.worlds.storyboard.reading import read_pictures
from diptych.worlds.storyboard.scene import Event, Scene, outcome
from diptych.worlds.storyboard.tasks import Truth, answer_text
from diptych.worlds.storyboard.world import World

__all__ = ["Verdict", "judge", "read_pictures"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Rates in 0..1 of one document; `steps` says for each expected step whether its text and its picture are right, `steps_given` whether
    its picture is right given what stands before it (None where that says nothing about it).

    format: 1 if text and picture alternate, with exactly the pictures (and the closing text) that were asked for.
    text: share of expected texts (event, scene, closing answer) that are exactly right.
    image: share of expected pictures that show exactly the true scene.
    order: share of expected events that are told in the right order (longest common subsequence).
    document: 1 if all of these are 1.
    given: share of expected pictures that are right given their own text and the picture drawn before, so that an error is charged once, to
        the step that made it. What must be shown is the scene that a full text states; or what a terse text's event makes of the scene
        read from the picture before (`scene.outcome`; the picture that is named, where one is to be drawn again). Left out are pictures
        about which that says nothing: their text breaks the grammar or cannot happen, or the picture before shows nothing readable; 0
        where all are left out. A missing picture is wrong.
    kept: continuity. Of the things of the picture before that the told event leaves alone, and the background, the share that the picture
        still shows as they were; a mean over the pictures for which `given` knows both; 0 where there are none.
    """

    format: float
    text: float
    image: float
    order: float
    document: float
    steps: tuple[tuple[bool, bool], ...]
    steps_given: tuple[bool | None, ...] = ()
    kept: float = 0.0

    @property
    def given(self) -> float:
        known = [right for right in self.steps_given if right is not None]
        return sum(known) / len(known) if known else 0.0

    @property
    def score(self) -> float:
        return (self.format + self.text + self.image + self.order) / 4


def judge(documents: Sequence[Document], truths: Sequence[Truth]) -> list[Verdict]:
    """Verdicts of answers against the truth; all pictures of a world are read in one batch."""
    pictures: dict[World, list[PIL.Image.Image]] = {}
    for document, truth in zip(documents, truths, strict=True):
        for image in document.images:
            if image.pixels is None:
                raise ValueError("an image has codes but no pixels; decode it before it is judged")
            pictures.setdefault(truth.world, []).append(image.pixels)
    seen = {world: iter(read_pictures(some, world)) for world, some in pictures.items()}
    return [_judge(document, truth, seen.get(truth.world, iter(()))) for document, truth in zip(documents, truths, strict=True)]


def _judge(document: Document, truth: Truth, seen: Iterator[Scene | None]) -> Verdict:
    pairs: list[tuple[str, Scene | None, bool]] = []  # text before a picture, what the picture shows, whether text was there
    text, closing, well_formed = "", "", True
    for segment in document:
        if isinstance(segment, Text):
            well_formed &= not text and bool(segment.text.strip())
            text = segment.text
        elif isinstance(segment, Image):
            well_formed &= bool(text)
            pairs.append((text, next(seen), bool(text)))
            text = ""
    closing = text
    well_formed &= len(pairs) == truth.num_steps and bool(closing) == (truth.answer is not None)

    world, terse = truth.world, truth.world.telling == "terse"
    told = [(language.parse_terse(words, world), None) if terse else language.parse_step(words, world) for words, _, _ in pairs]
    expected = [(event, None if terse else scene) for event, scene in zip(truth.events, truth.scenes, strict=True)]
    steps = []
    for i, scene in enumerate(truth.scenes):
        if i < len(pairs):
            steps.append((told[i] == expected[i], pairs[i][1] == scene))
        else:
            steps.append((False, False))
    texts = [text_right for text_right, _ in steps]
    if truth.answer is not None:
        texts.append(language.normalise(closing) == answer_text(truth.answer))
    format_rate, text_rate = float(well_formed), float(np.mean(texts))
    image_rate = float(np.mean([image_right for _, image_right in steps]))
    order_rate = _common_subsequence([event for event, _ in told], list(truth.events)) / max(len(told), truth.num_steps)
    whole = float(format_rate == text_rate == image_rate == order_rate == 1)
    steps_given, kept = _given([shown for _, shown, _ in pairs], told, truth)
    return Verdict(format_rate, text_rate, image_rate, order_rate, whole, tuple(steps), steps_given, kept)


def _given(
    shown: Sequence[Scene | None], told: Sequence[tuple[Event | None, Scene | None]], truth: Truth
) -> tuple[tuple[bool | None, ...], float]:
    """`Verdict.steps_given` and `Verdict.kept`; pictures beyond those that were asked for are not counted."""
    rights: list[bool | None] = []
    shares: list[float] = []
    history = [truth.start]
    for picture, (event, stated) in list(zip(shown, told, strict=True))[: truth.num_steps]:
        before = history[-1]
        if event is not None and event.verb == "again":
            before = history[event.picture - 1] if event.picture <= len(history) else None
        after = None if event is None or before is None else outcome(event, before, truth.world.places)
        must_show = after if truth.world.telling == "terse" else stated
        rights.append(None if must_show is None else picture == must_show)
        if after is not None and before is not None and event is not None:
            shares.append(_kept(picture, before, event))
        history.append(picture)
    rights += [False] * (truth.num_steps - len(rights))
    return tuple(rights), float(np.mean(shares)) if shares else 0.0


def _kept(picture: Scene | None, before: Scene, event: Event) -> float:
    """The share of things that `event` leaves alone, and of the background, that `picture` shows at their place as they were before."""
    if picture is None:
        return 0.0
    rights = [picture.places[i] == thing for i, thing in enumerate(before.places) if thing is not None and thing.kind != event.kind]
    if event.verb != "background":
        rights.append(picture.background == before.background)
    return float(np.mean(rights)) if rights else 1.0


def _common_subsequence(left: Sequence[Event | None], right: Sequence[Event]) -> int:
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]
