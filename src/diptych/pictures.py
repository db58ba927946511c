"""Pictures: from anything to upright RGB, and from there to a data address.

Pixels are read from bytes whose metadata is left out (`picture_metadata.py`); of the metadata only the orientation is read.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from diptych.picture_metadata import (
    BITS_PER_SAMPLE,
    COLOR_MAP,
    COMPRESSION,
    PHOTOMETRIC,
    PLANAR,
    REMEDY,
    SAMPLE_FORMAT,
    UPRIGHT,
    Unfit,
    find_orientation,
    pixels_only,
)

GREYS = "whole numbers from 0 to 255 or to 65535, and fractions from 0 to 1 (with a highest of 16 or more: to 255)"


class Decoded(NamedTuple):
    """`raw`: the bytes of the file. `format`: as PIL names it. `as_stored`: the file's own pixels stand upright."""

    pixels: PIL.Image.Image
    raw: bytes
    format: str | None
    as_stored: bool


def open_image(source: Any, folder: Path | None = None) -> PIL.Image.Image:
    """An RGB image from a PIL image, the bytes of a file, a path (relative to `folder`, or to the working directory) or a base64 data
    address.

    A PIL image is taken as it stands (its frame, its orientation); for the rest see `decode`.
    Raises ValueError naming the source where it cannot be read, and nothing else.
    """
    return to_rgb(source) if isinstance(source, PIL.Image.Image) else decode(source, folder).pixels


