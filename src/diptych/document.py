"""Illustrated documents: what a unified model reads and writes, and the message form that the ecosystem speaks."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch


@dataclasses.dataclass(frozen=True)
class Text:
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """A picture as pixels, as codes, or both.

    `pixels`: PIL image, RGB; None until a sampled image is decoded.
    `codes`: (num_positions, depth) int64; None for a picture that came from outside.
    """

    pixels: PIL.Image.Image | None = None
    codes: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.pixels is None and self.codes is None:
            raise ValueError("an Image needs pixels or codes; neither was given")


STAND_IN = Image(codes=torch.zeros(1, 1, dtype=torch.long))  # for a picture that nobody opened, where lengths alone are asked for
Segment = Text | Image


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """An ordered list of segments, e.g. text, picture, text, picture."""

    segments: tuple[Segment, ...]

    def __iter__(self):
        return iter(self.segments)

    def __len__(self) -> int:
        return len(self.segments)

    @property
    def images(self) -> list[Image]:
        return [segment for segment in self.segments if isinstance(segment, Image)]

    @property
    def text(self) -> str:
        """All text segments, joined by a space."""
        return " ".join(segment.text for segment in self.segments if isinstance(segment, Text))

    def captions(self) -> list[tuple[int, str, Image]]:
        """(place, caption, picture) of each picture with a caption: the text before it, with nothing but pictures between.

        A picture that has no text there, or an empty one, is left out.
        """
        found: list[tuple[int, str, Image]] = []
        caption = ""
        for place, segment in enumerate(self.segments):
            if isinstance(segment, Text):
                caption = segment.text
            elif caption.strip():
                found.append((place, caption, segment))
        return found

    def to_blocks(self) -> list[dict[str, Any]]:
        """`[{"type": "text", "text": ...}, {"type": "image", "image": PIL image}, ...]`

        Raises ValueError for an image that has codes but no pixels yet.
        """
        blocks: list[dict[str, Any]] = []
        for segment in self.segments:
            if isinstance(segment, Text):
                blocks.append({"type": "text", "text": segment.text})
            elif segment.pixels is None:
                raise ValueError("an image of this document has codes but no pixels; decode it first")
            else:
                blocks.append({"type": "image", "image": segment.pixels})
        return blocks

    @classmethod
    def from_blocks(cls, blocks: str | Sequence[dict[str, Any]], folder: Path | None = None) -> Document:
        """The inverse of `to_blocks`; a plain string is one text segment.

        An image may be a PIL image, a file path, the bytes of a file, or a `data:image/...;base64,` address. `folder`: what paths are
        relative to; by default the working directory.
        """
        if isinstance(blocks, str):
            return cls((Text(blocks),))
        segments: list[Segment] = []
        for index, block in enumerate(blocks):
            kind = block.get("type") if isinstance(block, dict) else None
            if kind == "text" and isinstance(block.get("text"), str):
                segments.append(Text(block["text"]))
            elif kind == "image" and block.get("image") is not None:
                segments.append(Image(open_image(block["image"], folder)))
            else:
                raise ValueError(
                    f"block {index} is {block!r:.120}; allowed are {{'type': 'text', 'text': str}} and "
                    "{'type': 'image', 'image': PIL image, path or data address}"
                )
        return cls(tuple(segments))


# --- pictures: anything to upright RGB -------------------------------------------------------------------------------------
# Pixels are read from bytes whose metadata is left out, so that nothing in it can stop or change them; of the metadata only
# the orientation is read, and what is wrong with it counts as upright.

REMEDY = "Give a PNG or JPEG file that opens."
GREYS = "whole numbers from 0 to 255 or to 65535, and fractions from 0 to 1 (with a highest of 16 or more: to 255)"
UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT, 3: PIL.Image.Transpose.ROTATE_180, 4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE, 6: PIL.Image.Transpose.ROTATE_270, 7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}  # fmt: skip
PNG, XMP_JPEG, XMP_PNG, EXIF_PNG = b"\x89PNG\r\n\x1a\n", b"http://ns.adobe.com/xap/1.0/\0", b"XML:com.adobe.xmp", b"Raw profile type exif"
MAX_PROFILE = 1 << 20  # bytes of compressed metadata in which an orientation is looked for
BITS_PER_SAMPLE, COMPRESSION, PHOTOMETRIC, ORIENTATION, PLANAR, COLOR_MAP, SAMPLE_FORMAT, XMP_TIFF = 258, 259, 262, 274, 284, 320, 339, 700
PIXEL_TAGS = {  # of TIFF: what pixels depend on
    254, 255, 256, 257, BITS_PER_SAMPLE, COMPRESSION, PHOTOMETRIC, 263, 266, 273, 277, 278, 279, PLANAR, 292, 293, 317, COLOR_MAP,
    322, 323, 324, 325, 332, 333, 334, 336, 338, SAMPLE_FORMAT, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532,
}  # fmt: skip


class Unfit(ValueError):
    """What is wrong with a picture, and what to do."""


class Decoded(NamedTuple):
    """`raw`: the bytes of the file. `format`: as PIL names it. `as_stored`: the file's own pixels stand upright."""

    pixels: PIL.Image.Image
    raw: bytes
    format: str | None
    as_stored: bool


