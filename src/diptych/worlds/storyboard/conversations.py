"""What the packaged base model learns from: conversations whose answers are pictures OR words, never both.

Drawing, describing, answering and telling all happen amid other text and pictures, at varying offsets, so that they
survive context. No answer is interleaved: that is left for warm-up, as with a real unified model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from diptych.document import Document, Image, Text
from diptych.worlds.storyboard import language
from diptych.worlds.storyboard.render import render
from diptych.worlds.storyboard.scene import Event, Scene, Split, in_split, random_scene
from diptych.worlds.storyboard.tasks import answer_text, look_up, make_task, random_event
from diptych.worlds.storyboard.world import FULL, TERSE, World

Turn = tuple[Document, Document]
NEXT_PICTURE = "draw the next picture ."
VERBS = ("paint", "grow", "shrink", "move", "leave", "background", "add")  # of the standard world


def verbs_of(world: World) -> tuple[str, ...]:
    """All that can happen: what happens in stories, and that something is added."""
    return tuple(dict.fromkeys((*world.verbs, "add")))


def scene_of(rng: np.random.Generator, split: Split, at_least: int = 0, world: World = FULL) -> Scene:
    most = world.things[1]
    shares = np.array((0.04, 0.26, *[0.7 / (most - 1)] * (most - 1)))
    while True:
        scene = random_scene(rng, int(rng.choice(most + 1, p=shares)), world)
        if len(scene.things) >= at_least and in_split([scene], split, world):
            return scene


def happening(rng: np.random.Generator, split: Split, world: World) -> tuple[Scene, Event, Scene]:
    """A scene, something that can happen to it, and the scene after it."""
    while True:
        scene = scene_of(rng, split, world=world)
        event = random_event(rng, scene, verbs_of(world), world)
        if event is not None and in_split([scene, event.apply(scene, world.places)], split, world):
            return scene, event, event.apply(scene, world.places)


def doc(*parts: str | Scene, world: World = FULL) -> Document:
    """Strings are text, scenes are pictures."""
    return Document(tuple(Text(p) if isinstance(p, str) else Image(render(p, world)) for p in parts))


def _shown(rng: np.random.Generator, scene: Scene, pictures: float, world: World) -> str | Scene:
    """The scene as a picture with a share of `pictures`, otherwise in words."""
    return scene if rng.random() < pictures else language.describe(scene, world) + " ."


def turn_draw(rng: np.random.Generator, split: Split, world: World = FULL) -> Turn:
    return drawing(rng, split, world)[0]


def drawing(rng: np.random.Generator, split: Split, world: World = FULL) -> tuple[Turn, str]:
    """A turn, and the words that its picture shall show."""
    scene = scene_of(rng, split, world=world)
    words = caption = f"{language.describe(scene, world)} ."
    if rng.random() < 0.5:
        event = random_event(rng, scene_of(rng, split, 1, world), verbs_of(world), world)
        if event is not None:
            words = f"{language.tell(event, world)} . {words}"
    lead = str(rng.choice(("draw this .", "draw :", "draw a picture .", "now draw")))
    return (doc(f"{lead} {words}"), doc(scene, world=world)), caption


def turn_describe(rng: np.random.Generator, split: Split, world: World = FULL) -> Turn:
    scene = scene_of(rng, split, world=world)
    words = language.describe(scene, world) + " ."
    if rng.random() < 0.35:
        other = scene_of(rng, split, world=world)
        which, first, second = ("first", scene, other) if rng.random() < 0.5 else ("last", other, scene)
        return doc(first, second, f"describe the {which} picture .", world=world), doc(words)
    if rng.random() < 0.5:
        return doc("describe this picture .", scene, world=world), doc(words)
    return doc(scene, "what do we see ?", world=world), doc(words)


def turn_question(rng: np.random.Generator, split: Split, world: World = FULL) -> Turn:
    """A question about a picture or a described scene."""
    scene = scene_of(rng, split, 1, world)
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
        question, answer = f"where is the {thing.kind} ?", world.places[place]
    elif kind == "place":
        question, answer = f"what is {language.place_phrases(world)[world.places[place]]} ?", thing.kind
    elif world.max_count > 1 and not thing.hat:
        question, answer = f"how many {language.PLURALS[thing.kind]} are there ?", language.NUMBER_WORDS[thing.count]
    else:
        question, answer = "how many things are there ?", language.MORE_NUMBER_WORDS[len(scene.things)]
    return doc(_shown(rng, scene, 0.7, world), question, world=world), doc(answer_text(answer))


def turn_event(rng: np.random.Generator, split: Split, world: World = FULL) -> Turn:
    """A scene, an event, and what is there afterwards, in words."""
    scene, event, after = happening(rng, split, world)
    asked = f"{language.tell(event, world)} . what do we see now ?"
    return doc(_shown(rng, scene, 0.5, world), asked, world=world), doc(language.describe(after, world) + " .")


def turn_facts(rng: np.random.Generator, split: Split, world: World = FULL) -> Turn:
    """A scene, and what its things are, thing by thing in any order, some twice: `the ball is red small on the left .`

    Each is a lookup by name whose value stands right behind the name; that is the form in which looking up is learned first.
    """
    scene = scene_of(rng, split, 2, world)
    facts = []
    for _ in range(int(rng.integers(4, 7))):
        thing = scene.things[int(rng.integers(len(scene.things)))]
        place = scene.find(thing.kind)
        assert place is not None
        looks = [thing.colour, thing.hat or thing.size, *(["two"] if thing.count > 1 else [])]
        facts.append(f"the {thing.kind} is {' '.join(looks)} {language.place_phrases(world)[world.places[place]]} .")
    return doc(_shown(rng, scene, 0.5, world), "tell of the things .", world=world), doc(" ".join(facts))


def turn_edit(rng: np.random.Generator, split: Split, world: World = FULL) -> Turn:
    """A picture, an event, and the picture of what is there afterwards."""
    scene, event, after = happening(rng, split, world)
    return doc(scene, f"{language.tell(event, world)} . {NEXT_PICTURE}", world=world), doc(after, world=world)


def turn_recount(rng: np.random.Generator, split: Split, world: World = TERSE) -> Turn:
    """A terse task answered in words alone: the sentence of each event, and the answer to its question."""
    return _in_words(rng, split, world if world.telling == "terse" else TERSE)


def turn_tell(rng: np.random.Generator, split: Split, world: World = FULL) -> Turn:
    """A whole task answered in words alone."""
    return _in_words(rng, split, world)


def _in_words(rng: np.random.Generator, split: Split, world: World) -> Turn:
    task = make_task(rng, split, world=world)
    words = " ".join(s.text for s in task.truth.document() if isinstance(s, Text))
    return Document((Text("say it in words ."), *task.prompt.segments)), doc(words)


def _pictures_of_a_story(rng: np.random.Generator, split: Split, world: World) -> list[Scene]:
    task = make_task(rng, split, "story", world)
    scenes = [task.start, *task.truth.scenes]
    return scenes[: int(rng.integers(2, len(scenes) + 1))]


def turn_look_up(rng: np.random.Generator, split: Split, world: World) -> Turn:
    """The pictures of a story, and a question about one of them."""
    scenes = _pictures_of_a_story(rng, split, world)
    which = int(rng.integers(len(scenes)))
    if not scenes[which].things:
        return turn_look_up(rng, split, world)
    question, answer = look_up(rng, scenes[which], language.ORDINALS[which], world)
    return doc(*scenes, question, world=world), doc(answer_text(answer))


def turn_again(rng: np.random.Generator, split: Split, world: World) -> Turn:
    """The pictures of a story, and one of them drawn again."""
    scenes = _pictures_of_a_story(rng, split, world)
    which = int(rng.integers(len(scenes)))
    asked = f"{language.tell(Event('again', picture=which + 1), world)} . {NEXT_PICTURE}"
    return doc(*scenes, asked, world=world), doc(scenes[which], world=world)


def turn_continue(rng: np.random.Generator, split: Split, world: World) -> Turn:
    """The pictures of a story so far, what happens next, and the picture of it."""
    task = make_task(rng, split, "story", world)
    step = int(rng.integers(task.truth.num_steps))
    earlier = [task.start, *task.truth.scenes][: step + 1]
    asked = f"{language.tell(task.truth.events[step], world)} . {NEXT_PICTURE}"
    return doc(*earlier, asked, world=world), doc(task.truth.scenes[step], world=world)


def follow_up(turn: Turn, world: World = FULL) -> Turn | None:
    """ "draw it .": the picture of the scene that the last answer described; None where it described none."""
    sentences = [s for s in turn[1].text.split(" .") if s.strip()]
    scene = language.parse_scene(sentences[-1], world) if sentences else None
    return None if scene is None else (doc("draw it ."), doc(scene, world=world))


Maker = Callable[[np.random.Generator, Split, World], Turn]
TURNS: dict[str, tuple[float, Maker]] = {
    "draw": (0.20, turn_draw),
    "describe": (0.12, turn_describe),
    "question": (0.09, turn_question),
    "facts": (0.05, turn_facts),
    "event": (0.26, turn_event),
    "tell": (0.28, turn_tell),
    "edit": (0.60, turn_edit),
    "recount": (0.04, turn_recount),
}
RECALL_TURNS: dict[str, tuple[float, Maker]] = {  # of worlds in which pictures must be looked up; nothing there is told in full
    "draw": (0.25, turn_draw),
    "describe": (0.15, turn_describe),
    "question": (0.10, turn_question),
    "facts": (0.05, turn_facts),
    "event": (0.15, turn_event),
    "edit": (0.40, turn_edit),
    "continue": (0.20, turn_continue),
    "look_up": (0.15, turn_look_up),
    "again": (0.10, turn_again),
    "recount": (0.10, turn_recount),
}


def turns_of(world: World) -> Mapping[str, tuple[float, Maker]]:
    """The kinds of turns of a world, with their weights."""
    return RECALL_TURNS if "recall" in world.families else TURNS


def make_turn(
    rng: np.random.Generator, kind: str | None = None, split: Split = "train", kinds: Sequence[str] | None = None, world: World = FULL
) -> Turn:
    """A prompt and an answer of one kind of `turns_of(world)` or, by weight, any of `kinds` (None: all)."""
    turns = turns_of(world)
    if kind is None:
        some = tuple(turns) if kinds is None else kinds
        weights = np.array([turns[name][0] for name in some])
        kind = some[int(rng.choice(len(some), p=weights / weights.sum()))]
    return turns[kind][1](rng, split, world)
