"""Scenes of the Storyboard world: what can be in a picture, what can happen to it, and which split it belongs to.

A scene has a background and places (left, middle, right), each empty or holding one thing, or in larger worlds two small ones that are
alike. Kinds are unique within a scene, so that "the ball" names one thing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from diptych.worlds.storyboard.world import CHARACTERS, COLOURS, FULL, KINDS, PLACES, World

Split = Literal["train", "validation", "test"]


@dataclasses.dataclass(frozen=True, order=True)
class Thing:
    """`colour` of a character is its coat's, `hat` its hat's; other things have none. `count`: 1, or 2 of them, which are small."""

    kind: str
    colour: str
    size: str
    count: int = 1
    hat: str = ""


@dataclasses.dataclass(frozen=True)
class Scene:
    """`places[i]` is the thing at the i-th place of the world, or None."""

    background: str
    places: tuple[Thing | None, ...]

    @property
    def things(self) -> list[Thing]:
        return [thing for thing in self.places if thing is not None]

    def find(self, kind: str) -> int | None:
        """Index of the place that holds `kind`, or None."""
        for index, thing in enumerate(self.places):
            if thing is not None and thing.kind == kind:
                return index
        return None

    def with_place(self, index: int, thing: Thing | None) -> Scene:
        places = list(self.places)
        places[index] = thing
        return Scene(self.background, tuple(places))


@dataclasses.dataclass(frozen=True)
class Event:
    """One thing that happens. `verb` decides which of the other fields are used:

    paint (kind, colour) | grow (kind) | shrink (kind) | move (kind, place) | leave (kind) |
    add (kind, colour, size, place, and of larger worlds count, hat) | background (background) |
    join (kind): one more of them | part (kind): one of two goes | dress (kind, hat) |
    again (picture): what the picture of that number showed, the prompt's being the first
    """

    verb: str
    kind: str = ""
    colour: str = ""
    size: str = ""
    place: str = ""
    background: str = ""
    count: int = 1
    hat: str = ""
    picture: int = 0

    def apply(self, scene: Scene, places: Sequence[str] = PLACES) -> Scene:
        """The scene after the event; `places` are those of the world, and `scene` for `again` is that of the picture it names. Raises
        ValueError where the event cannot happen."""
        if self.verb == "again":
            return scene
        if self.verb == "background":
            if self.background == scene.background:
                raise ValueError(f"the background already is {self.background}")
            return Scene(self.background, scene.places)
        here = scene.find(self.kind)
        if self.verb == "add":
            target = places.index(self.place)
            if here is not None or scene.places[target] is not None:
                raise ValueError(f"cannot add a {self.kind} at {self.place}: the kind or the place is taken")
            return scene.with_place(target, Thing(self.kind, self.colour, self.size, self.count, self.hat))
        if here is None:
            raise ValueError(f"there is no {self.kind} in the scene")
        thing = scene.places[here]
        assert thing is not None
        if self.verb == "leave":
            return scene.with_place(here, None)
        if self.verb == "move":
            target = places.index(self.place)
            if scene.places[target] is not None:
                raise ValueError(f"{self.place} is taken")
            return scene.with_place(here, None).with_place(target, thing)
        if self.verb == "paint":
            changed = dataclasses.replace(thing, colour=self.colour)
        elif self.verb in ("grow", "shrink"):
            if thing.hat or thing.count > 1:
                raise ValueError(f"{thing} cannot {self.verb}: characters keep their size, and two things have no room to grow")
            changed = dataclasses.replace(thing, size="big" if self.verb == "grow" else "small")
        elif self.verb in ("join", "part"):
            changed = dataclasses.replace(thing, count=thing.count + (1 if self.verb == "join" else -1))
            if thing.hat or thing.size != "small" or changed.count not in (1, 2):
                raise ValueError(f"one cannot {self.verb} {thing}: a place holds one thing, or two small ones that are no characters")
        elif self.verb == "dress":
            if not thing.hat:
                raise ValueError(f"the {self.kind} wears no hat")
            changed = dataclasses.replace(thing, hat=self.hat)
        else:
            raise ValueError(f"unknown verb {self.verb!r}")
        if changed == thing:
            raise ValueError(f"{self.verb} changes nothing for {thing}")
        return scene.with_place(here, changed)


def outcome(event: Event, scene: Scene, places: Sequence[str] = PLACES) -> Scene | None:
    """What a scene must show once `event` is told, also where it already was so: a big ball that grows is a big ball.

    None where nobody could say: what is told needs a place that is taken, or changes or moves a thing that is not there.
    """
    if event.verb == "leave" and scene.find(event.kind) is None:
        return scene
    try:
        return event.apply(scene, places)
    except ValueError:
        here = scene.find(event.kind)
        thing = None if here is None else scene.places[here]
        alone = thing is not None and thing.count == 1 and not thing.hat
        already = {
            "background": event.background == scene.background,
            "paint": thing is not None,
            "grow": alone,
            "shrink": alone,
            "move": here is not None and places[here] == event.place,
            "add": here is not None
            and places[here] == event.place
            and thing == Thing(event.kind, event.colour, event.size, event.count, event.hat),
            "dress": thing is not None and thing.hat == event.hat,
        }
        return scene if already.get(event.verb) else None


def pair_split(first: Thing, second: Thing, world: World = FULL) -> Split:
    """The split of a pair of things, by kind and colour: 1/8 of the pairs (`world.held_out`) are test, 1/8 validation, the rest train.

    Both things alone are seen in training; their combination is not. This is what makes the splits disjoint.
    """
    first, second = sorted((first, second))
    k1, k2 = _KIND_NUMBER[first.kind], _KIND_NUMBER[second.kind]
    c1, c2 = COLOURS.index(first.colour), COLOURS.index(second.colour)
    bucket = (c1 + 3 * c2 + 5 * k1 + k2) % world.held_out
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


_KIND_NUMBER = {kind: number for number, kind in enumerate((*KINDS, *CHARACTERS))}


def scene_splits(scene: Scene, world: World = FULL) -> set[Split]:
    """The splits of all pairs in the scene; a scene with fewer than two things belongs to every split (empty set)."""
    return {pair_split(a, b, world) for a, b in itertools.combinations(scene.things, 2)}


def in_split(scenes: list[Scene], split: Split, world: World = FULL) -> bool:
    """Whether a list of scenes (all those of one document) may be used in `split`.

    train: only training pairs. validation / test: at least one pair of that split and none of the other.
    """
    found: set[Split] = set().union(*(scene_splits(scene, world) for scene in scenes))
    if split == "train":
        return found <= {"train"}
    return split in found and found <= {"train", split}


def random_thing(rng: np.random.Generator, kind: str, world: World = FULL) -> Thing:
    colour = str(rng.choice(world.colours))
    if kind in world.characters:
        return Thing(kind, colour, "big", hat=str(rng.choice(world.colours)))
    size = str(rng.choice(world.sizes))
    count = int(rng.integers(1, world.max_count + 1)) if world.max_count > 1 and size == "small" else 1
    return Thing(kind, colour, size, count)


def random_scene(rng: np.random.Generator, num_things: int, world: World = FULL, cast: bool = False) -> Scene:
    """A scene with `num_things` things of different kinds at random places; `cast`: the world's characters are among them."""
    always = len(world.characters) if cast else 0
    if always:
        others = rng.choice(len(world.kinds), size=num_things - always, replace=False)
        kinds = np.concatenate([len(world.kinds) + np.arange(always), others])
    else:
        kinds = rng.choice(len(world.all_kinds), size=num_things, replace=False)
    indices = rng.choice(len(world.places), size=num_things, replace=False)
    places: list[Thing | None] = [None] * len(world.places)
    for index, kind in zip(indices, kinds, strict=True):
        places[int(index)] = random_thing(rng, world.all_kinds[int(kind)], world)
    return Scene(str(rng.choice(world.backgrounds)), tuple(places))
