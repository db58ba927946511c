"""The plain English of the Storyboard world: scenes and events to sentences, and back by a strict grammar."""

from __future__ import annotations

import functools
import re
from typing import Any

from diptych.worlds.storyboard.scene import Event, Scene, Thing
from diptych.worlds.storyboard.world import BACKGROUNDS, FULL, KINDS, TERSE, World

PLACE_PHRASES = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
BACKGROUND_PHRASES = {"meadow": "in the meadow", "beach": "on the beach", "snow": "in the snow", "night": "at night"}
BACKGROUND_EVENTS = {"meadow": "spring comes", "beach": "the sea comes", "snow": "snow falls", "night": "night falls"}
NUMBER_WORDS = ("none", "one", "two", "three")
MORE_NUMBER_WORDS = (*NUMBER_WORDS, "four", "five", "six", "seven", "eight")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
PLURALS = {kind: kind + ("es" if kind == "box" else "s") for kind in KINDS}
_ROW_PHRASES = {"back": "at the back ", "front": "in front "}

_EXTRA_WORDS = """
. , ? : a the and then first nothing turns grows shrinks moves to leaves appears add adding story tell how build
draw describe picture say in words what is colour size where there are many things which bigger or answer now count it
with pictures step by step after that look at this next do not we see of last
"""
_LARGER_WORDS = "more comes goes takes wears an hat was were had like"


@functools.cache
def place_phrases(world: World = FULL) -> dict[str, str]:
    """`on the left`; with two rows `at the back on the left`."""
    found = {}
    for place in world.places:
        row, _, rest = place.partition(" ") if world.rows > 1 else ("", "", place)
        found[place] = _ROW_PHRASES.get(row, "") + PLACE_PHRASES.get(rest, f"on the {rest}")
    return found


def vocabulary(world: World = FULL) -> list[str]:
    """Every word the world uses, in a fixed order."""
    words = _EXTRA_WORDS.split()
    for group in (world.kinds, world.colours, world.sizes, world.columns, NUMBER_WORDS):
        words += group
    for phrase in (*place_phrases(world).values(), *BACKGROUND_PHRASES.values(), *BACKGROUND_EVENTS.values()):
        words += phrase.split()
    if len(world.places) > len(PLACE_PHRASES) or world.characters or world.max_count > 1 or "recall" in world.families:
        words += [
            *" ".join(world.places).split(),
            *_LARGER_WORDS.split(),
            *MORE_NUMBER_WORDS,
            *ORDINALS,
            *PLURALS.values(),
            *world.characters,
        ]
    return list(dict.fromkeys(words))


def describe_thing(thing: Thing, place: str, world: World = FULL) -> str:
    """The place stands first: who writes from left to right has decided on the place, and looks up what is there."""
    return f"{place_phrases(world)[place]} {name_thing(thing)}"


def name_thing(thing: Thing) -> str:
    """`a small red ball`, `two small red balls`, `the girl in red with a blue hat`"""
    if thing.hat:
        return f"the {thing.kind} in {thing.colour} with {_a(thing.hat)} hat"
    if thing.count > 1:
        return f"{NUMBER_WORDS[thing.count]} {thing.size} {thing.colour} {PLURALS[thing.kind]}"
    return f"a {thing.size} {thing.colour} {thing.kind}"


def _a(colour: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour}"


def describe(scene: Scene, world: World = FULL) -> str:
    """`on the left a small red ball , in the middle a big blue tree , at night`"""
    parts = [describe_thing(t, p, world) for t, p in zip(scene.places, world.places, strict=True) if t is not None]
    return " , ".join([*(parts or ["nothing"]), BACKGROUND_PHRASES[scene.background]])


def tell(event: Event, world: World = FULL) -> str:
    """The sentence of an event, without the full stop."""
    if event.verb == "background":
        return BACKGROUND_EVENTS[event.background]
    if event.verb == "add":
        return "add " + describe_thing(Thing(event.kind, event.colour, event.size, event.count, event.hat), event.place, world)
    if event.verb == "again":
        return f"like the {ORDINALS[event.picture - 1]} picture"
    if event.verb in ("join", "part"):
        return f"one more {event.kind} comes" if event.verb == "join" else f"one {event.kind} goes"
    if event.verb == "dress":
        return f"the {event.kind} takes {_a(event.hat)} hat"
    if event.verb == "paint":
        return f"the {event.kind} {'wears' if event.kind in world.characters else 'turns'} {event.colour}"
    if event.verb == "move":
        return f"the {event.kind} moves to the {event.place}"
    return f"the {event.kind} {event.verb}s" if event.verb != "leave" else f"the {event.kind} leaves"


