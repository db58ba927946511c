"""Pictures of scenes: 96 x 96 pixels, three columns of 32, drawn at four times the size and reduced.

A picture is the function of its scene. Columns do not overlap, so a strip per (background, place, thing) is drawn once
and kept; the oracle reads pictures with the same strips.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from diptych.worlds.storyboard.scene import Scene, Thing
from diptych.worlds.storyboard.world import PLACES

PIXEL_SIZE = 96
COLUMN_WIDTH = PIXEL_SIZE // len(PLACES)
_SCALE = 4
_GROUND = 90  # where things stand, in pixels from the top

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


def render(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, 96 x 96."""
    return Image.fromarray(render_array(scene))


def render_array(scene: Scene) -> np.ndarray:
    """The picture of a scene as (96, 96, 3) uint8."""
    strips = [strip(scene.background, place, thing) for place, thing in enumerate(scene.places)]
    return np.concatenate(strips, axis=1)


@functools.cache
def strip(background: str, place: int, thing: Thing | None) -> np.ndarray:
    """(96, 32, 3) uint8: one column of the picture."""
    width, height = COLUMN_WIDTH * _SCALE, PIXEL_SIZE * _SCALE
    image = Image.new("RGB", (width, height))
    pen = ImageDraw.Draw(image)
    _draw_background(pen, background, place, width, height)
    if thing is not None:
        _draw_thing(pen, thing, background)
    small = image.resize((COLUMN_WIDTH, PIXEL_SIZE), Image.Resampling.BOX)
    return np.asarray(small)


def _draw_background(pen: ImageDraw.ImageDraw, background: str, place: int, width: int, height: int) -> None:
    top, bottom = _SKY[background]
    horizon = int(height * 0.72)
    for y in range(horizon):
        mix = y / horizon
        pen.line([(0, y), (width, y)], fill=tuple(round(a + (b - a) * mix) for a, b in zip(top, bottom, strict=True)))
    if background == "beach":  # the sea
        pen.rectangle([0, int(height * 0.60), width, horizon], fill=(44, 136, 196))
    pen.rectangle([0, horizon, width, height], fill=_LAND[background])
    s = _SCALE
    sky_sign = {"meadow": 2, "beach": 0, "night": 1}.get(background)
    if place == sky_sign:
        colour = (246, 242, 214) if background == "night" else (255, 222, 70)
        pen.ellipse([8 * s, 5 * s, 24 * s, 21 * s], fill=colour)
        if background == "night":  # a crescent
            pen.ellipse([4 * s, 3 * s, 18 * s, 17 * s], fill=(20, 24, 64))
    if background == "night" and place != 1:
        for x, y in ((6, 6), (22, 14), (12, 26), (27, 30)):
            pen.ellipse([x * s, y * s, (x + 1.6) * s, (y + 1.6) * s], fill=(250, 250, 220))
    if background == "snow":
        for x, y in ((5, 5), (18, 10), (27, 22), (9, 27), (20, 36), (4, 44), (28, 48)):
            pen.ellipse([x * s, y * s, (x + 2.4) * s, (y + 2.4) * s], fill=(255, 255, 255))
    if background == "meadow":
        for x in (5, 15, 26):
            pen.line([(x * s, 93 * s), ((x - 1) * s, 90 * s)], fill=(76, 150, 60), width=s)


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, background: str) -> None:
    s = _SCALE
    fill = PALETTE[thing.colour]
    light = tuple(min(255, c + 60) for c in fill)
    dark = tuple(int(c * 0.62) for c in fill)
    big = thing.size == "big"
    line: dict[str, Any] = {"outline": (214, 214, 226) if background == "night" else _OUTLINE, "width": s}
    centre, ground = 16 * s, _GROUND * s
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
        pen.line([(centre, deck), (centre, ground - 2 * half)], fill=line["outline"], width=2 * s)
        pen.polygon([(centre + s, ground - 2 * half), (centre + half, deck - s), (centre + s, deck - s)], fill=light, **line)
        pen.polygon([(centre - s, ground - int(1.7 * half)), (centre - half * 2 // 3, deck - s), (centre - s, deck - s)],
                    fill=(250, 250, 250), **line)  # fmt: skip
        pen.polygon([(centre - half, deck), (centre + half, deck), (centre + half * 2 // 3, ground),
                     (centre - half * 2 // 3, ground)], fill=fill, **line)  # fmt: skip
    elif thing.kind == "flower":
        tall = (28 if big else 15) * s
        head = ground - tall + half // 2
        pen.line([(centre, ground), (centre, head)], fill=(30, 120, 40), width=max(s * 2, half // 5))
        pen.ellipse([centre, ground - tall // 3, centre + half * 2 // 3, ground - tall // 6], fill=(30, 120, 40))
        petal = half * 2 // 5
        for step in range(6):
            angle = math.pi / 3 * step
            x, y = centre + math.cos(angle) * half * 0.55, head + math.sin(angle) * half * 0.55
            pen.ellipse([x - petal, y - petal, x + petal, y + petal], fill=fill, outline=line["outline"], width=s // 2)
        pen.ellipse([centre - petal, head - petal, centre + petal, head + petal], fill=(255, 240, 150) if
                    thing.colour != "yellow" else (150, 84, 30))  # fmt: skip
    else:
        raise ValueError(f"no drawing for kind {thing.kind!r}")