class PixelsOnly(NamedTuple):
    """The bytes of a file without its metadata, and what of the metadata may name an orientation."""

    raw: bytes
    exif: bytes = b""
    xmp: bytes = b""


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


# --- metadata ---
def find_orientation(exif: bytes, xmp: bytes) -> int:
    """1 to 8; 1 (upright) where none is named, or none that can be."""
    found = None
    if (directory := Directory.first(re.sub(rb"^(Exif\0\0){1,2}", b"", exif))) is not None:
        found = directory.whole(ORIENTATION)
    if found is None and (match := re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)):
        found = int(match[1])
    return found if found in UPRIGHT else 1


@dataclasses.dataclass(frozen=True)
class Directory:
    """The first directory of a TIFF file, which EXIF is too. Whatever the bytes, nothing here raises."""

    order: Any  # "little" or "big"
    wide: int  # bytes of an offset: 4, or 8 in BigTIFF
    start: int
    entries: dict[int, bytes]  # by tag: tag (2), type (2), count (wide), value or offset (wide)

    @classmethod
    def first(cls, tiff: bytes) -> Directory | None:
        order: Any = {b"II": "little", b"MM": "big"}.get(tiff[:2])
        if order is None or not {42, 43} & {*tiff[2:4]}:
            return None
        wide = 8 if 43 in tiff[2:4] else 4
        start = int.from_bytes(tiff[wide : 2 * wide], order)
        begin, length = start + (8 if wide == 8 else 2), 4 + 2 * wide
        end = begin + int.from_bytes(tiff[start:begin], order) * length
        found = [tiff[at : at + length] for at in range(begin, min(end, len(tiff) - length + 1), length)]
        return cls(order, wide, start, {int.from_bytes(entry[:2], order): entry for entry in found})

    def whole(self, tag: int) -> int | None:
        """The value of a tag that is one whole number; -1 where it is anything else, None where there is no such tag."""
        if tag not in self.entries:
            return None
        entry = self.entries[tag]
        size = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4}.get(int.from_bytes(entry[2:4], self.order), 0)
        one = int.from_bytes(entry[4 : 4 + self.wide], self.order) == 1
        return int.from_bytes(entry[4 + self.wide :][:size], self.order) if one and size else -1

    def content(self, tag: int, tiff: bytes) -> bytes:
        """Of a tag whose value is bytes elsewhere in the file."""
        entry = self.entries.get(tag, b"")
        count, offset = (int.from_bytes(entry[at : at + self.wide], self.order) for at in (4, 4 + self.wide))
        return tiff[offset : offset + count]

    def written(self, tiff: bytes) -> bytes:
        """The file with this directory in the place of its first, and no other."""
        count = len(self.entries).to_bytes(8 if self.wide == 8 else 2, self.order)
        ours = count + b"".join(self.entries.values()) + bytes(self.wide)
        return tiff[: self.start] + ours + tiff[self.start + len(ours) :]


def pixels_only(raw: bytes) -> PixelsOnly:
    """JPEG, PNG, TIFF and AVIF without metadata; the bytes as they are in other formats, whose metadata PIL does not read into.

    Raises ValueError where a PNG chunk that pixels depend on is damaged.
    """
    if raw.startswith(b"\xff\xd8\xff"):
        return _jpeg(raw)
    if raw.startswith(PNG):
        return _png(raw)
    if raw[4:8] == b"ftyp":  # the orientation of AVIF is a property of the picture; its EXIF says nothing, but stops PIL where it is broken
        return PixelsOnly(re.sub(rb"(infe[\2\3]...(?:..|....)..)Exif", rb"\1skip", raw, flags=re.DOTALL))
    if (directory := Directory.first(raw)) is not None:
        kept = dataclasses.replace(directory, entries={tag: entry for tag, entry in directory.entries.items() if tag in PIXEL_TAGS})
        return PixelsOnly(kept.written(raw), raw, directory.content(XMP_TIFF, raw))
    return PixelsOnly(raw)


