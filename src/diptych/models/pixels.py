"""Between PIL images and pixel tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from diptych.pictures import to_rgb

MAX_SIDES_RATIO = 200  # what transformers' processor of Emu3 takes; Chameleon's makes 512 x 102400 pixels of it before it crops


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


def not_too_long(image: PIL.Image.Image, reader: str) -> PIL.Image.Image:
    """The image itself. Raises ValueError where one side is more than 200 times the other."""
    if max(image.size) > MAX_SIDES_RATIO * min(image.size):
        raise ValueError(
            f"{reader} cannot read a picture of {image.width} x {image.height} pixels: one side may be at most {MAX_SIDES_RATIO} times "
            "the other. Crop it, or pad it"
        )
    return image


def padded(image: PIL.Image.Image, fill: int = 127) -> PIL.Image.Image:
    """The image in the middle of a grey square of its long side. Raises ValueError where that would fill the memory."""
    rgb, side = to_rgb(image), max(image.size)
    if PIL.Image.MAX_IMAGE_PIXELS is not None and side**2 > 2 * PIL.Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"a picture of {image.width} x {image.height} pixels makes too large a square. Crop it, or scale it down")
    if rgb.size == (side, side):
        return rgb
    canvas = PIL.Image.new("RGB", (side, side), (fill,) * 3)
    canvas.paste(rgb, ((side - rgb.width) // 2, (side - rgb.height) // 2))
    return canvas


def to_images(pixels: Tensor) -> list[PIL.Image.Image]:
    """(N, 3, S, S) float in -1..1 -> PIL images."""
    arrays = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [PIL.Image.fromarray(array) for array in arrays]


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, and no TF32 in convolutions, which is torch's default on GPUs."""
    cudnn: Any = torch.backends.cudnn
    before, cudnn.conv.fp32_precision = cudnn.conv.fp32_precision, "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        cudnn.conv.fp32_precision = before
