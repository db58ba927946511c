"""Prompts of the Storyboard world and the truth about their answers: three task families after MMIE's.

- `story`: a scene, given as words or as a picture, and what happens to it; the answer tells and draws each event.
- `how_to`: a finished scene; the answer builds it thing by thing.
- `reasoning`: a scene, events and a question (count, track, compare) whose answer needs the steps in between; the
  document ends in the answer's text.

Under the terse telling (`world.TERSE`) a prompt shows a first picture and tells what happens (`story`), or which parts are added one by
one (`how_to`); each text of the answer is the sentence of one event, and its picture must remember the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from diptych.document import Document, Image, Text
from diptych.worlds.storyboard import language
from diptych.worlds.storyboard.render import render
from diptych.worlds.storyboard.scene import Event, Scene, Split, in_split, random_scene
from diptych.worlds.storyboard.world import FULL, Telling, World


@dataclasses.dataclass(frozen=True)
class Truth:
    """What a right answer contains: after `events[i]` the scene is `scenes[i]`; `answer` closes a reasoning document.

    `start`: the scene before the first event. `telling`: how much a text of the answer says.
    """

    events: tuple[Event, ...]
    scenes: tuple[Scene, ...]
    answer: str | None = None
    start: Scene | None = None
    telling: Telling = "full"

    @property
    def num_steps(self) -> int:
        return len(self.events)

    def document(self) -> Document:
        """A right answer: text and picture per step."""
        segments: list[Text | Image] = []
        for event, scene in zip(self.events, self.scenes, strict=True):
            segments += [Text(language.step_text(event, scene, self.telling)), Image(render(scene))]
        if self.answer is not None:
            segments.append(Text(answer_text(self.answer)))
        return Document(tuple(segments))


@dataclasses.dataclass(frozen=True)
class Task:
    """A prompt with its truth. `start` is the scene before the first event."""

    family: str
    kind: str
    prompt: Document
    start: Scene
    truth: Truth

    @property
    def columns(self) -> dict[str, Any]:
        """What the prompt asks for in form, as a data set's columns: rewards may know this much of the truth."""
        return {"num_images": self.truth.num_steps, "ends_with_text": self.truth.answer is not None}


def answer_text(answer: str) -> str:
    return f"the answer is {answer} ."


def random_event(rng: np.random.Generator, scene: Scene, verbs: tuple[str, ...], world: World = FULL) -> Event | None:
    """A random event that can happen in `scene`, or None where the drawn verb finds nothing to do."""
    verb = str(rng.choice(verbs))
    if verb == "background":
        return Event(verb, background=str(rng.choice([b for b in world.backgrounds if b != scene.background])))
    free = [place for place, thing in zip(world.places, scene.places, strict=True) if thing is None]
    if verb == "add":
        extra = random_scene(rng, 1, world).things[0]
        if not free or scene.find(extra.kind) is not None:
            return None
        return Event(verb, extra.kind, extra.colour, extra.size, str(rng.choice(free)))
    if not scene.things:
        return None
    thing = scene.things[int(rng.integers(len(scene.things)))]
    if verb == "move":
        return Event(verb, thing.kind, place=str(rng.choice(free))) if free else None
    if verb == "paint":
        return Event(verb, thing.kind, colour=str(rng.choice([c for c in world.colours if c != thing.colour])))
    if (verb == "grow" and thing.size == "big") or (verb == "shrink" and thing.size == "small"):
        return None
    return Event(verb, thing.kind)


def _random_events(
    rng: np.random.Generator, start: Scene, count: int, verbs: tuple[str, ...], world: World
) -> tuple[tuple[Event, ...], tuple[Scene, ...]]:
    events: list[Event] = []
    scenes = [start]
    while len(events) < count:
        event = random_event(rng, scenes[-1], verbs, world)
        if event is None:
            continue
        after = event.apply(scenes[-1], world.places)
        if after not in scenes:  # nothing is undone: every step shows something new
            events.append(event)
            scenes.append(after)
    return tuple(events), tuple(scenes[1:])


def _given(rng: np.random.Generator, scene: Scene) -> list[Text | Image]:
    """The first scene as a picture or in words."""
    if rng.random() < 0.5:
        return [Image(render(scene))]
    return [Text(language.describe(scene) + " .")]


