"""The settings of a world: what can be in a picture, what can happen, how long a task is, how large its pictures are, and how much its
texts tell. Every constant of Storyboard is a default here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

KINDS = ("ball", "box", "tree", "house", "boat", "flower")
CHARACTERS = ("girl", "boy")
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange")
SIZES = ("small", "big")
PLACES = ("left", "middle", "right")
BACKGROUNDS = ("meadow", "beach", "snow", "night")
COLUMN_NAMES = ("far left", *PLACES, "far right")
ROW_NAMES = {1: ("",), 2: ("back", "front")}

Telling = Literal["full", "terse"]
FAMILIES = ("story", "how_to", "reasoning")
ALL_FAMILIES = (*FAMILIES, "recall")
STORY_VERBS = ("paint", "grow", "shrink", "move", "leave", "background")
ALL_VERBS = (*STORY_VERBS, "add", "join", "part", "dress")
CANVAS = 384  # pixels a side at which pictures are drawn before they are reduced


@dataclasses.dataclass(frozen=True)
class World:
    """A world is described by its values alone, so a larger one is another instance. The defaults are the standard world.

    telling: `full`, a text tells the event and then the whole scene that its picture shows. `terse`, it tells the event alone, and what the
    scene was must be read from the pictures before.
    families: which tasks there are; `reasoning` is told in full only, `recall` tersely only.
    kinds, colours, sizes, backgrounds: what pictures hold. Each name needs words (`language.py`) and a drawing (`render.py`).
    characters: kinds that wear a coat (their colour) and a hat, have one size, and are in the first scene of every story and recall task.
    max_count: most things of one kind at a place; more than one are small and alike.
    columns: names of places from left to right. rows: 1, or 2: what stands in front hides part of what stands behind it.
    things: fewest and most in the first scene of a story (characters included), and in what a how-to builds.
    events: fewest and most of a story, each with a picture.
    verbs: what can happen in a story.
    held_out: one of so many pairs of kind and colour is for the test split, and one for validation (`scene.pair_split`).
    pixels: a side of the picture.
    """

    telling: Telling = "full"
    families: tuple[str, ...] = FAMILIES
    kinds: tuple[str, ...] = KINDS
    colours: tuple[str, ...] = COLOURS
    sizes: tuple[str, ...] = SIZES
    columns: tuple[str, ...] = PLACES
    backgrounds: tuple[str, ...] = BACKGROUNDS
    things: tuple[int, int] = (2, 3)
    events: tuple[int, int] = (2, 3)
    verbs: tuple[str, ...] = STORY_VERBS
    characters: tuple[str, ...] = ()
    max_count: int = 1
    rows: int = 1
    held_out: int = 8
    pixels: int = 96

    @functools.cached_property
    def places(self) -> tuple[str, ...]:
        """Names of all places, row by row, the back row first: `back left`; with one row the columns' own."""
        return tuple(f"{row} {column}".strip() for row in ROW_NAMES[self.rows] for column in self.columns)

    @functools.cached_property
    def all_kinds(self) -> tuple[str, ...]:
        return (*self.kinds, *self.characters)

    @functools.cached_property
    def looks(self) -> World:
        """The same pictures without the tasks, so that worlds that look alike share what is drawn."""
        things = max(1, len(self.characters))
        return dataclasses.replace(
            self, telling="terse", families=("story",), things=(things, things), events=(1, 1), verbs=("move",), held_out=8
        )

    def __post_init__(self) -> None:
        """Raises ValueError for settings that no picture or task can meet."""
        if unknown := set(self.families) - set(ALL_FAMILIES):
            raise ValueError(f"unknown task family {min(unknown)!r}; known are {', '.join(ALL_FAMILIES)}")
        if self.telling == "terse" and "reasoning" in self.families:
            raise ValueError("the family 'reasoning' has no terse telling; leave it out of `families`, or tell in full")
        known = {
            "kinds": KINDS, "characters": CHARACTERS, "colours": COLOURS, "sizes": SIZES, "columns": COLUMN_NAMES,
            "backgrounds": BACKGROUNDS, "verbs": ALL_VERBS,
        }  # fmt: skip
        for name, names in known.items():
            given = getattr(self, name)
            if unknown := set(given) - set(names):
                raise ValueError(f"{name} has {min(unknown)!r}, for which there are no words and no drawing; known are {', '.join(names)}")
            if len(set(given)) < len(given):
                raise ValueError(f"{name} is {given}; a name stands there twice")
        if len(self.columns) < 2 or list(self.columns) != [name for name in COLUMN_NAMES if name in self.columns]:
            raise ValueError(f"columns is {self.columns}; give two or more of {', '.join(COLUMN_NAMES)}, from left to right")
        if self.rows not in ROW_NAMES:
            raise ValueError(f"rows is {self.rows}; pictures have 1 row of places, or 2 (the back and the front)")
        if not 1 <= self.max_count <= 2:
            raise ValueError(f"max_count is {self.max_count}; a place has room for 1 thing, or for 2 small ones")
        if CANVAS % self.pixels or self.pixels < 48:
            sizes = [side for side in range(48, CANVAS + 1) if CANVAS % side == 0]
            raise ValueError(f"pixels is {self.pixels}; pictures are reduced from {CANVAS} pixels a side, so it is one of {sizes}")
        if self.pixels % len(self.columns):
            raise ValueError(f"pixels is {self.pixels}, which {len(self.columns)} columns do not divide; choose another number of either")
        if self.held_out < 3:
            raise ValueError(f"held_out is {self.held_out}; at least 3, or no pair of things is left for training")
        self._check_tasks()

    def _check_tasks(self) -> None:
        fewest, most = self.things
        if not 1 <= fewest <= most <= min(len(self.places), len(self.all_kinds)):
            raise ValueError(f"things is {self.things}; it must be from 1 to the number of places and kinds, fewest first")
        if fewest < len(self.characters):
            raise ValueError(f"things is {self.things}, and {len(self.characters)} characters are in every story; begin with as many")
        if not 1 <= self.events[0] <= self.events[1]:
            raise ValueError(f"events is {self.events}; it must be 1 or more, fewest first")
        if self.events[1] > 5:
            raise ValueError(f"events is {self.events}; there are words for 5 pictures and the one of the prompt at most")
        if self.telling == "full" and (self.characters or self.max_count > 1 or self.rows > 1 or "recall" in self.families):
            raise ValueError("characters, counts, two rows and the family 'recall' are told tersely; set telling to 'terse'")
        if "reasoning" in self.families and (len(self.places) < 3 or self.things[0] < 2):
            raise ValueError("the family 'reasoning' moves and compares two things: it needs three places, and `things` from 2 on")
        if {"join", "part"} & set(self.verbs) and self.max_count == 1:
            raise ValueError("verbs has 'join' or 'part', which need a max_count of 2")
        if "dress" in self.verbs and not self.characters:
            raise ValueError("verbs has 'dress', which needs characters")


