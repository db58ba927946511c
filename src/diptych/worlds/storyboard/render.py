"""Pictures of scenes: 96 x 96 pixels, three columns of 32, drawn at four times the size and reduced; `World` says otherwise for others.

A picture is the function of its scene. Columns do not overlap, so what a column shows is drawn once and kept; the oracle reads pictures
with the same columns. Where a world has two rows, the back is drawn as a column of its own and the front is laid over it (`layer`), a
little to the left and lower, so that it hides part of what stands behind and never all of it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from diptych.worlds.storyboard.scene import Scene, Thing
from diptych.worlds.storyboard.world import CANVAS, CHARACTERS, FULL, World

_UNIT = CANVAS // 96  # drawings are measured in pixels of a picture of 96
_COLUMN = 32  # units of a column for which things are drawn; narrower columns have smaller things
_GROUND = 90  # where things stand, in units from the top
_ROWS = {  # of each row: where the middle of its things is in a column of 32 units, where they stand, their size
    1: ((16, _GROUND, 1),),
    2: ((21, 74, 0.77), (11, 91, 0.77)),
}
_APART = 5.5  # units from the middle of the place to each of two things

PALETTE = {
    "red": (222, 48, 52),
    "blue": (46, 98, 232),
    "green": (34, 150, 66),
    "yellow": (254, 222, 40),
    "purple": (148, 60, 190),
    "orange": (248, 122, 16),
}
_SKY = {
    "meadow": ((126, 196, 250), (206, 236, 255)),
    "beach": ((92, 200, 226), (214, 246, 246)),
    "snow": ((176, 192, 212), (226, 232, 242)),
    "night": ((14, 18, 54), (52, 56, 112)),
}
_LAND = {"meadow": (120, 196, 92), "beach": (240, 218, 158), "snow": (248, 250, 255), "night": (40, 62, 62)}
_OUTLINE = (32, 30, 40)
_SKIN = (246, 206, 172)
_TROUSERS = (70, 70, 96)


def render(scene: Scene, world: World = FULL) -> Image.Image:
    """The picture of a scene, RGB, `world.pixels` a side."""
    return Image.fromarray(render_array(scene, world))


def render_array(scene: Scene, world: World = FULL) -> np.ndarray:
    """The picture of a scene as (pixels, pixels, 3) uint8."""
    world, width = world.looks, len(world.columns)
    columns = []
    for column in range(width):
        shown = strip(scene.background, column, scene.places[column], world)
        for row in range(1, world.rows):
            thing = scene.places[row * width + column]
            if thing is not None:
                shown = over(*layer(thing, row, scene.background == "night", world), shown)
        columns.append(shown)
    return np.concatenate(columns, axis=1)


@functools.lru_cache(maxsize=8192)
def strip(background: str, column: int, thing: Thing | None, world: World = FULL) -> np.ndarray:
    """(pixels, pixels / columns, 3) uint8: one column of the picture, with what stands in its back row (or its only one)."""
    image = Image.new("RGB", (CANVAS // len(world.columns), CANVAS))
    pen = ImageDraw.Draw(image)
    _draw_background(pen, background, column, world)
    if thing is not None:
        _draw_things(pen, thing, 0, background == "night", world)
    return _reduced(image, world)


@functools.lru_cache(maxsize=2048)
def layer(thing: Thing, row: int, at_night: bool, world: World) -> tuple[np.ndarray, np.ndarray]:
    """What stands in a row before the back, to be laid over a column: colour (pixels, pixels / columns, 3) times cover, and cover
    (pixels, pixels / columns, 1), both float32, 0..255 and 0..1."""
    drawn = []
    for shade in ((0, 0, 0), (255, 255, 255)):  # what differs between them is not covered
        image = Image.new("RGB", (CANVAS // len(world.columns), CANVAS), shade)
        _draw_things(ImageDraw.Draw(image), thing, row, at_night, world)
        drawn.append(_reduced(image, world).astype(np.float32))
    return drawn[0], 1 - (drawn[1] - drawn[0]).mean(-1, keepdims=True) / 255


def over(colour: np.ndarray, cover: np.ndarray, below: np.ndarray) -> np.ndarray:
    """A layer laid over what is behind it, uint8."""
    return np.rint(colour + (1 - cover) * below).clip(0, 255).astype(np.uint8)


def _reduced(image: Image.Image, world: World) -> np.ndarray:
    return np.asarray(image.resize((world.pixels // len(world.columns), world.pixels), Image.Resampling.BOX))


def _draw_background(pen: ImageDraw.ImageDraw, background: str, column: int, world: World) -> None:
    top, bottom = _SKY[background]
    count = len(world.columns)
    width, height, s = CANVAS // count, CANVAS, _UNIT
    t = width // _COLUMN  # across
    horizon = int(height * 0.72)
    for y in range(horizon):
        mix = y / horizon
        pen.line([(0, y), (width, y)], fill=tuple(round(a + (b - a) * mix) for a, b in zip(top, bottom, strict=True)))
    if background == "beach":  # the sea
        pen.rectangle([0, int(height * 0.60), width, horizon], fill=(44, 136, 196))
    pen.rectangle([0, horizon, width, height], fill=_LAND[background])
    sky_sign = {"meadow": count - 1, "beach": 0, "night": count // 2}.get(background)
    if column == sky_sign:
        colour = (246, 242, 214) if background == "night" else (255, 222, 70)
        pen.ellipse([8 * t, 5 * s, 24 * t, 21 * s], fill=colour)
        if background == "night":  # a crescent
            pen.ellipse([4 * t, 3 * s, 18 * t, 17 * s], fill=(20, 24, 64))
    if background == "night" and column != sky_sign:
        for x, y in ((6, 6), (22, 14), (12, 26), (27, 30)):
            pen.ellipse([x * t, y * s, (x + 1.6) * t, (y + 1.6) * s], fill=(250, 250, 220))
    if background == "snow":
        for x, y in ((5, 5), (18, 10), (27, 22), (9, 27), (20, 36), (4, 44), (28, 48)):
            pen.ellipse([x * t, y * s, (x + 2.4) * t, (y + 2.4) * s], fill=(255, 255, 255))
    if background == "meadow":
        for x in (5, 15, 26):
            pen.line([(x * t, 93 * s), ((x - 1) * t, 90 * s)], fill=(76, 150, 60), width=s)


def _draw_things(pen: ImageDraw.ImageDraw, thing: Thing, row: int, at_night: bool, world: World) -> None:
    """One thing, or two beside each other, in a row of a column."""
    middle, stand, scale = _ROWS[world.rows][row]
    t = CANVAS // len(world.columns) // _COLUMN
    s = t if scale == 1 else t * scale
    for offset in (0,) if thing.count == 1 else (-_APART, _APART):
        _draw_thing(pen, thing, (middle + offset) * t, stand * _UNIT, s, at_night)


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, centre: float, ground: float, s: float, at_night: bool) -> None:
    """`centre` and `ground` in pixels of the canvas, of which a unit of the drawing has `s`."""
    fill = PALETTE[thing.colour]
    light = tuple(min(255, c + 60) for c in fill)
    dark = tuple(int(c * 0.62) for c in fill)
    big = thing.size == "big"
    line: dict[str, Any] = {"outline": (214, 214, 226) if at_night else _OUTLINE, "width": max(1, round(s))}
    half = (13 if big else 7) * s
    if thing.kind == "ball":
        pen.ellipse([centre - half, ground - 2 * half, centre + half, ground], fill=fill, **line)
        shine = half // 3
        pen.ellipse(
            [centre - half // 2 - shine // 2, ground - half * 3 // 2 - shine // 2,
             centre - half // 2 + shine // 2, ground - half * 3 // 2 + shine // 2], fill=light,
        )  # fmt: skip
    elif thing.kind == "box":
        top = ground - int(1.7 * half)
        pen.rectangle([centre - half, top, centre + half, ground], fill=fill, **line)
        pen.rectangle([centre - half, top, centre + half, top + half // 2], fill=dark, **line)
        pen.rectangle([centre - half // 4, top, centre + half // 4, ground], fill=light)
    elif thing.kind == "tree":
        tall = (46 if big else 25) * s
        trunk = half // 4
        pen.rectangle([centre - trunk, ground - tall // 3, centre + trunk, ground], fill=(120, 76, 44), **line)
        for level in range(3):
            base = ground - tall // 4 - level * tall // 5
            reach = half - level * half // 5
            pen.polygon([(centre - reach, base), (centre + reach, base), (centre, base - tall * 2 // 5)], fill=fill, **line)
    elif thing.kind == "house":
        tall = (42 if big else 23) * s
        wall = ground - int(tall * 0.56)
        pen.rectangle([centre - half + s, wall, centre + half - s, ground], fill=fill, **line)
        pen.polygon([(centre - half - s, wall), (centre + half + s, wall), (centre, ground - tall)], fill=dark, **line)
        door = half // 3
        pen.rectangle([centre - door, ground - int(tall * 0.34), centre + door, ground], fill=(250, 240, 200), **line)
    elif thing.kind == "boat":
        deck = ground - int(half * 0.8)
        pen.line([(centre, deck), (centre, ground - 2 * half)], fill=line["outline"], width=round(2 * s))
        pen.polygon([(centre + s, ground - 2 * half), (centre + half, deck - s), (centre + s, deck - s)], fill=light, **line)
        pen.polygon([(centre - s, ground - int(1.7 * half)), (centre - half * 2 // 3, deck - s), (centre - s, deck - s)],
                    fill=(250, 250, 250), **line)  # fmt: skip
        pen.polygon([(centre - half, deck), (centre + half, deck), (centre + half * 2 // 3, ground),
                     (centre - half * 2 // 3, ground)], fill=fill, **line)  # fmt: skip
    elif thing.kind == "flower":
        tall = (28 if big else 15) * s
        head = ground - tall + half // 2
        pen.line([(centre, ground), (centre, head)], fill=(30, 120, 40), width=round(max(s * 2, half // 5)))
        pen.ellipse([centre, ground - tall // 3, centre + half * 2 // 3, ground - tall // 6], fill=(30, 120, 40))
        petal = half * 2 // 5
        for step in range(6):
            angle = math.pi / 3 * step
            x, y = centre + math.cos(angle) * half * 0.55, head + math.sin(angle) * half * 0.55
            pen.ellipse([x - petal, y - petal, x + petal, y + petal], fill=fill, outline=line["outline"], width=int(s // 2))
        pen.ellipse([centre - petal, head - petal, centre + petal, head + petal], fill=(255, 240, 150) if
                    thing.colour != "yellow" else (150, 84, 30))  # fmt: skip
    elif thing.kind in CHARACTERS:
        _draw_character(pen, thing, centre, ground, s, line)
    else:
        raise ValueError(f"no drawing for kind {thing.kind!r}")


def _draw_character(pen: ImageDraw.ImageDraw, thing: Thing, x: float, ground: float, s: float, line: dict[str, Any]) -> None:
    """A girl in a dress with a wide hat, or a boy in a coat with a cap: 42 units tall."""
    coat, hat = PALETTE[thing.colour], PALETTE[thing.hat]

    def at(left: float, bottom: float, right: float, top: float) -> list[float]:
        return [x + left * s, ground - top * s, x + right * s, ground - bottom * s]

    if thing.kind == "girl":
        for leg in (-4, 2):
            pen.rectangle(at(leg, 0, leg + 2, 8), fill=_SKIN, **line)
        dress = [(-11, 7), (11, 7), (4, 26), (-4, 26)]
        pen.polygon([(x + dx * s, ground - dy * s) for dx, dy in dress], fill=coat, **line)
    else:
        for leg in (-6, 1):
            pen.rectangle(at(leg, 0, leg + 5, 10), fill=_TROUSERS, **line)
        pen.rectangle(at(-8, 9, 8, 26), fill=coat, **line)
    pen.ellipse(at(-6, 24, 6, 36), fill=_SKIN, **line)
    if thing.kind == "girl":
        pen.rectangle(at(-6, 35, 6, 43), fill=hat, **line)
        pen.rectangle(at(-11, 32, 11, 36), fill=hat, **line)
    else:
        pen.pieslice(at(-7, 25, 7, 41), 180, 360, fill=hat, **line)
        pen.rectangle(at(0, 31, 12, 34), fill=hat, **line)
