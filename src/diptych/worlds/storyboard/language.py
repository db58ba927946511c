"""The plain English of the Storyboard world: scenes and events to sentences, and back by a strict grammar."""

from __future__ import annotations

import re

from diptych.worlds.storyboard.scene import Event, Scene, Thing
from diptych.worlds.storyboard.world import BACKGROUNDS, COLOURS, KINDS, PLACES, SIZES, Telling

PLACE_PHRASES = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
BACKGROUND_PHRASES = {"meadow": "in the meadow", "beach": "on the beach", "snow": "in the snow", "night": "at night"}
BACKGROUND_EVENTS = {"meadow": "spring comes", "beach": "the sea comes", "snow": "snow falls", "night": "night falls"}
NUMBER_WORDS = ("none", "one", "two", "three")

_EXTRA_WORDS = """
. , ? : a the and then first nothing turns grows shrinks moves to leaves appears add adding story tell how build
draw describe picture say in words what is colour size where there are many things which bigger or answer now count it
with pictures step by step after that look at this next do not we see of last
"""


def vocabulary() -> list[str]:
    """Every word the world uses, in a fixed order."""
    words = _EXTRA_WORDS.split()
    for group in (KINDS, COLOURS, SIZES, PLACES, NUMBER_WORDS):
        words += group
    for phrase in (*PLACE_PHRASES.values(), *BACKGROUND_PHRASES.values(), *BACKGROUND_EVENTS.values()):
        words += phrase.split()
    return list(dict.fromkeys(words))


def describe_thing(thing: Thing, place: str) -> str:
    """The place stands first: who writes from left to right has decided on the place, and looks up what is there."""
    return f"{PLACE_PHRASES[place]} a {thing.size} {thing.colour} {thing.kind}"


def describe(scene: Scene) -> str:
    """`on the left a small red ball , in the middle a big blue tree , at night`"""
    parts = [describe_thing(t, p) for t, p in zip(scene.places, PLACES, strict=True) if t is not None]
    return " , ".join([*(parts or ["nothing"]), BACKGROUND_PHRASES[scene.background]])


def tell(event: Event) -> str:
    """The sentence of an event, without the full stop."""
    if event.verb == "background":
        return BACKGROUND_EVENTS[event.background]
    if event.verb == "add":
        return "add " + describe_thing(Thing(event.kind, event.colour, event.size), event.place)
    if event.verb == "paint":
        return f"the {event.kind} turns {event.colour}"
    if event.verb == "move":
        return f"the {event.kind} moves to the {event.place}"
    return f"the {event.kind} {event.verb}s" if event.verb != "leave" else f"the {event.kind} leaves"


_ANY = {"kind": "|".join(KINDS), "colour": "|".join(COLOURS), "size": "|".join(SIZES), "place": "|".join(PLACES)}
_THING = re.compile(
    rf"(?P<phrase>{'|'.join(PLACE_PHRASES.values())}) "
    rf"a (?P<size>{_ANY['size']}) (?P<colour>{_ANY['colour']}) (?P<kind>{_ANY['kind']})"
)
_EVENTS = {
    "add": re.compile(f"add {_THING.pattern}"),
    "paint": re.compile(rf"the (?P<kind>{_ANY['kind']}) turns (?P<colour>{_ANY['colour']})"),
    "move": re.compile(rf"the (?P<kind>{_ANY['kind']}) moves to the (?P<place>{_ANY['place']})"),
    "grow": re.compile(rf"the (?P<kind>{_ANY['kind']}) grows"),
    "shrink": re.compile(rf"the (?P<kind>{_ANY['kind']}) shrinks"),
    "leave": re.compile(rf"the (?P<kind>{_ANY['kind']}) leaves"),
}
_PLACE_OF_PHRASE = {phrase: place for place, phrase in PLACE_PHRASES.items()}
_BACKGROUND_OF_PHRASE = {phrase: name for name, phrase in BACKGROUND_PHRASES.items()}
_BACKGROUND_OF_EVENT = {phrase: name for name, phrase in BACKGROUND_EVENTS.items()}


def normalise(text: str) -> str:
    return " ".join(re.sub(r"([.,?:])", r" \1 ", text.lower()).split())


def parse_scene(text: str) -> Scene | None:
    """The scene that a description (without full stop) states, or None where it breaks the grammar."""
    *parts, ending = [part.strip() for part in normalise(text).split(" , ")]
    if ending not in _BACKGROUND_OF_PHRASE or not parts:
        return None
    places: list[Thing | None] = [None, None, None]
    if parts != ["nothing"]:
        for part in parts:
            match = _THING.fullmatch(part)
            if match is None:
                return None
            index = PLACES.index(_PLACE_OF_PHRASE[match["phrase"]])
            if places[index] is not None:
                return None
            if any(thing is not None and thing.kind == match["kind"] for thing in places):
                return None
            places[index] = Thing(match["kind"], match["colour"], match["size"])
    return Scene(_BACKGROUND_OF_PHRASE[ending], tuple(places))


def parse_event(text: str) -> Event | None:
    """The event that a sentence (without full stop) tells, or None."""
    text = normalise(text)
    if text in _BACKGROUND_OF_EVENT:
        return Event("background", background=_BACKGROUND_OF_EVENT[text])
    for verb, pattern in _EVENTS.items():
        match = pattern.fullmatch(text)
        if match is None:
            continue
        found = match.groupdict()
        if "phrase" in found:
            found["place"] = _PLACE_OF_PHRASE[found.pop("phrase")]
        return Event(verb, **found)
    return None


def step_text(event: Event, scene: Scene, telling: Telling = "full") -> str:
    """What a document says before the picture of a step: the event, then (told in full) the scene that the picture must show."""
    return f"{tell(event)} ." if telling == "terse" else f"{tell(event)} . {describe(scene)} ."


def parse_step(text: str) -> tuple[Event | None, Scene | None]:
    """Event and scene of a step's text; None for a part that breaks the grammar.

    Things are listed from left to right, and each of the two sentences ends in one full stop.
    """
    parts = [part.strip() for part in normalise(text).split(" .") if part.strip()]
    if len(parts) != 2:
        return None, None
    event, scene = parse_event(parts[0]), parse_scene(parts[1])
    if event is not None and scene is not None and normalise(text) != step_text(event, scene):
        return None, None
    return event, scene


def parse_terse(text: str) -> Event | None:
    """The event of a terse step's text: one sentence that ends in one full stop; None for anything else."""
    event = parse_event(normalise(text).removesuffix(" ."))
    return event if event is not None and normalise(text) == f"{tell(event)} ." else None


assert set(BACKGROUND_PHRASES) == set(BACKGROUNDS)