FULL = World()
TERSE = World(telling="terse", families=("story", "how_to"))
LONG = World(telling="terse", families=("story",), events=(5, 5))
LARGE = World(
    telling="terse", families=("story", "how_to", "recall"), characters=CHARACTERS, max_count=2, rows=2, things=(3, 4), events=(3, 5),
    verbs=("paint", "grow", "shrink", "move", "leave", "background", "add", "join", "part", "dress"), held_out=16,
)  # fmt: skip
LARGE_128 = dataclasses.replace(LARGE, columns=("far left", "left", "right", "far right"), things=(3, 5), pixels=128)

WORLDS: dict[str, dict[str, World]] = {
    "standard": {"full": FULL, "terse": TERSE},
    "long": {"terse": LONG},
    "large": {"terse": LARGE},
    "large_128": {"terse": LARGE_128},
}
"""By name, then by telling."""


def world_named(name: str, telling: str) -> World:
    """Raises ValueError for a world or a telling that there is not."""
    if name not in WORLDS:
        raise ValueError(f"there is no world {name!r}; known are {', '.join(WORLDS)}")
    if telling not in WORLDS[name]:
        raise ValueError(f"the world {name!r} has no telling {telling!r}; set telling to {' or '.join(WORLDS[name])}")
    return WORLDS[name][telling]


def look_alike(one: str, other: str) -> bool:
    """Whether what knows the words and pictures of one world knows those of the other: their tasks alone differ."""
    return world_named(one, "terse").looks == world_named(other, "terse").looks
