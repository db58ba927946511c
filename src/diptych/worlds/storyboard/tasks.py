"""Prompts of the Storyboard world and the truth about their answers: task families, three of them after MMIE's.

- `story`: a scene, given as words or as a picture, and what happens to it; the answer tells and draws each event.
- `how_to`: a finished scene; the answer builds it thing by thing.
- `reasoning`: a scene, events and a question (count, track, compare) whose answer needs the steps in between; the
  document ends in the answer's text.

Under the terse telling (`world.TERSE`) a prompt shows a first picture and tells what happens (`story`), or which parts are added one by
one (`how_to`); each text of the answer is the sentence of one event, and its picture must remember the rest. Larger worlds have one more
family:

- `recall`: a story whose end must be looked up in its own pictures: a question about an earlier one (`ask`), answered in words, or one
  that is to be drawn again (`again`). Pictures are counted from the prompt's, which is the first.
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
from diptych.worlds.storyboard.world import FULL, World


@dataclasses.dataclass(frozen=True)
class Truth:
    """What a right answer contains: after `events[i]` the scene is `scenes[i]`; `answer` closes a document that ends in a question.

    `start`: the scene before the first event. `world`: whose grammar and pictures the answer has.
    """

    events: tuple[Event, ...]
    scenes: tuple[Scene, ...]
    answer: str | None = None
    start: Scene | None = None
    world: World = FULL

    @property
    def num_steps(self) -> int:
        return len(self.events)

    def document(self) -> Document:
        """A right answer: text and picture per step."""
        segments: list[Text | Image] = []
        for event, scene in zip(self.events, self.scenes, strict=True):
            segments += [Text(language.step_text(event, scene, self.world)), Image(render(scene, self.world))]
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
        return Event(verb, extra.kind, extra.colour, extra.size, str(rng.choice(free)), count=extra.count, hat=extra.hat)
    if not scene.things:
        return None
    thing = scene.things[int(rng.integers(len(scene.things)))]
    if verb == "move":
        return Event(verb, thing.kind, place=str(rng.choice(free))) if free else None
    if verb == "dress":
        return Event(verb, thing.kind, hat=str(rng.choice([c for c in world.colours if c != thing.hat]))) if thing.hat else None
    if verb in ("join", "part"):
        wanted = thing.size == "small" and not thing.hat and thing.count == (1 if verb == "join" else 2)
        return Event(verb, thing.kind) if wanted else None
    if verb == "paint":
        return Event(verb, thing.kind, colour=str(rng.choice([c for c in world.colours if c != thing.colour])))
    if (verb == "grow" and thing.size == "big") or (verb == "shrink" and thing.size == "small"):
        return None
    if verb in ("grow", "shrink") and (thing.hat or thing.count > 1):
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


def _given(rng: np.random.Generator, scene: Scene, world: World) -> list[Text | Image]:
    """The first scene as a picture or in words."""
    if rng.random() < 0.5:
        return [Image(render(scene, world))]
    return [Text(language.describe(scene, world) + " .")]


def _then(events: tuple[Event, ...], world: World) -> str:
    told = [language.tell(event, world) for event in events]
    return " , then ".join(["first " + told[0], *told[1:]]) + " ."


def _cast(rng: np.random.Generator, world: World) -> Scene:
    """The first scene of a story, with as many things as the world says, its characters among them."""
    return random_scene(rng, int(rng.integers(world.things[0], world.things[1] + 1)), world, cast=True)


def make_story(rng: np.random.Generator, world: World) -> Task:
    start = _cast(rng, world)
    count = int(rng.integers(world.events[0], world.events[1] + 1))
    events, scenes = _random_events(rng, start, count, world.verbs, world)
    if world.telling == "terse":
        return _terse("story", "tell the story with pictures .", start, events, scenes, world)
    prompt = Document((Text("tell the story ."), *_given(rng, start, world), Text(_then(events, world))))
    return Task("story", "story", prompt, start, Truth(events, scenes, start=start, world=world))


def make_how_to(rng: np.random.Generator, world: World) -> Task:
    target = random_scene(rng, int(rng.integers(world.things[0], world.things[1] + 1)), world)
    start = Scene(target.background, (None,) * len(world.places))
    events, scenes, scene = [], [], start
    for place, thing in zip(world.places, target.places, strict=True):
        if thing is not None:
            events.append(Event("add", thing.kind, thing.colour, thing.size, place, count=thing.count, hat=thing.hat))
            scene = events[-1].apply(scene, world.places)
            scenes.append(scene)
    if world.telling == "terse":
        return _terse("how_to", "build this with pictures .", start, tuple(events), tuple(scenes), world)
    prompt = Document((Text("how do we build this ?"), *_given(rng, target, world)))
    return Task("how_to", "how_to", prompt, start, Truth(tuple(events), tuple(scenes), start=start, world=world))


def _terse(
    family: str, asked: str, start: Scene, events: tuple[Event, ...], scenes: tuple[Scene, ...], world: World,
    *, kind: str = "", question: str = "", answer: str | None = None,
) -> Task:  # fmt: skip
    """The first picture and what happens; `asked` differs from the words of the full telling, so that both can be learned."""
    prompt = Document((Text(asked), Image(render(start, world)), Text(f"{_then(events, world)} {question}".strip())))
    return Task(family, kind or family, prompt, start, Truth(events, scenes, answer, start, world))


def make_recall(rng: np.random.Generator, world: World) -> Task:
    """Half of them ask about a picture that was drawn, half draw one again; never the last, which needs no looking back."""
    start, most = _cast(rng, world), world.events[1]
    kind = str(rng.choice(("ask", "again")))
    count = int(rng.integers(2, most + 1 if kind == "ask" else most))
    events, scenes = _random_events(rng, start, count, world.verbs, world)
    picture = int(rng.integers(2, count + 1))  # of start and scenes, counted from 1
    earlier = [start, *scenes][picture - 1]
    asked = "tell the story with pictures ."
    if kind == "again":
        again = Event("again", picture=picture)
        return _terse("recall", asked, start, (*events, again), (*scenes, earlier), world, kind=kind)
    if not earlier.things:
        return make_recall(rng, world)
    question, answer = look_up(rng, earlier, language.ORDINALS[picture - 1], world)
    return _terse("recall", asked, start, events, scenes, world, kind=kind, question=question, answer=answer)


def look_up(rng: np.random.Generator, scene: Scene, which: str, world: World) -> tuple[str, str]:
    """A question about a thing of an earlier picture (`which`: first, second, ...), and its answer."""
    thing = scene.things[int(rng.integers(len(scene.things)))]
    place = scene.find(thing.kind)
    assert place is not None
    facts = {"colour": (f"what colour was the {thing.kind}", thing.colour), "place": (f"where was the {thing.kind}", world.places[place])}
    if thing.hat:
        facts["hat"] = (f"what hat had the {thing.kind}", thing.hat)
    else:
        facts["size"] = (f"what size was the {thing.kind}", thing.size)
        facts["count"] = (f"how many {language.PLURALS[thing.kind]} were there", language.NUMBER_WORDS[thing.count])
    question, answer = facts[str(rng.choice(list(facts)))]
    return f"{question} in the {which} picture ?", answer


def make_reasoning(rng: np.random.Generator, world: World) -> Task:
    kind = str(rng.choice(("count", "track", "compare")))
    while True:
        start = random_scene(rng, int(rng.integers(1, min(4, len(world.places) + 1))) if kind == "count" else 2, world)
        verbs = {"count": ("add", "leave"), "track": ("move",), "compare": ("grow", "shrink")}[kind]
        count = int(rng.integers(1, 3)) if kind != "compare" else 1
        if kind == "compare" and start.things[0].size != start.things[1].size:
            continue
        events, scenes = _random_events(rng, start, count, verbs, world)
        break
    last = scenes[-1]
    if kind == "count":
        question, answer = "how many things are there ?", language.MORE_NUMBER_WORDS[len(last.things)]
    elif kind == "track":
        place = last.find(events[-1].kind)
        assert place is not None
        question, answer = f"where is the {events[-1].kind} ?", world.places[place]
    else:
        names = [thing.kind for thing in last.things]
        question = f"which is bigger , the {names[0]} or the {names[1]} ?"
        answer = next(thing.kind for thing in last.things if thing.size == "big")
    prompt = Document((*_given(rng, start, world), Text(f"{_then(events, world)} {question}")))
    return Task("reasoning", kind, prompt, start, Truth(events, scenes, answer, start, world))


_MAKERS: dict[str, Callable[[np.random.Generator, World], Task]] = {
    "story": make_story,
    "how_to": make_how_to,
    "reasoning": make_reasoning,
    "recall": make_recall,
}


def make_task(rng: np.random.Generator, split: Split, family: str | None = None, world: World = FULL) -> Task:
    """A task of `family` (or any) whose scenes, first and last included, all belong to `split`."""
    if family is None:
        family = world.families[int(rng.integers(len(world.families)))]
    if family not in world.families:
        raise ValueError(f"unknown task family {family!r}; known are {', '.join(world.families)}")
    while True:
        task = _MAKERS[family](rng, world)
        if in_split([task.start, *task.truth.scenes], split, world):
            return task


def task_stream(seed: int, split: Split, world: World = FULL) -> Iterator[Task]:
    """Endless tasks, families in turn. The same seed, split and world give the same tasks."""
    rng = np.random.default_rng([seed, ("train", "validation", "test").index(split)])
    while True:
        for family in world.families:
            yield make_task(rng, split, family, world)
