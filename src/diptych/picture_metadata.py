"""The metadata of a picture's file: the bytes without it, so that nothing in it can stop or change pixels, and what orientation it names.

What is wrong with an orientation counts as upright.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from typing import Any, NamedTuple

import PIL.Image

REMEDY = "Give a PNG or JPEG file that opens."
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


class PixelsOnly(NamedTuple):
    """The bytes of a file without its metadata, and what of the metadata may name an orientation."""

    raw: bytes
    exif: bytes = b""
    xmp: bytes = b""


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
