"""The settings of a world: what can be in a picture, what can happen, how long a task is, and how much its texts tell."""

from __future__ import annotations

import dataclasses
from typing import Literal

KINDS = ("ball", "box", "tree", "house", "boat", "flower")
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange")
SIZES = ("small", "big")
PLACES = ("left", "middle", "right")
BACKGROUNDS = ("meadow", "beach", "snow", "night")

Telling = Literal["full", "terse"]
FAMILIES = ("story", "how_to", "reasoning")
STORY_VERBS = ("paint", "grow", "shrink", "move", "leave", "background")


@dataclasses.dataclass(frozen=True)
class World:
    """A world is described by its values alone, so a larger one is another instance.

    telling: `full`, a text tells the event and then the whole scene that its picture shows. `terse`, it tells the event alone, and what the
    scene was must be read from the pictures before.
    families: which tasks there are; `reasoning` is told in full only.
    kinds, colours, sizes, places, backgrounds: what pictures hold. Each name needs words (`language.py`) and a drawing (`render.py`).
        Places are those of the pictures: a world with others needs another layout there and in the oracle first.
    things: fewest and most in the first scene of a story, and in what a how-to builds.
    events: fewest and most of a story, each with a picture.
    verbs: what can happen in a story.
    """

    telling: Telling = "full"
    families: tuple[str, ...] = FAMILIES
    kinds: tuple[str, ...] = KINDS
    colours: tuple[str, ...] = COLOURS
    sizes: tuple[str, ...] = SIZES
    places: tuple[str, ...] = PLACES
    backgrounds: tuple[str, ...] = BACKGROUNDS
    things: tuple[int, int] = (2, 3)
    events: tuple[int, int] = (2, 3)
    verbs: tuple[str, ...] = STORY_VERBS

    def __post_init__(self) -> None:
        """Raises ValueError for settings that no task can meet."""
        if unknown := set(self.families) - set(FAMILIES):
            raise ValueError(f"unknown task family {min(unknown)!r}; known are {', '.join(FAMILIES)}")
        if self.telling == "terse" and "reasoning" in self.families:
            raise ValueError("the family 'reasoning' has no terse telling; leave it out of `families`, or tell in full")
        known = {"kinds": KINDS, "colours": COLOURS, "sizes": SIZES, "backgrounds": BACKGROUNDS, "verbs": (*STORY_VERBS, "add")}
        for name, names in known.items():
            if unknown := set(getattr(self, name)) - set(names):
                raise ValueError(f"{name} has {min(unknown)!r}, for which there are no words and no drawing; known are {', '.join(names)}")
        if self.places != PLACES:
            raise ValueError(f"places is {self.places}, and pictures have {', '.join(PLACES)}")
        fewest, most = self.things
        if not 1 <= fewest <= most <= min(len(self.places), len(self.kinds)):
            raise ValueError(f"things is {self.things}; it must be from 1 to the number of places and kinds, fewest first")
        if not 1 <= self.events[0] <= self.events[1]:
            raise ValueError(f"events is {self.events}; it must be 1 or more, fewest first")


FULL = World()
TERSE = World(telling="terse", families=("story", "how_to"))
WORLDS: dict[str, World] = {"full": FULL, "terse": TERSE}
