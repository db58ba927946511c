"""How often Storyboard's oracle reads a picture right: rendered, spoiled, through the image tokenizer, and drawn by a model.

    python benchmarks/oracle.py [--quick] [--threads 1] [--docs docs/results]

Held-out scenes (of the test split). For pictures that a model drew nobody knows the truth, so they are read a second time from their codes,
without looking at a pixel: a column whose codes are those of a rendered column shows what that column shows. Where the codes spell one
whole scene, that is the truth about the picture, and the oracle is right or wrong about it. Where they spell none, the oracle's reading is
repeated on the picture with a little noise, blurred, and made smaller, and counted as steady or not.

Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageFilter
import torch

from diptych.config import EvaluateConfig, SamplingParams
from diptych.document import Document
from diptych.evaluation.storyboard import answer
from diptych.forms import AnswerForm
from diptych.models import load_model
from diptych.models.pixels import to_images, to_pixels
from diptych.models.storyboard import StoryboardModel
from diptych.runtime import rng, set_threads, versions
from diptych.worlds.storyboard.conversations import make_turn, scene_of
from diptych.worlds.storyboard.oracle import read_pictures
from diptych.worlds.storyboard.reading import all_things
from diptych.worlds.storyboard.render import render, strip
from diptych.worlds.storyboard.scene import Scene, Thing
from diptych.worlds.storyboard.world import FULL, LARGE, World

MODEL = "storyboard_terse"


def noisy(image: PIL.Image.Image, sigma: float, random: np.random.Generator) -> PIL.Image.Image:
    array = np.asarray(image).astype(float)
    return PIL.Image.fromarray((array + random.normal(0, sigma, array.shape)).clip(0, 255).astype(np.uint8))


def blurred(image: PIL.Image.Image, radius: float) -> PIL.Image.Image:
    return image.filter(PIL.ImageFilter.GaussianBlur(radius))


def smaller(image: PIL.Image.Image, side: int) -> PIL.Image.Image:
    return image.resize((side, side), PIL.Image.Resampling.BICUBIC).resize(image.size, PIL.Image.Resampling.BICUBIC)


def spoiled(pictures: list[PIL.Image.Image], random: np.random.Generator) -> dict[str, list[PIL.Image.Image]]:
    return {
        "as rendered": pictures,
        **{f"noise, sigma {s} of 255": [noisy(p, s, random) for p in pictures] for s in (8, 16, 32, 48)},
        **{f"blur, radius {r} pixels": [blurred(p, r) for p in pictures] for r in (1.0, 1.5, 2.0)},
        "made smaller, 48 pixels a side": [smaller(p, 48) for p in pictures],
    }


def read(pictures: list[PIL.Image.Image], world: World) -> list[Scene | None]:
    return [scene for start in range(0, len(pictures), 100) for scene in read_pictures(pictures[start : start + 100], world)]


def accuracy(seen: list[Scene | None], scenes: list[Scene]) -> dict[str, float]:
    """Share of scenes read exactly, of their things, of their backgrounds, and of pictures in which nothing was recognised."""
    things = [s is not None and s.places[i] == t for s, truth in zip(seen, scenes, strict=True) for i, t in enumerate(truth.places) if t]
    grounds = [s is not None and s.background == truth.background for s, truth in zip(seen, scenes, strict=True)]
    exact = [s == truth for s, truth in zip(seen, scenes, strict=True)]
    unread = [s is None for s in seen]
    rates = {"exact": exact, "things": things, "backgrounds": grounds, "unreadable": unread}
    return {name: round(float(np.mean(rights)), 5) for name, rights in rates.items()}


def row(name: str, found: dict[str, float], rate: float) -> str:
    numbers = " | ".join(f"{100 * found[key]:.2f}" for key in ("exact", "things", "backgrounds", "unreadable"))
    return f"| {name} | {numbers} | {rate:.0f} |"


class CodeReader:
    """Scenes from codes alone: what the image tokenizer makes of every column that can be drawn."""

    def __init__(self, model: StoryboardModel) -> None:
        self.columns: dict[tuple[int, bytes], set[tuple[str, Thing | None]]] = collections.defaultdict(set)
        self.grid = model.config.grid
        for background, column in itertools.product(FULL.backgrounds, range(self.grid)):
            things = all_things(FULL)
            pictures = [np.tile(strip(background, column, thing), (1, self.grid, 1)) for thing in things]
            codes = model.encode_images(to_pixels([PIL.Image.fromarray(p) for p in pictures], FULL.pixels))
            for thing, own in zip(things, codes.unflatten(1, (self.grid, self.grid)), strict=True):
                self.columns[column, own[:, 0].numpy().tobytes()].add((background, thing))

    def read(self, codes: torch.Tensor) -> Scene | None:
        """(positions, depth) -> the one scene that they spell, or None where they spell none, or several."""
        square = codes.unflatten(0, (self.grid, self.grid))
        found = [self.columns.get((c, square[:, c].contiguous().numpy().tobytes()), set()) for c in range(self.grid)]
        scenes = [
            Scene(background, places)
            for background in FULL.backgrounds
            for places in itertools.product(*[[thing for ground, thing in some if ground == background] for some in found])
        ]
        return scenes[0] if len(scenes) == 1 else None


def rendered_rows(world: World, count: int, model: StoryboardModel | None) -> tuple[list[str], dict[str, Any]]:
    random = rng(0, 40)
    scenes = [scene_of(random, "test", world=world) for _ in range(count)]
    pictures = [render(scene, world) for scene in scenes]
    kinds = spoiled(pictures, random)
    if model is not None:
        kinds["encoded and decoded by the image tokenizer"] = to_images(model.decode_codes(model.encode_images(to_pixels(pictures, 96))))
    read(pictures[:1], world)  # what the oracle compares with is made at its first use
    lines, figures = [], {}
    for name, shown in kinds.items():
        began = time.perf_counter()
        figures[name] = accuracy(read(shown, world), scenes)
        lines.append(row(name, figures[name], count / (time.perf_counter() - began)))
    return lines, figures


def drawn_rows(count: int) -> tuple[list[str], dict[str, Any]]:
    """Captions drawn and pictures edited by the packaged model that can; and edited by the one that was not taught to."""
    lines: list[str] = []
    figures: dict[str, Any] = {}
    for source, kind, temperature in itertools.product((MODEL, "storyboard"), ("draw", "edit"), (0.0, 1.0, 2.0)):
        if source != MODEL and kind == "draw":
            continue
        model = load_model(source)
        assert isinstance(model, StoryboardModel)
        reader = CodeReader(model)
        turns = [make_turn(rng(0, 41, n), kind, "test") for n in range(count)]
        wanted = read([turn[1].images[0].pixels for turn in turns], FULL)  # rendered
        params = SamplingParams(form=AnswerForm.IMAGE)
        image = params.image.model_copy(update={"temperature": temperature, "guidance_scale": 1.0})
        answers = answer(model, [prompt for prompt, _ in turns], params.model_copy(update={"image": image}), EvaluateConfig())
        how = f"temperature {temperature:g}" if temperature else "greedily"
        name = f"`{source}`, {'captions drawn' if kind == 'draw' else 'pictures edited'}, {how}"
        found = figures[name] = split(reader, answers, wanted)
        order = ("right", "wrong_by_codes", "misread", "undecided", "undecided_steady")
        lines.append(f"| {name} | " + " | ".join(str(found[key]) for key in order) + " |")
    return lines, figures


def split(reader: CodeReader, answers: list[Document], wanted: list[Scene | None]) -> dict[str, int]:
    """What the oracle says of pictures, and what their codes say of that. right, wrong_by_codes: the codes spell what the oracle read,
    which is what was asked for, or is not. misread: the codes spell another scene. undecided: they spell none; steady: the oracle reads
    the same in the picture spoiled three ways."""
    images = [document.images[0] for document in answers]
    pictures = [image.pixels for image in images]
    random = rng(0, 42)
    seen = read(pictures, FULL)
    again = [read(some, FULL) for some in zip(*[(noisy(p, 8, random), blurred(p, 1.0), smaller(p, 64)) for p in pictures], strict=True)]
    counts: collections.Counter[str] = collections.Counter()
    for number, (image, shown, asked) in enumerate(zip(images, seen, wanted, strict=True)):
        spelled = reader.read(image.codes)
        if spelled is None:
            counts["undecided"] += 1
            counts["undecided_steady"] += all(others[number] == shown for others in again)
            counts["undecided_as_asked"] += shown == asked
        elif spelled != shown:
            counts["misread"] += 1
        else:
            counts["right" if shown == asked else "wrong_by_codes"] += 1
    keys = ("right", "wrong_by_codes", "misread", "undecided", "undecided_steady", "undecided_as_asked")
    return {"pictures": len(images), **{key: int(counts[key]) for key in keys}}


HEAD = """## How well the oracle reads