class Grammar:
    """The patterns of a world's sentences, and what its phrases mean."""

    def __init__(self, world: World) -> None:
        kinds, people = "|".join(world.kinds), "|".join(world.characters)
        colour, size = "|".join(world.colours), "|".join(world.sizes)
        place, anyone = "|".join(world.places), "|".join(world.all_kinds)
        self.place_of = {phrase: place for place, phrase in place_phrases(world).items()}
        one = rf"a (?P<size>{size}) (?P<colour>{colour}) (?P<kind>{kinds})"
        more = [rf"two (?P<sizes>small) (?P<colours>{colour}) (?P<kinds>{'|'.join(PLURALS[kind] for kind in world.kinds)})"]
        who = [rf"the (?P<who>{people}) in (?P<coat>{colour}) with an? (?P<hat>{colour}) hat"]
        forms = "|".join([one, *(more if world.max_count > 1 else []), *(who if world.characters else [])])
        self.thing = re.compile(rf"(?P<phrase>{'|'.join(self.place_of)}) (?:{forms})")
        patterns = {
            "add": f"add {self.thing.pattern}",
            "paint": rf"the (?P<kind>{kinds}) turns (?P<colour>{colour})",
            "move": rf"the (?P<kind>{anyone}) moves to the (?P<place>{place})",
            "grow": rf"the (?P<kind>{kinds}) grows",
            "shrink": rf"the (?P<kind>{kinds}) shrinks",
            "leave": rf"the (?P<kind>{anyone}) leaves",
        }
        if world.max_count > 1:
            patterns |= {"join": rf"one more (?P<kind>{kinds}) comes", "part": rf"one (?P<kind>{kinds}) goes"}
        if world.characters:
            patterns["dress"] = rf"the (?P<kind>{people}) takes an? (?P<hat>{colour}) hat"
        if "recall" in world.families:
            patterns["again"] = rf"like the (?P<picture>{'|'.join(ORDINALS)}) picture"
        self.events = [(verb, re.compile(pattern)) for verb, pattern in patterns.items()]
        if world.characters:
            self.events.append(("paint", re.compile(rf"the (?P<kind>{people}) wears (?P<colour>{colour})")))

    def thing_of(self, match: re.Match[str]) -> Thing:
        found = match.groupdict()
        if found.get("who"):
            return Thing(found["who"], found["coat"], "big", hat=found["hat"])
        if found.get("kinds"):
            return Thing(_SINGULARS[found["kinds"]], found["colours"], found["sizes"], 2)
        return Thing(found["kind"], found["colour"], found["size"])


_SINGULARS = {plural: kind for kind, plural in PLURALS.items()}
_BACKGROUND_OF_PHRASE = {phrase: name for name, phrase in BACKGROUND_PHRASES.items()}
_BACKGROUND_OF_EVENT = {phrase: name for name, phrase in BACKGROUND_EVENTS.items()}


@functools.cache
def grammar(world: World) -> Grammar:
    return Grammar(world)


def normalise(text: str) -> str:
    return " ".join(re.sub(r"([.,?:])", r" \1 ", text.lower()).split())


def parse_scene(text: str, world: World = FULL) -> Scene | None:
    """The scene that a description (without full stop) states, or None where it breaks the grammar."""
    *parts, ending = [part.strip() for part in normalise(text).split(" , ")]
    if _BACKGROUND_OF_PHRASE.get(ending) not in world.backgrounds or not parts:
        return None
    rules = grammar(world)
    places: list[Thing | None] = [None] * len(world.places)
    if parts != ["nothing"]:
        for part in parts:
            match = rules.thing.fullmatch(part)
            if match is None:
                return None
            index, stated = world.places.index(rules.place_of[match["phrase"]]), rules.thing_of(match)
            if places[index] is not None:
                return None
            if any(thing is not None and thing.kind == stated.kind for thing in places):
                return None
            places[index] = stated
    return Scene(_BACKGROUND_OF_PHRASE[ending], tuple(places))


def parse_event(text: str, world: World = FULL) -> Event | None:
    """The event that a sentence (without full stop) tells, or None."""
    text = normalise(text)
    if _BACKGROUND_OF_EVENT.get(text) in world.backgrounds:
        return Event("background", background=_BACKGROUND_OF_EVENT[text])
    rules = grammar(world)
    for verb, pattern in rules.events:
        match = pattern.fullmatch(text)
        if match is None:
            continue
        if verb == "add":
            thing = rules.thing_of(match)
            return Event(verb, thing.kind, thing.colour, thing.size, rules.place_of[match["phrase"]], count=thing.count, hat=thing.hat)
        if verb == "again":
            return Event(verb, picture=ORDINALS.index(match["picture"]) + 1)
        fields: dict[str, Any] = match.groupdict()
        return Event(verb, **fields)
    return None


def step_text(event: Event, scene: Scene, world: World = FULL) -> str:
    """What a document says before the picture of a step: the event, then (told in full) the scene that the picture must show."""
    told = f"{tell(event, world)} ."
    return told if world.telling == "terse" else f"{told} {describe(scene, world)} ."


def parse_step(text: str, world: World = FULL) -> tuple[Event | None, Scene | None]:
    """Event and scene of a step's text; None for a part that breaks the grammar.

    Things are listed from left to right, and each of the two sentences ends in one full stop.
    """
    parts = [part.strip() for part in normalise(text).split(" .") if part.strip()]
    if len(parts) != 2:
        return None, None
    event, scene = parse_event(parts[0], world), parse_scene(parts[1], world)
    if event is not None and scene is not None and normalise(text) != step_text(event, scene, world):
        return None, None
    return event, scene


def parse_terse(text: str, world: World = TERSE) -> Event | None:
    """The event of a terse step's text: one sentence that ends in one full stop; None for anything else."""
    event = parse_event(normalise(text).removesuffix(" ."), world)
    return event if event is not None and normalise(text) == f"{tell(event, world)} ." else None


assert set(BACKGROUND_PHRASES) == set(BACKGROUNDS)
