"""Between PIL images and pixel tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from diptych.document import to_rgb


def to_pixels(images: Sequence[PIL.Image.Image], size: int) -> Tensor:
    """Images of any size and mode -> (N, 3, size, size) float32 in -1..1 (bicubic resize, the aspect ratio is not kept)."""
    arrays = []
    for image in images:
        rgb = to_rgb(image)
        if rgb.size != (size, size):
            rgb = rgb.resize((size, size), PIL.Image.Resampling.BICUBIC)
        arrays.append(np.asarray(rgb))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def square(image: PIL.Image.Image, *, keep_top: bool = False) -> PIL.Image.Image:
    """The centred square of an image; with `keep_top` the topmost one of a portrait."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, 0 if keep_top else (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def padded(image: PIL.Image.Image, fill: int = 127) -> PIL.Image.Image:
    """The image in the middle of a grey square of its long side."""
    rgb, side = to_rgb(image), max(image.size)
    if rgb.size == (side, side):
        return rgb
    canvas = PIL.Image.new("RGB", (side, side), (fill,) * 3)
    canvas.paste(rgb, ((side - rgb.width) // 2, (side - rgb.height) // 2))
    return canvas


def to_images(pixels: Tensor) -> list[PIL.Image.Image]:
    """(N, 3, S, S) float in -1..1 -> PIL images."""
    arrays = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [PIL.Image.fromarray(array) for array in arrays]