def _jpeg(raw: bytes) -> PixelsOnly:
    """Of the segments before the first scan, comments and application data go, save what tells the colour space (JFIF, Adobe)."""
    kept, exif, xmp, at = [raw[:2]], b"", b"", 2
    while at + 4 <= len(raw) and raw[at] == 0xFF:
        marker, end = raw[at + 1], at + 2 + int.from_bytes(raw[at + 2 : at + 4], "big")
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA or end < at + 4 or end > len(raw):
            break
        payload = raw[at + 4 : end]
        if marker == 0xE1 and payload.startswith(b"Exif\0\0"):
            exif = exif or payload
        elif marker == 0xE1 and payload.startswith(XMP_JPEG):
            xmp = xmp or payload
        colours = (marker == 0xE0 and payload.startswith(b"JFIF\0") and len(payload) >= 14) or (
            marker == 0xEE and payload.startswith(b"Adobe") and len(payload) >= 12
        )
        if colours or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(raw[at:end])
        at = end
    return PixelsOnly(b"".join([*kept, raw[at:]]), exif, xmp)


def _png(raw: bytes) -> PixelsOnly:
    """Critical chunks and transparency stay, up to the end of the image."""
    kept, found, at = [PNG], {b"eXIf": b"", EXIF_PNG: b"", XMP_PNG: b""}, len(PNG)
    while at + 12 <= len(raw):
        end = at + 12 + int.from_bytes(raw[at : at + 4], "big")
        kind, payload = raw[at + 4 : at + 8], raw[at + 8 : end - 4]
        if end > len(raw):
            break
        if not kind[0] & 0x20 or kind == b"tRNS":
            if zlib.crc32(raw[at + 4 : end - 4]) != int.from_bytes(raw[end - 4 : end], "big"):
                raise Unfit(f"its {kind.decode('latin-1')} chunk at byte {at} is damaged (wrong checksum). {REMEDY}")
            kept.append(raw[at:end])
        elif kind == b"eXIf":
            found[kind] = found[kind] or payload
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            name, _, content = payload.partition(b"\0")
            if name in found:
                found[name] = found[name] or _png_text(kind, content)
        at = end
        if kind == b"IEND":
            return PixelsOnly(b"".join(kept), found[b"eXIf"] or _profile(found[EXIF_PNG]), found[XMP_PNG])
    return PixelsOnly(b"".join([*kept, raw[at:]]), found[b"eXIf"] or _profile(found[EXIF_PNG]), found[XMP_PNG])


def _png_text(kind: bytes, content: bytes) -> bytes:
    """Of a text chunk behind its keyword; empty where it does not unpack."""
    packed = kind == b"zTXt" or (kind == b"iTXt" and content[:1] == b"\1")
    if kind == b"zTXt":
        content = content[1:]
    elif kind == b"iTXt":  # flag, method, language \0 translated keyword \0
        content = content[2:].partition(b"\0")[2].partition(b"\0")[2]
    try:
        return zlib.decompressobj().decompress(content, MAX_PROFILE) if packed else content
    except zlib.error:
        return b""


def _profile(text: bytes) -> bytes:
    """EXIF as ImageMagick writes it into PNG: a name, a length, hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


# --- message form ---
def to_message(role: str, document: Document) -> dict[str, Any]:
    return {"role": role, "content": document.to_blocks()}


def image_data_address(image: PIL.Image.Image) -> str:
    """The image as a `data:image/png;base64,` address, for JSON and HTML; in RGB, whatever its mode."""
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def to_json_blocks(document: Document) -> list[dict[str, Any]]:
    """`to_blocks` with images as data addresses: ready for JSON, read back by `Document.from_blocks`."""
    return [
        {"type": "image", "image": image_data_address(block["image"])} if block["type"] == "image" else block
        for block in document.to_blocks()
    ]


def join(documents: Iterable[Document]) -> Document:
    return Document(tuple(segment for document in documents for segment in document))
