"""How often Storyboard's oracle reads a picture exactly: clean, redrawn by the image tokenizer, with noise, with blur.

    python benchmarks/oracle.py [--quick]

Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import PIL.Image
import PIL.ImageFilter

from diptych.models import load_model
from diptych.models.pixels import to_images, to_pixels
from diptych.runtime import versions
from diptych.worlds.storyboard.oracle import read_pictures
from diptych.worlds.storyboard.render import render
from diptych.worlds.storyboard.scene import random_scene


def noisy(image: PIL.Image.Image, sigma: float, rng: np.random.Generator) -> PIL.Image.Image:
    array = np.asarray(image).astype(float) + rng.normal(0, sigma, (96, 96, 3))
    return PIL.Image.fromarray(array.clip(0, 255).astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="200 pictures instead of 2000")
    count = 200 if parser.parse_args().quick else 2000
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng, int(rng.integers(4))) for _ in range(count)]
    pictures = [render(scene) for scene in scenes]
    model = load_model("storyboard")
    redrawn = to_images(model.decode_codes(model.encode_images(to_pixels(pictures, 96))))
    versions_of = {
        "clean": pictures,
        "redrawn by the image tokenizer": redrawn,
        **{f"noise, sigma {s}": [noisy(p, s, rng) for p in pictures] for s in (8, 16, 24)},
        **{f"blur, radius {r}": [p.filter(PIL.ImageFilter.GaussianBlur(r)) for p in pictures] for r in (0.5, 1.0, 1.5)},
    }
    rates = {}
    for name, shown in versions_of.items():
        began = time.perf_counter()
        read = [scene for start in range(0, count, 100) for scene in read_pictures(shown[start : start + 100])]
        rates[name] = float(np.mean([a == b for a, b in zip(read, scenes, strict=True)]))
        print(f"{name:<34}{100 * rates[name]:6.2f} % exact   {count / (time.perf_counter() - began):7.0f} pictures/s")
    print(json.dumps({"name": "oracle", "pictures": count, "exact": rates, "versions": versions()}))


if __name__ == "__main__":
    main()