Held-out scenes (test split), in per cent: scenes read exactly, things right (kind, colour, size, count, hat and place), backgrounds right,
pictures in which nothing is recognised (which count as wrong); and pictures read in a second.
"""
DRAWN = """
Pictures that packaged models drew. Their codes are a second reading that looks at no pixel: a column with the codes of a rendered column
shows what that one shows. *right* and *wrong*: the codes spell the scene that the oracle read, and it is, or is not, what was asked for:
errors of the model. *misread*: the codes spell another scene than the oracle read: errors of the oracle. *undecided*: the codes spell no
scene that can be drawn, so nobody can say; *steady* of them are read alike with noise (sigma 8), blurred (1 pixel) and at 64 pixels a side.
`storyboard` was never taught to edit, so its pictures show many errors.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the pictures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--docs", type=Path, help="a folder in which oracle.md is written")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    share = 10 if arguments.quick else 1
    model = load_model(MODEL)
    assert isinstance(model, StoryboardModel)
    table = "| pictures | scenes | things | backgrounds | unreadable | a second |\n|---|---|---|---|---|---|"
    standard, standard_figures = rendered_rows(FULL, 2000 // share, model)
    large, large_figures = rendered_rows(LARGE, 600 // share, None)
    drawn, drawn_figures = drawn_rows(480 // share)
    parts = [
        HEAD, f"Standard world, {2000 // share} pictures:\n", table, *standard, f"\nLarge world, {600 // share} pictures:\n", table, *large,
        DRAWN, "| pictures | right | wrong | misread | undecided | steady |\n|---|---|---|---|---|---|", *drawn,
    ]  # fmt: skip
    about = versions()
    command = f"python benchmarks/oracle.py --threads {arguments.threads}{' --quick' if arguments.quick else ''} --docs docs/results"
    made = f"{about['cpu']}, {about['cpu_threads']} thread(s), torch {about['torch']}, Diptych {about['diptych']} at {about['commit']}"
    parts.append(f"\n`{command}`. Made with {made}, beside other work.")
    print("\n".join(parts))
    if arguments.docs is not None:
        (arguments.docs / "oracle.md").write_text("\n".join(parts) + "\n")
    figures = {"standard": standard_figures, "large": large_figures, "drawn": drawn_figures}
    print(json.dumps({"name": "oracle", **figures, "versions": about}))


if __name__ == "__main__":
    main()
