"""What the packaged base model learns from: conversations whose answers are pictures OR words, never both.

Drawing, describing, answering and telling all happen amid other text and pictures, at varying offsets, so that they
survive context. No answer is interleaved: that is left for warm-up, as with a real unified model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from diptych.document import Document, Image, Text
from diptych.worlds.storyboard import language
from diptych.worlds.storyboard.render import render
from diptych.worlds.storyboard.scene import Scene, Split, in_split, random_scene
from diptych.worlds.storyboard.tasks import Task, answer_text, make_task, random_event
from diptych.worlds.storyboard.world import PLACES, TERSE

Turn = tuple[Document, Document]
NEXT_PICTURE = "draw the next picture ."
VERBS = ("paint", "grow", "shrink", "move", "leave", "background", "add")


def scene_of(rng: np.random.Generator, split: Split, at_least: int = 0) -> Scene:
    while True:
        scene = random_scene(rng, int(rng.choice(4, p=(0.04, 0.26, 0.35, 0.35))))
        if len(scene.things) >= at_least and in_split([scene], split):
            return scene


def doc(*parts: str | Scene) -> Document:
    """Strings are text, scenes are pictures."""
    return Document(tuple(Text(p) if isinstance(p, str) else Image(render(p)) for p in parts))


def turn_draw(rng: np.random.Generator, split: Split) -> Turn:
    return drawing(rng, split)[0]


def drawing(rng: np.random.Generator, split: Split) -> tuple[Turn, str]:
    """A turn, and the words that its picture shall show."""
    scene = scene_of(rng, split)
    words = caption = f"{language.describe(scene)} ."
    if rng.random() < 0.5:
        event = random_event(rng, scene_of(rng, split, 1), VERBS)
        if event is not None:
            words = f"{language.tell(event)} . {words}"
    lead = str(rng.choice(("draw this .", "draw :", "draw a picture .", "now draw")))
    return (doc(f"{lead} {words}"), doc(scene)), caption


def turn_describe(rng: np.random.Generator, split: Split) -> Turn:
    scene = scene_of(rng, split)
    words = language.describe(scene) + " ."
    if rng.random() < 0.35:
        other = scene_of(rng, split)
        which, first, second = ("first", scene, other) if rng.random() < 0.5 else ("last", other, scene)
        return doc(first, second, f"describe the {which} picture ."), doc(words)
    if rng.random() < 0.5:
        return doc("describe this picture .", scene), doc(words)
    return doc(scene, "what do we see ?"), doc(words)


def turn_question(rng: np.random.Generator, split: Split) -> Turn:
    """A question about a picture or a described scene."""
    scene = scene_of(rng, split, 1)
    thing = scene.things[int(rng.integers(len(scene.things)))]
    place = scene.find(thing.kind)
    assert place is not None
    sizes = {t.size for t in scene.things}
    kind = str(rng.choice(("colour", "size", "where", "count", "place", "bigger")))
    if kind == "bigger" and len(scene.things) == 2 and len(sizes) == 2:
        names = [t.kind for t in scene.things]
        question = f"which is bigger , the {names[0]} or the {names[1]} ?"
        answer = next(t.kind for t in scene.things if t.size == "big")
    elif kind == "colour":
        question, answer = f"what colour is the {thing.kind} ?", thing.colour
    elif kind == "size":
        question, answer = f"what size is the {thing.kind} ?", thing.size
    elif kind == "where":
        question, answer = f"where is the {thing.kind} ?", PLACES[place]
    elif kind == "place":
        question, answer = f"what is {language.PLACE_PHRASES[PLACES[place]]} ?", thing.kind
    else:
        question, answer = "how many things are there ?", language.NUMBER_WORDS[len(scene.things)]
    shown: str | Scene = scene if rng.random() < 0.7 else language.describe(scene) + " ."
    return doc(shown, question), doc(answer_text(answer))


def turn_event(rng: np.random.Generator, split: Split) -> Turn:
    """A scene, an event, and what is there afterwards, in words."""
    while True:
        scene = scene_of(rng, split)
        event = random_event(rng, scene, VERBS)
        if event is not None and in_split([scene, event.apply(scene)], split):
            break
    shown: str | Scene = scene if rng.random() < 0.5 else language.describe(scene) + " ."
    return doc(shown, f"{language.tell(event)} . what do we see now ?"), doc(language.describe(event.apply(scene)) + " .")


def turn_facts(rng: np.random.Generator, split: Split) -> Turn:
    """A scene, and what its things are, thing by thing in any order, some twice: `the ball is red small on the left .`

    Each is a lookup by name whose value stands right behind the name; that is the form in which looking up is learned first.
    """
    scene = scene_of(rng, split, 2)
    facts = []
    for _ in range(int(rng.integers(4, 7))):
        thing = scene.things[int(rng.integers(len(scene.things)))]
        place = scene.find(thing.kind)
        assert place is not None
        facts.append(f"the {thing.kind} is {thing.colour} {thing.size} {language.PLACE_PHRASES[PLACES[place]]} .")
    shown: str | Scene = scene if rng.random() < 0.5 else language.describe(scene) + " ."
    return doc(shown, "tell of the things ."), doc(" ".join(facts))


def turn_edit(rng: np.random.Generator, split: Split) -> Turn:
    """A picture, an event, and the picture of what is there afterwards."""
    while True:
        scene = scene_of(rng, split)
        event = random_event(rng, scene, VERBS)
        if event is not None and in_split([scene, event.apply(scene)], split):
            return doc(scene, f"{language.tell(event)} . {NEXT_PICTURE}"), doc(event.apply(scene))


def turn_recount(rng: np.random.Generator, split: Split) -> Turn:
    """A terse task answered in words alone: the sentence of each event."""
    task = make_task(rng, split, world=TERSE)
    words = " ".join(s.text for s in task.truth.document() if isinstance(s, Text))
    return Document((Text("say it in words ."), *task.prompt.segments)), doc(words)


def turn_tell(rng: np.random.Generator, split: Split) -> Turn:
    """A whole task answered in words alone."""
    task: Task = make_task(rng, split)
    words = " ".join(s.text for s in task.truth.document() if isinstance(s, Text))
    return Document((Text("say it in words ."), *task.prompt.segments)), doc(words)


def follow_up(turn: Turn) -> Turn | None:
    """ "draw it .": the picture of the scene that the last answer described; None where it described none."""
    sentences = [s for s in turn[1].text.split(" .") if s.strip()]
    scene = language.parse_scene(sentences[-1]) if sentences else None
    return None if scene is None else (doc("draw it ."), doc(scene))


TURNS: dict[str, tuple[float, Callable[[np.random.Generator, Split], Turn]]] = {
    "draw": (0.20, turn_draw),
    "describe": (0.12, turn_describe),
    "question": (0.09, turn_question),
    "facts": (0.05, turn_facts),
    "event": (0.26, turn_event),
    "tell": (0.28, turn_tell),
    "edit": (0.60, turn_edit),
    "recount": (0.04, turn_recount),
}


def make_turn(rng: np.random.Generator, kind: str | None = None, split: Split = "train", kinds: Sequence[str] = tuple(TURNS)) -> Turn:
    """A prompt and an answer of one kind of `TURNS` or, by weight, any of `kinds`."""
    if kind is None:
        weights = np.array([TURNS[name][0] for name in kinds])
        kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
    return TURNS[kind][1](rng, split)
