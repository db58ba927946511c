"""A picture decoder of one's own (`image_decoder`): codes in, pixels out, in the place of the family's.

For families whose codes a diffusion model draws, and for rewards that can do with a cheaper decoder than an evaluation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diptych.models.base import UnifiedModel
from diptych.usercode import load_named

FAR_OUTSIDE = 10.0  # decoders overshoot a little; 0..255 is another form
FORM = "(N, num_positions, D) int64 -> (N, 3, H, W) float in -1..1"


def set_image_decoder(model: UnifiedModel, name: str | None) -> UnifiedModel:
    """The same model, whose pictures are decoded by `package.module:name`; None: by its own decoder.

    What is named is a function of codes, a module, or a class that makes either; one that has a parameter `model` is given the model there.
    It is part of no checkpoint, and never trained.

    Raises ValueError where there is no such thing.
    """
    if name is not None:
        model.image_decoder = _Checked(name, _made(name, model))
    return model


def _made(name: str, model: UnifiedModel) -> Callable[..., Any]:
    found = load_named(name)
    if inspect.isclass(found):
        try:
            found = found(**_given(found, model))
        except Exception as error:
            raise ValueError(f"image_decoder {name!r} cannot be made: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"image_decoder {name!r} is {type(found).__name__}; a function, a module, or a class is needed: {FORM}")
    if isinstance(found, nn.Module):
        return found.to(model.device).eval().requires_grad_(False)
    given = _given(found, model)
    return (lambda codes: found(codes, **given)) if given else found


def _given(called: Callable[..., Any], model: UnifiedModel) -> dict[str, Any]:
    try:
        return {"model": model} if "model" in inspect.signature(called).parameters else {}
    except ValueError:  # of what is not written in Python nothing is known
        return {}


class _Checked:
    """Not a module, so that it is no part of the model that holds it."""

    def __init__(self, name: str, decode: Callable[..., Any]) -> None:
        self.name, self.decode = name, decode

    @torch.no_grad()
    def __call__(self, codes: Tensor) -> Tensor:
        """Raises ValueError for what is no pictures."""
        pixels = self.decode(codes)
        if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[:2] != (len(codes), 3) or not pixels.is_floating_point():
            got = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
            raise ValueError(f"image_decoder {self.name!r} gave {got} for codes {tuple(codes.shape)}; it must be {FORM}")
        if not bool(pixels.isfinite().all()):
            raise ValueError(f"image_decoder {self.name!r} gave NaN or infinity for codes {tuple(codes.shape)}; look at it")
        if pixels.numel() and float(pixels.abs().max()) > FAR_OUTSIDE:
            raise ValueError(f"image_decoder {self.name!r} gave values up to {float(pixels.abs().max()):g}; pixels lie in -1..1")
        return pixels
