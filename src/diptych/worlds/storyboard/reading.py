"""From pixels to scenes, by comparison with all that a column of the picture can look like. Part of the oracle, so never of a reward."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import PIL.Image

from diptych.worlds.storyboard.render import layer, over, strip
from diptych.worlds.storyboard.scene import Scene, Thing
from diptych.worlds.storyboard.world import FULL, World

UNREADABLE = 0.13  # root mean square error (0..1) of a column beyond which nothing is recognised
RECHECKED = 12  # pairs of a back and a front thing that are compared at full size


def read_pictures(pictures: Sequence[PIL.Image.Image], world: World = FULL) -> list[Scene | None]:
    """The scene that each picture shows; None where a column looks like nothing that can be drawn.

    The background is the one that fits all columns best; in two rows, that of the sky, which nothing covers.
    """
    return [scene if error <= UNREADABLE else None for scene, error in closest(pictures, world)]


def closest(pictures: Sequence[PIL.Image.Image], world: World = FULL) -> list[tuple[Scene, float]]:
    """For each picture the scene whose rendering is most like it, and the root mean square error (0..1) of its worst column."""
    if not pictures:
        return []
    world = world.looks
    arrays = np.stack([_pixels(picture, world) for picture in pictures])
    if world.rows == 1:
        return _closest_of_one_row(arrays, world)
    return [_closest_of_two_rows(array, world) for array in arrays]


def _pixels(picture: PIL.Image.Image, world: World) -> np.ndarray:
    size = (world.pixels, world.pixels)
    return np.asarray(picture.convert("RGB").resize(size) if picture.size != size else picture.convert("RGB"))


@functools.cache
def all_things(world: World) -> list[Thing | None]:
    """Nothing, and every thing that can stand at a place."""
    single = [Thing(k, c, s) for k, c, s in itertools.product(world.kinds, world.colours, world.sizes)]
    pairs = [Thing(k, c, "small", 2) for k, c in itertools.product(world.kinds, world.colours) if world.max_count > 1]
    people = [Thing(k, c, "big", hat=hat) for k, c, hat in itertools.product(world.characters, world.colours, world.colours)]
    return [None, *single, *pairs, *people]


# --- one row: every column can look like one of a few hundred ----------------------------------------------------------


@functools.cache
def _columns(world: World) -> np.ndarray:
    """What every column shows with every thing: (backgrounds, columns, things, pixels) float32 in 0..1."""
    shown = [
        [[strip(b, c, t, world).ravel() for t in all_things(world)] for c in range(len(world.columns))] for b in world.backgrounds
    ]  # fmt: skip
    return np.asarray(shown, dtype=np.float32) / 255


def _closest_of_one_row(arrays: np.ndarray, world: World) -> list[tuple[Scene, float]]:
    things, templates = all_things(world), _columns(world)
    count = len(world.columns)
    width = world.pixels // count
    columns = np.stack([arrays[:, :, i * width : (i + 1) * width].reshape(len(arrays), -1) for i in range(count)], 1)
    columns = columns.astype(np.float32) / 255  # (N, columns, pixels)
    products = np.einsum("npx,bptx->nbpt", columns, templates, optimize=True)
    squares = (columns**2).sum(-1)[:, None, :, None] + (templates**2).sum(-1)[None]
    error = np.sqrt(np.maximum(squares - 2 * products, 0) / columns.shape[-1])  # (N, backgrounds, columns, things)
    best = error.min(-1)  # (N, backgrounds, columns)
    found = []
    for n, background in enumerate(best.sum(-1).argmin(-1)):
        places = tuple(things[int(t)] for t in error[n, background].argmin(-1))
        found.append((Scene(world.backgrounds[background], places), float(best[n, background].max())))
    return found


# --- two rows: what stands in front covers part of what stands behind --------------------------------------------------
#
# With f what a front thing shows times its cover a, and s a column with a back thing, the picture x is compared with f + (1 - a) s:
# |x - f - (1 - a) s|^2 = |x - f|^2 - 2 x (1 - a) s + 2 f (1 - a) s + ((1 - a) s)^2. The last two sums are known before there is a picture,
# and covers are of shapes, of which there are few. It is done at half the size, and the best pairs are compared again as they are drawn.


@functools.cache
def _shapes(world: World) -> tuple[np.ndarray, np.ndarray]:
    """Of every thing the number of its shape (0: nothing), (things,); and 1 - cover of each shape, (shapes, pixels) float32, halved."""
    numbers: dict[tuple[str, str, int] | None, int] = {}
    height, width = world.pixels // 2, world.pixels // len(world.columns) // 2
    left, shape_of = [np.ones((height, width, 3), dtype=np.float32)], []
    for thing in all_things(world):
        shape = None if thing is None else (thing.kind, thing.size, thing.count)
        if thing is not None and shape not in numbers:
            left.append(np.repeat(1 - _halved(layer(thing, 1, False, world)[1]), 3, axis=-1))
        shape_of.append(numbers.setdefault(shape, len(numbers)))
    return np.array(shape_of), np.stack(left).reshape(len(left), -1)


def _halved(array: np.ndarray) -> np.ndarray:
    """(..., H, W, C) -> (..., H / 2, W / 2, C): means of four pixels."""
    *lead, height, width, depth = array.shape
    return array.reshape(*lead, height // 2, 2, width // 2, 2, depth).mean((-4, -2))


@functools.cache
def _fronts(at_night: bool, world: World) -> np.ndarray:
    """What every front thing shows times its cover, (things, pixels) float32 in 0..1, at half the size; nothing first."""
    height, width = world.pixels, world.pixels // len(world.columns)
    shown = [np.zeros((height, width, 3), dtype=np.float32)]
    shown += [layer(thing, 1, at_night, world)[0] for thing in all_things(world) if thing is not None]
    return _halved(np.stack(shown)).reshape(len(shown), -1) / 255


@functools.cache
def _backs(background: str, column: int, world: World) -> tuple[np.ndarray, np.ndarray]:
    """A column with every back thing, (things, pixels) float32 in 0..1, halved; and 2 f (1 - a) s + ((1 - a) s)^2, (fronts, backs)."""
    shape_of, left = _shapes(world)
    shown = np.stack([strip(background, column, thing, world) for thing in all_things(world)]).astype(np.float32)
    halved = _halved(shown).reshape(len(shown), -1) / 255
    covered = ((left**2) @ (halved**2).T)[shape_of]
    return halved, 2 * (_fronts(background == "night", world) * left[shape_of]) @ halved.T + covered


def _closest_of_two_rows(array: np.ndarray, world: World) -> tuple[Scene, float]:
    width = world.pixels // len(world.columns)
    columns = [array[:, c * width : (c + 1) * width] for c in range(len(world.columns))]
    sky = array[: _sky_height(world)].astype(np.float32)
    background = min(world.backgrounds, key=lambda name: float(((sky - _sky(name, world)) ** 2).sum()))
    errors, backs, fronts = zip(*[_closest_pair(column, background, c, world) for c, column in enumerate(columns)], strict=True)
    return Scene(background, (*backs, *fronts)), max(errors)


def _sky_height(world: World) -> int:
    """Rows of pixels that nothing in a world of two rows reaches."""
    return world.pixels * 3 // 8


@functools.cache
def _sky(background: str, world: World) -> np.ndarray:
    columns = [strip(background, column, None, world) for column in range(len(world.columns))]
    return np.concatenate(columns, axis=1)[: _sky_height(world)].astype(np.float32)


def _closest_pair(column: np.ndarray, background: str, number: int, world: World) -> tuple[float, Thing | None, Thing | None]:
    """Error, back and front of the pair that looks most like a column of a picture."""
    things, at_night = all_things(world), background == "night"
    shape_of, left = _shapes(world)
    backs, known = _backs(background, number, world)
    seen = (_halved(column.astype(np.float32)) / 255).ravel()  # (pixels,)
    own = ((seen - _fronts(at_night, world)) ** 2).sum(-1)  # (things,)
    crossed = (seen * left) @ backs.T  # (shapes, things)
    errors = own[:, None] - 2 * crossed[shape_of] + known  # (fronts, backs)
    best = np.argpartition(errors.ravel(), RECHECKED)[:RECHECKED]
    exact = []
    for front, back in zip(*np.unravel_index(best, errors.shape), strict=True):
        shown = strip(background, number, things[back], world)
        if (thing := things[front]) is not None:
            shown = over(*layer(thing, 1, at_night, world), shown)
        difference = (column.astype(np.float32) - shown) / 255
        exact.append((float(np.sqrt((difference**2).mean())), int(back), int(front)))
    error, back, front = min(exact)
    return error, things[back], things[front]
