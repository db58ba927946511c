"""Between PIL images and pixel tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
from torch import Tensor


def to_pixels(images: Sequence[PIL.Image.Image], size: int) -> Tensor:
    """Images of any size and mode -> (N, 3, size, size) float32 in -1..1 (bicubic resize)."""
    arrays = []
    for image in images:
        rgb = image.convert("RGB")
        if rgb.size != (size, size):
            rgb = rgb.resize((size, size), PIL.Image.Resampling.BICUBIC)
        arrays.append(np.asarray(rgb))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> list[PIL.Image.Image]:
    """(N, 3, S, S) float in -1..1 -> PIL images."""
    arrays = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [PIL.Image.fromarray(array) for array in arrays]