def _then(events: tuple[Event, ...]) -> str:
    return " , then ".join(["first " + language.tell(events[0]), *map(language.tell, events[1:])]) + " ."


def make_story(rng: np.random.Generator, world: World) -> Task:
    start = random_scene(rng, int(rng.integers(world.things[0], world.things[1] + 1)), world)
    count = int(rng.integers(world.events[0], world.events[1] + 1))
    events, scenes = _random_events(rng, start, count, world.verbs, world)
    if world.telling == "terse":
        return _terse("story", "tell the story with pictures .", start, events, scenes)
    prompt = Document((Text("tell the story ."), *_given(rng, start), Text(_then(events))))
    return Task("story", "story", prompt, start, Truth(events, scenes, start=start))


def make_how_to(rng: np.random.Generator, world: World) -> Task:
    target = random_scene(rng, int(rng.integers(world.things[0], world.things[1] + 1)), world)
    start = Scene(target.background, (None,) * len(world.places))
    events, scenes, scene = [], [], start
    for place, thing in zip(world.places, target.places, strict=True):
        if thing is not None:
            events.append(Event("add", thing.kind, thing.colour, thing.size, place))
            scene = events[-1].apply(scene, world.places)
            scenes.append(scene)
    if world.telling == "terse":
        return _terse("how_to", "build this with pictures .", start, tuple(events), tuple(scenes))
    shown: list[Text | Image] = [Image(render(target))] if rng.random() < 0.5 else [Text(language.describe(target) + " .")]
    prompt = Document((Text("how do we build this ?"), *shown))
    return Task("how_to", "how_to", prompt, start, Truth(tuple(events), tuple(scenes), start=start))


def _terse(family: str, asked: str, start: Scene, events: tuple[Event, ...], scenes: tuple[Scene, ...]) -> Task:
    """The first picture and what happens; `asked` differs from the words of the full telling, so that both can be learned."""
    prompt = Document((Text(asked), Image(render(start)), Text(_then(events))))
    return Task(family, family, prompt, start, Truth(events, scenes, start=start, telling="terse"))


def make_reasoning(rng: np.random.Generator, world: World) -> Task:
    kind = str(rng.choice(("count", "track", "compare")))
    while True:
        start = random_scene(rng, int(rng.integers(1, 4)) if kind == "count" else 2, world)
        verbs = {"count": ("add", "leave"), "track": ("move",), "compare": ("grow", "shrink")}[kind]
        count = int(rng.integers(1, 3)) if kind != "compare" else 1
        if kind == "compare" and start.things[0].size != start.things[1].size:
            continue
        events, scenes = _random_events(rng, start, count, verbs, world)
        break
    last = scenes[-1]
    if kind == "count":
        question, answer = "how many things are there ?", language.NUMBER_WORDS[len(last.things)]
    elif kind == "track":
        place = last.find(events[-1].kind)
        assert place is not None
        question, answer = f"where is the {events[-1].kind} ?", world.places[place]
    else:
        names = [thing.kind for thing in last.things]
        question = f"which is bigger , the {names[0]} or the {names[1]} ?"
        answer = next(thing.kind for thing in last.things if thing.size == "big")
    prompt = Document((*_given(rng, start), Text(f"{_then(events)} {question}")))
    return Task("reasoning", kind, prompt, start, Truth(events, scenes, answer, start))


_MAKERS: dict[str, Callable[[np.random.Generator, World], Task]] = {
    "story": make_story,
    "how_to": make_how_to,
    "reasoning": make_reasoning,
}


def make_task(rng: np.random.Generator, split: Split, family: str | None = None, world: World = FULL) -> Task:
    """A task of `family` (or any) whose scenes, first and last included, all belong to `split`."""
    if family is None:
        family = world.families[int(rng.integers(len(world.families)))]
    if family not in world.families:
        raise ValueError(f"unknown task family {family!r}; known are {', '.join(world.families)}")
    while True:
        task = _MAKERS[family](rng, world)
        if in_split([task.start, *task.truth.scenes], split):
            return task


def task_stream(seed: int, split: Split, world: World = FULL) -> Iterator[Task]:
    """Endless tasks, families in turn. The same seed, split and world give the same tasks."""
    rng = np.random.default_rng([seed, ("train", "validation", "test").index(split)])
    while True:
        for family in world.families:
            yield make_task(rng, split, family, world)