def decode(source: Any, folder: Path | None = None) -> Decoded:
    """The picture in a file's bytes, at a path or in a data address: RGB, turned upright, the first frame of several.

    Orientation is EXIF's or TIFF's; where they have none, XMP's (as `PIL.ImageOps.exif_transpose` does). Colour profiles and gamma
    are ignored. Damaged PNG chunks are refused where pixels depend on them. More pixels than twice `PIL.Image.MAX_IMAGE_PIXELS`
    (179 million by default, 540 MB of RGB) are refused; from half of that on they are read with PIL's warning.
    Raises ValueError naming the source where it cannot be read, and nothing else.
    """
    with reading(f"of {len(source)} bytes" if isinstance(source, bytes) else repr(str(source)[: 300 if isinstance(source, Path) else 120])):
        raw = source if isinstance(source, bytes) else _bytes_of(source, folder)
        if not raw:
            raise Unfit(f"it is empty. {REMEDY}")
        kept = pixels_only(raw)
        with PIL.Image.open(io.BytesIO(kept.raw)) as image:
            rgb = _rgb(image)
            exif, xmp = (image.info.get(name) for name in ("exif", "xmp"))
            orientation = find_orientation(
                kept.exif or (exif if isinstance(exif, bytes) else b""), kept.xmp or (xmp if isinstance(xmp, bytes) else b"")
            )
        if orientation != 1:
            rgb = rgb.transpose(UPRIGHT[orientation])
        return Decoded(rgb, raw, image.format, orientation == 1)


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """An RGB image of any mode, without metadata: what is transparent stands on white, greys of more than 8 bits are scaled.

    White is 65535 in 16 bits (4095 in a TIFF of 12). In 32 bits, whole or float, the numbers decide: `grey_levels`.
    Raises ValueError naming the mode where it has no pixels, cannot be loaded, or its greys are of no known range.
    """
    with reading(f"(PIL, mode {image.mode}, {image.width} x {image.height} pixels)"):
        return _rgb(image)


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Whatever goes wrong becomes a ValueError that names the picture."""
    try:
        yield
    except Unfit as error:
        raise ValueError(f"cannot read image {name}: {error}") from error
    except PIL.UnidentifiedImageError as error:  # its own words are the address of a buffer
        raise ValueError(f"cannot read image {name}: it is no picture, or of a kind that Pillow does not read. {REMEDY}") from error
    except Exception as error:  # on damaged bytes PIL's decoders fail in any way
        said = str(error)[:200] or type(error).__name__
        raise ValueError(f"cannot read image {name}: {said}. {REMEDY}") from error


def _bytes_of(source: Any, folder: Path | None) -> bytes:
    if isinstance(source, str) and source.startswith("data:image/"):
        kind, comma, content = source.partition(",")
        if not comma or not kind.endswith(";base64"):
            raise Unfit(f"a data address begins with data:image/...;base64, and holds the bytes of a file. {REMEDY}")
        return base64.b64decode(content, validate=True)
    if not isinstance(source, str | os.PathLike):
        raise Unfit(f"{type(source).__name__} is no picture; allowed are a PIL image, bytes, a path, a data address. {REMEDY}")
    return ((folder or Path()) / source).read_bytes()


def image_data_address(image: PIL.Image.Image) -> str:
    """The image as a `data:image/png;base64,` address, for JSON and HTML; in RGB, whatever its mode."""
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# --- pixels ---
def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if min(image.size) < 1:
        raise Unfit(f"it has no pixels ({image.width} x {image.height}). {REMEDY}")
    bits = _bits(image)  # known until it is loaded
    image.load()
    rgb, alpha = _opaque(image), _alpha(image, bits)
    if alpha is not None:
        rgb.putalpha(alpha)  # becomes RGBA
        rgb = PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    rgb.info = {}
    return rgb


def _bits(image: PIL.Image.Image) -> int:
    """Of a sample in a file that was not loaded yet."""
    arguments = next((tile[3] for tile in getattr(image, "tile", ())), "")
    raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    found = re.search(r";(\d+)", raw_mode) if isinstance(raw_mode, str) else None
    return int(found[1]) if found else 8


def _opaque(image: PIL.Image.Image) -> PIL.Image.Image:
    """A new RGB image, without regard to what is transparent."""
    tags = getattr(image, "tag_v2", {})
    refuse_misread(image.mode, tags)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        top = 65535 if image.mode.startswith("I;") or (image.mode == "I" and image.format in ("PNG", "PPM")) else None
        levels = grey_levels(np.asarray(image), 4095 if tags.get(BITS_PER_SAMPLE) == (12,) else top)
        inverted = bool(tags) and tags.get(PHOTOMETRIC, 0) == 0  # PIL inverts 8 bits only
        return PIL.Image.fromarray(255 - levels if inverted else levels).convert("RGB")
    plain = image
    if "transparency" in image.info:  # one that does not fit the mode stops PIL
        plain = image.copy()
        plain.info = {}
    if image.mode in ("P", "PA") and COLOR_MAP in tags and max(tags[COLOR_MAP]) < 256:  # PIL takes for granted 16 bits
        colours = np.array(tags[COLOR_MAP], dtype=np.uint8).reshape(3, -1).T  # (colours, 3)
        plain.putpalette(colours.tobytes())
    between = {"PA": "RGBA", "RGBa": "RGBA", "La": "LA"}.get(image.mode)
    return (plain.convert(between) if between else plain).convert("RGB")


def _alpha(image: PIL.Image.Image, bits: int) -> PIL.Image.Image | None:
    """What is opaque (L), from a channel, a palette or `info["transparency"]`, which is left alone where it does not fit the mode."""
    key = image.info.get("transparency")
    if image.mode in ("LA", "RGBA"):
        return image.getchannel("A")
    if image.mode in ("PA", "La", "RGBa"):
        return image.getchannel(image.getbands()[-1])
    if image.mode == "P":
        table = np.full(256, 255, dtype=np.uint8)
        if isinstance(key, bytes):
            table[: len(key)] = np.frombuffer(key, dtype=np.uint8)[:256]
        elif isinstance(key, int) and 0 <= key < 256:
            table[key] = 0
        elif image.palette is not None and image.palette.mode.endswith("A"):
            return image.convert("RGBA").getchannel("A")
        else:
            return None
        return PIL.Image.fromarray(table[np.asarray(image)])
    if image.mode == "RGB" and isinstance(key, tuple) and len(key) == 3 and all(isinstance(part, int) for part in key):
        deep = bits == 16 or max(key) > 255  # PIL keeps the high byte of pixels, and the key whole
        return _but((np.asarray(image) == [part >> 8 if deep else part for part in key]).all(axis=2))
    if image.mode in ("1", "L", "I", "I;16", "I;16B", "I;16L", "I;16N") and isinstance(key, int):
        values = np.asarray(image)
        if image.mode == "1":
            values = values.astype(np.uint8) * 255
        return _but(values == (key * 255 // (2**bits - 1) if image.mode == "L" and bits < 8 else key))
    return None


def refuse_misread(mode: str, tags: Mapping[int, Any]) -> None:
    """Raises ValueError for kinds of TIFF that PIL opens with wrong colours. `tags`: empty where the picture is no TIFF."""
    bits, apart = tags.get(BITS_PER_SAMPLE, (1,)), tags.get(PLANAR) == 2
    if max(tags.get(SAMPLE_FORMAT, (1,))) == 2 and max(bits) < 32:
        raise Unfit(f"its numbers are signed, of {max(bits)} bits. Save it as an 8-bit PNG")
    if apart and (mode == "LAB" or (max(bits) > 8 and tags.get(COMPRESSION, 1) == 1)):
        raise Unfit(f"its channels ({mode}, {max(bits)} bits) are stored one after the other. Save it as a PNG")


def _but(transparent: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8))


def grey_levels(values: np.ndarray, top: int | None = None) -> np.ndarray:
    """Greys of more than 8 bits as (H, W) uint8: round(value * 255 / top).

    Args:
        values: (H, W), whole or float.
        top: the value of white, where the mode or the file tells. Without it: 1 for floats up to 1; 255 for whole numbers up to 255,
            and for fractions if their highest is 16 or more; 65535 for whole numbers up to 65535.
    Raises:
        ValueError: negative, NaN, infinite or higher values, and fractions with a highest between 1 and 16, which may be either.
    """
    lowest, highest = float(values.min()), float(values.max())  # NaN where one is
    if top is None and lowest >= 0:
        whole = not np.issubdtype(values.dtype, np.floating) or bool((values == np.floor(values)).all())
        if highest <= 1 and np.issubdtype(values.dtype, np.floating):
            top = 1
        elif highest <= 255 and (whole or highest >= 16):
            top = 255
        elif highest <= 65535 and whole:
            top = 65535
    if top is None:
        raise Unfit(f"its greys go from {lowest:g} to {highest:g}; allowed are {GREYS}. Save it as an 8-bit PNG")
    return np.rint(np.minimum(values, top).astype(np.float32) * np.float32(255 / top)).astype(np.uint8)
