"""Pictures of every mode, source and shape, and of damaged bytes: right, or refused by name."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from typer.testing import CliRunner

from diptych.cli import app
from diptych.data.convert.pictures import MissingPicture, load
from diptych.data.records import open_source
from diptych.document import Document, Image, Text
from diptych.models.pixels import padded, to_images
from diptych.pictures import decode, image_data_address, open_image, to_rgb

FUZZ = int(os.environ.get("DIPTYCH_FUZZ", "1000"))  # damaged files of each format
WIDTH, HEIGHT = 6, 4


def uniform(mode: str, value: Any) -> PIL.Image.Image:
    return PIL.Image.new(mode, (WIDTH, HEIGHT), value)


def halves(values: Any, dtype: Any) -> PIL.Image.Image:
    """The left half of one value, the right half of another."""
    return PIL.Image.fromarray(np.tile(np.repeat(np.array(values, dtype=dtype), WIDTH // 2), (HEIGHT, 1)))


def grey(mode: str) -> PIL.Image.Image:
    """16 bits in a byte order: 0 and 40000."""
    values = np.tile(np.repeat(np.array([0, 40000], dtype=">u2" if mode == "I;16B" else "<u2"), WIDTH // 2), (HEIGHT, 1))
    return PIL.Image.frombytes(mode, (WIDTH, HEIGHT), values.tobytes())


def palette(mode: str = "RGB", transparency: Any = None) -> PIL.Image.Image:
    """Index 0 is orange, index 1 black."""
    image = uniform("P", 0)
    image.putpalette([200, 100, 50, 0, 0, 0] if mode == "RGB" else [200, 100, 50, 128, 0, 0, 0, 255], mode)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def with_info(image: PIL.Image.Image, transparency: Any) -> PIL.Image.Image:
    image.info["transparency"] = transparency
    return image


def saved(image: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    if kind in ("JPEG", "WEBP", "AVIF"):
        options = {"quality": 100, **({"subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}), **options}
    if kind == "JPEG2000":
        options = {"irreversible": False, **options}
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def means(image: PIL.Image.Image) -> list[float]:
    assert (image.mode, image.info) == ("RGB", {})
    return np.asarray(image, dtype=float).reshape(-1, 3).mean(0).tolist()


# mode, how it is made, the mean of each channel as a person sees it on white, the formats that can hold it
HALF = [100 * 128 / 255 + 127] * 3  # grey 100 half transparent on white
ORANGE, ORANGE_HALF = [200.0, 100.0, 50.0], [200 * 128 / 255 + 127, 100 * 128 / 255 + 127, 50 * 128 / 255 + 127]
DEEP = [40000 / 65535 * 255 / 2] * 3
TABLE: dict[str, tuple[Callable[[], PIL.Image.Image], list[float], tuple[str, ...]]] = {
    "1": (lambda: halves([0, 255], np.uint8).convert("1"), [127.5] * 3, ("PNG", "TIFF", "GIF", "BMP", "PPM", "TGA")),
    "L": (lambda: uniform("L", 77), [77.0] * 3, ("PNG", "TIFF", "JPEG", "GIF", "BMP", "PPM", "TGA", "JPEG2000", "AVIF", "WEBP")),
    "L, key": (lambda: with_info(halves([0, 77], np.uint8), 77), [127.5] * 3, ("PNG",)),
    "LA": (lambda: uniform("LA", (100, 128)), HALF, ("PNG", "TIFF", "TGA", "JPEG2000", "WEBP")),
    "La": (lambda: uniform("LA", (100, 128)).convert("La"), HALF, ()),
    "P": (palette, ORANGE, ("PNG", "TIFF", "GIF", "BMP", "TGA")),
    "P, key": (lambda: palette(transparency=0), [255.0] * 3, ("PNG", "GIF")),
    "P, alpha": (lambda: palette(transparency=bytes([128])), ORANGE_HALF, ("PNG",)),
    "P, RGBA palette": (lambda: palette("RGBA"), ORANGE_HALF, ()),
    "PA": (lambda: uniform("RGBA", (200, 100, 50, 128)).convert("PA"), ORANGE_HALF, ("TIFF",)),
    "RGB": (lambda: uniform("RGB", (200, 100, 50)), ORANGE, ("PNG", "TIFF", "JPEG", "BMP", "PPM", "TGA", "JPEG2000", "AVIF", "WEBP")),
    "RGB, key": (lambda: with_info(uniform("RGB", (200, 100, 50)), (200, 100, 50)), [255.0] * 3, ("PNG",)),
    "RGBA": (lambda: uniform("RGBA", (200, 100, 50, 128)), ORANGE_HALF, ("PNG", "TIFF", "TGA", "JPEG2000", "WEBP", "AVIF")),
    "RGBa": (lambda: uniform("RGBA", (200, 100, 50, 128)).convert("RGBa"), ORANGE_HALF, ()),
    "RGBX": (lambda: uniform("RGB", (200, 100, 50)).convert("RGBX"), ORANGE, ("TIFF", "JPEG")),
    "CMYK": (lambda: uniform("CMYK", (55, 155, 205, 0)), ORANGE, ("TIFF", "JPEG")),
    "YCbCr": (lambda: uniform("RGB", (200, 100, 50)).convert("YCbCr"), ORANGE, ("TIFF", "JPEG")),
    "LAB": (lambda: uniform("RGB", (200, 100, 50)).convert("LAB"), ORANGE, ("TIFF",)),
    "HSV": (lambda: uniform("RGB", (200, 100, 50)).convert("HSV"), ORANGE, ()),
    "I, 8 bits": (lambda: halves([0, 200], np.int32), [100.0] * 3, ("TIFF",)),
    "I, 16 bits": (lambda: halves([0, 40000], np.int32), DEEP, ("TIFF", "PPM")),
    "F, 0..1": (lambda: halves([0, 0.8], np.float32), [102.0] * 3, ("TIFF", "PPM")),
    "F, 0..255": (lambda: halves([0.5, 200.25], np.float32), [100.0] * 3, ("TIFF", "PPM")),
    "F, 16 bits": (lambda: halves([0, 40000], np.float32), DEEP, ("TIFF",)),
    "I;16": (lambda: halves([0, 40000], np.uint16), DEEP, ("PNG", "TIFF", "PPM", "JPEG2000")),
    "I;16, key": (lambda: with_info(halves([40001, 40000], np.uint16), 40001), [(255 + 40000 / 65535 * 255) / 2] * 3, ()),
    "I;16L": (lambda: grey("I;16L"), DEEP, ("TIFF",)),
    "I;16B": (lambda: grey("I;16B"), DEEP, ("PNG", "TIFF")),
    "I;16N": (lambda: grey("I;16N"), DEEP, ()),
}  # fmt: skip
REFUSED: dict[str, tuple[Callable[[], PIL.Image.Image], str, tuple[str, ...]]] = {
    "I, negative": (lambda: halves([-1, 200], np.int32), "greys go from -1 to 200", ("TIFF",)),
    "I, too high": (lambda: halves([0, 65536], np.int32), "greys go from 0 to 65536", ("TIFF",)),
    "F, NaN": (lambda: halves([0, np.nan], np.float32), "greys go from nan", ("TIFF", "PPM")),
    "F, infinite": (lambda: halves([0, np.inf], np.float32), "greys go from 0 to inf", ("TIFF",)),
    "F, negative": (lambda: halves([-0.5, 1], np.float32), r"greys go from -0\.5 to 1", ("TIFF",)),
    "F, mixed": (lambda: halves([0.25, 1.5], np.float32), r"greys go from 0\.25 to 1\.5", ("TIFF",)),
    "F, too high": (lambda: halves([0.5, 256], np.float32), r"greys go from 0\.5 to 256", ("TIFF",)),
    "no pixels": (lambda: PIL.Image.new("RGB", (0, 5)), r"it has no pixels \(0 x 5\)", ()),
    "no greys": (lambda: PIL.Image.new("F", (5, 0)), r"it has no pixels \(5 x 0\)", ()),
}


def sources(image: PIL.Image.Image, formats: tuple[str, ...], folder: Path) -> list[tuple[str, Any]]:
    """The object, and of each format: the bytes, a path, the path as words, a data address."""
    found: list[tuple[str, Any]] = [("object", image)]
    for kind in formats:
        raw = saved(image, kind)
        (folder / f"picture.{kind}").write_bytes(raw)
        address = "data:image/png;base64," + base64.b64encode(raw).decode()
        found += [(kind, raw), (kind, folder / f"picture.{kind}"), (kind, str(folder / f"picture.{kind}")), (kind, address)]
    return found


# --- modes, sources, families ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_every_mode_from_every_source_has_the_colours_that_a_person_sees(name, tmp_path):
    make, expected, formats = TABLE[name]
    before = make().tobytes()
    for kind, source in sources(image := make(), formats, tmp_path):
        off = 2.5 if kind in ("JPEG", "AVIF", "WEBP") else 1
        assert means(open_image(source)) == pytest.approx(expected, abs=off), (kind, type(source))
        if not isinstance(source, PIL.Image.Image):
            assert means(load(source if isinstance(source, bytes) or str(source).startswith("data:") else Path(source))[0]) == means(
                open_image(source)
            )
    assert image.tobytes() == before  # the given picture is left as it was


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_known_range_or_no_pixels_is_refused_by_name(name, tmp_path):
    make, said, formats = REFUSED[name]
    for _, source in sources(make(), formats, tmp_path):
        shown = r"\(PIL, mode " if isinstance(source, PIL.Image.Image) else r"of \d+ bytes" if isinstance(source, bytes) else "'"
        with pytest.raises(ValueError, match=rf"^cannot read image {shown}.*{said}.*(Save it as an 8-bit PNG|Give a PNG or JPEG file)"):
            open_image(source)


def preparations(models, tiny_model) -> dict[str, Callable[[PIL.Image.Image], torch.Tensor]]:
    """Everything that makes tensors of pictures, in every family."""
    found: dict[str, Callable[[PIL.Image.Image], torch.Tensor]] = {}
    for name, model in {**models, "storyboard": tiny_model}.items():
        for method in ("target_pixels", "processed", "prompt_pixels"):
            if hasattr(model, method):
                found[f"{name} {method}"] = getattr(model, method)
    assert len(found) == 13, found.keys()  # janus 2, emu3 2, chameleon 2, vila_u 2, storyboard 1
    return found


def test_every_family_sees_every_mode_as_the_rgb_picture_of_the_same_colours(models, tiny_model):
    for method, prepare in preparations(models, tiny_model).items():
        for name, (make, _, _) in TABLE.items():
            plain = PIL.Image.fromarray(np.asarray(to_rgb(make())))  # whose colours the test before has checked
            assert torch.equal(prepare(make()), prepare(plain)), (method, name)
        for make, said, _ in REFUSED.values():
            with pytest.raises(ValueError, match=f"^cannot read image .*{said}"):
                prepare(make())


SHAPES = [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (3, 3), (1, 4), (4, 1), (3, 40), (40, 3), (400, 3), (3, 400), (200, 1), (1, 200)]


@pytest.mark.parametrize("size", SHAPES)
def test_tiny_and_narrow_pictures_keep_their_channels_in_every_family(models, tiny_model, size):
    """Nothing is taken for channels but the channels: a red picture is as red as a large one, but for what it is padded with."""
    red, large = PIL.Image.new("RGB", size, (255, 0, 0)), PIL.Image.new("RGB", (64, 64), (255, 0, 0))
    for method, prepare in preparations(models, tiny_model).items():
        seen, expected = prepare(red), prepare(large).mean((1, 2))  # (3, H, W), (3,)
        middle = seen[:, seen.shape[1] // 2, seen.shape[2] // 2]
        torch.testing.assert_close(middle, expected, atol=1e-5, rtol=0, msg=lambda said, at=method: f"{at}: {said}")
        if method not in ("janus processed", "janus prompt_pixels"):  # the one that pads
            torch.testing.assert_close(seen.mean((1, 2)), expected, atol=1e-5, rtol=0)


def test_emu3_turns_tiny_and_narrow_pictures_into_positions(models):
    for size in SHAPES:
        row = models["emu3"].prompt_image_row(Image(PIL.Image.new("RGB", size, (255, 0, 0))))
        assert len(row) > 3, size


def test_pictures_that_are_too_long_are_refused_by_name(models):
    for name in ("emu3", "chameleon"):
        for size in ((201, 1), (1, 201), (400, 1), (1, 70000)):
            with pytest.raises(ValueError, match=rf"^{name} cannot read a picture of {size[0]} x {size[1]} pixels: .* at most 200 times"):
                models[name].processed(PIL.Image.new("RGB", size))
    with pytest.raises(ValueError, match=r"70000 x 1 pixels makes too large a square\. Crop it"):
        padded(PIL.Image.new("RGB", (70000, 1)))


def test_ordinary_pictures_are_prepared_as_transformers_does_it(models):
    """Channels are named now; nothing else may change. Janus prepares pictures itself."""
    rng = np.random.default_rng(0)
    for name in ("emu3", "chameleon"):
        model = models[name]
        for width, height in ((60, 40), (33, 57), (24, 24), (7, 9), (100, 20)):
            image = PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            expected = model.image_processor(images=[image], return_tensors="pt")["pixel_values"][0].float()
            assert torch.equal(model.processed(image), expected)


def test_pictures_become_data_addresses_whatever_their_mode_and_info():
    for make, expected, _ in TABLE.values():
        image = make()
        image.info |= {"icc_profile": 3, "dpi": "no"}
        assert means(open_image(image_data_address(image))) == pytest.approx(expected, abs=1)


# --- greys of more than 8 bits -----------------------------------------------------------------------------------------


def test_all_65536_greys_are_rounded():
    """Against whole numbers alone: the nearest of 256 levels, (255 v + 32767) // 65535."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = [(255 * v + 32767) // 65535 for v in range(65536)]
    assert [expected[v] for v in (0, 128, 129, 65535)] == [0, 0, 1, 255]
    swapped = PIL.Image.frombytes("I;16B", (256, 256), values.astype(">u2").tobytes())
    stored = PIL.Image.open(io.BytesIO(saved(PIL.Image.fromarray(values), "PNG")))
    for image in (swapped, stored, *(PIL.Image.fromarray(values.astype(kind)) for kind in (np.uint16, np.int32, np.float32))):
        assert np.asarray(to_rgb(image))[..., 0].flatten().tolist() == expected, image.mode


def png(array: np.ndarray, bits: int, key: tuple[int, ...] = ()) -> bytes:
    """A PNG by the specification alone. `array`: (H, W) or (H, W, 3) of values below 2 ** bits."""
    height, width = array.shape[:2]
    rows = b""
    for row in array.reshape(height, -1):
        digits = "".join(f"{int(v):0{bits}b}" for v in row)
        rows += b"\0" + int(digits.ljust(-(-len(digits) // 8) * 8, "0"), 2).to_bytes(-(-len(digits) // 8), "big")
    header = struct.pack(">IIBBBBB", width, height, bits, 2 if array.ndim == 3 else 0, 0, 0, 0)
    chunks = [
        (b"IHDR", header),
        *([(b"tRNS", struct.pack(f">{len(key)}H", *key))] if key else []),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_png_greys_of_every_depth_with_and_without_a_transparent_one(bits):
    top = 2**bits - 1
    values = np.linspace(0, top, 16).round().astype(int).reshape(4, 4)
    expected = np.rint(values * 255 / top)
    assert np.abs(np.asarray(open_image(png(values, bits)))[..., 1] - expected).max() == 0
    for key in (0, top, int(values[1, 3])):
        shown = np.where(values == key, 255, expected)
        for image in (open_image(png(values, bits, (key,))), open_image(PIL.Image.open(io.BytesIO(png(values, bits, (key,)))))):
            assert np.abs(np.asarray(image)[..., 2] - shown).max() == 0, (bits, key)


@pytest.mark.parametrize("bits", [8, 16])
def test_png_colours_of_both_depths_with_and_without_a_transparent_one(bits):
    top = 2**bits - 1
    values = np.random.default_rng(bits).integers(0, top + 1, (4, 5, 3))
    values[0, :3] = [[0, 0, 0], [top, top, top], [top, 0, top // 2]]
    expected = values * 255 / top
    assert np.abs(np.asarray(open_image(png(values, bits))) - expected).max() <= 1
    for place in ((0, 0), (0, 1), (0, 2), (2, 3)):
        shown = expected.copy()
        shown[place] = 255
        assert np.abs(np.asarray(open_image(png(values, bits, tuple(map(int, values[place]))))) - shown).max() <= 1


def tiff(array: np.ndarray, photometric: int, order: str = "<", *, bits: int = 0, data: bytes = b"", sample: int = 1, **tags: Any) -> bytes:
    """An uncompressed TIFF by the specification alone. `sample`: 1 unsigned, 2 signed, 3 float. `tags`: t274=(3, [6]), ..."""
    height, width = array.shape[:2]
    count = array.shape[2] if array.ndim == 3 else 1
    data = data or array.astype(array.dtype.newbyteorder(order)).tobytes()
    entries = {
        256: (3, [width]), 257: (3, [height]), 258: (3, [bits or array.dtype.itemsize * 8] * count), 259: (3, [1]), 262: (3, [photometric]),
        273: (4, [0]), 277: (3, [count]), 278: (3, [height]), 279: (4, [len(data)]), 339: (3, [sample] * count),
        **{int(name[1:]): value for name, value in tags.items()},
    }  # fmt: skip

    def packed(kind: int, values: Any) -> bytes:
        return values if isinstance(values, bytes) else struct.pack(order + str(len(values)) + {3: "H", 4: "I"}[kind], *values)

    start = 8 + 2 + 12 * len(entries) + 4
    entries[273] = (4, [start + sum(len(packed(*one)) for one in entries.values() if len(packed(*one)) > 4)])
    directory, behind = b"", b""
    for tag, (kind, values) in sorted(entries.items()):
        content = packed(kind, values)
        number = len(content) if isinstance(values, bytes) else len(values)
        place = content.ljust(4, b"\0") if len(content) <= 4 else struct.pack(order + "I", start + len(behind))
        behind += content if len(content) > 4 else b""
        directory += struct.pack(order + "HHI", tag, kind, number) + place
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    return head + directory + bytes(4) + behind + data


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiffs_of_every_depth_are_right_or_refused(order):
    ramp = np.linspace(0, 1, 64).reshape(4, 16)
    deep, shown = (ramp * 65535).astype(np.uint16), ramp * 255
    twelve = "".join(f"{int(v):012b}" for v in (ramp * 4095).flatten())
    colours = np.stack([ramp, ramp[::-1], ramp * 0 + 0.3], axis=-1)
    colormap = (3, [min(255, 16 * i) for i in range(256)] * 3)  # of 8 bits, where TIFF says 16
    indices = np.tile(np.arange(16, dtype=np.uint8), (4, 1))
    right = {
        "16": (tiff(deep, 1, order), shown), "8, white is 0": (tiff((ramp * 255).astype(np.uint8), 0, order), 255 - shown),
        "int32": (tiff(deep.astype(np.int32), 1, order, sample=2), shown),
        "float32": (tiff(ramp.astype(np.float32), 1, order, sample=3), shown),
        "float32, white is 0": (tiff(ramp.astype(np.float32), 0, order, sample=3), 255 - shown),
        "RGB 16": (tiff((colours * 65535).astype(np.uint16), 2, order), colours * 255),
        "palette of 8 bits": (tiff(indices, 3, order, t320=colormap), indices * 16),
    }  # fmt: skip
    either = {
        "16, white is 0": (tiff(deep, 0, order), 255 - shown), "uint32": (tiff(deep.astype(np.uint32), 1, order), shown),
        "12": (tiff(ramp, 1, order, bits=12, data=int(twelve, 2).to_bytes(len(twelve) // 8, "big")), shown),
    }  # fmt: skip
    for name, (raw, expected) in {**right, **either}.items():
        if name in either and order == ">":  # PIL knows no such files
            with pytest.raises(ValueError, match=r"^cannot read image of"):
                open_image(raw)
            continue
        seen = np.asarray(open_image(raw), dtype=float)
        assert np.abs(seen - (expected if expected.ndim == 3 else expected[..., None])).max() <= 1, (name, order)
    apart = np.moveaxis((colours * 65535).astype(np.uint16), -1, 0)
    planes = {"t284": (3, [2]), "t273": (4, [0])}
    for raw, said in (
        (tiff((ramp * 127).astype(np.int8), 1, order, sample=2), "its numbers are signed, of 8 bits"),
        (tiff((ramp * 32767).astype(np.int16), 1, order, sample=2), "its numbers are signed, of 16 bits"),
        (tiff(ramp.astype(np.float64), 1, order, sample=3), "of a kind that Pillow does not read"),
        (tiff((ramp * 2**32).clip(0, 2**32 - 1).astype(np.uint32), 1, order), "greys go from|of a kind that Pillow does not read"),
        (
            tiff(colours, 2, order, bits=16, data=apart.astype(apart.dtype.newbyteorder(order)).tobytes(), **planes),
            "stored one after the other",
        ),
    ):
        with pytest.raises(ValueError, match=f"^cannot read image of .*({said})"):
            open_image(raw)


def test_transparency_that_does_not_fit_the_mode_is_left_alone():
    odd: list[Any] = [None, "x", 3.5, (1, 2), (1, 2, "x"), b"", b"\0" * 999, -1, 256, 99999, [1], {}, (1, 2, 3, 4), 1 << 70]
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16", "YCbCr", "HSV"):
        image = uniform(mode, 1)
        expected = means(to_rgb(image))
        for transparency in odd:
            seen = means(to_rgb(with_info(uniform(mode, 1), transparency)))
            assert seen == expected or (mode == "P" and transparency == b"\0" * 999 and seen == [255.0] * 3), (mode, transparency)


# --- orientation -------------------------------------------------------------------------------------------------------

TURNED = {  # from what is stored to what is seen, by the definition of tag 274: where row 0 and column 0 are
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1], 7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1], 8: lambda a: a.transpose(1, 0, 2)[::-1],
}  # fmt: skip
STORED = np.random.default_rng(3).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def exif(orientation: int, kind: int = 3, count: int = 1, order: str = "<", more: bytes = b"") -> bytes:
    """`more`: further entries of 12 bytes."""
    one = struct.pack(order + "HHI", 274, kind, count) + struct.pack(order + {1: "Bxxx", 3: "Hxx", 4: "I"}.get(kind, "I"), orientation)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 1 + len(more) // 12)
    return head + one + more + bytes(4) + struct.pack(order + "II", 2, 1)


def jpeg_with(*segments: tuple[int, bytes], image: PIL.Image.Image | None = None) -> bytes:
    raw = saved(image or PIL.Image.fromarray(STORED), "JPEG")
    return raw[:2] + b"".join(struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content for marker, content in segments) + raw[2:]


def png_with(*chunks: bytes, late: bool = False) -> bytes:
    raw = saved(PIL.Image.fromarray(STORED), "PNG")
    at = len(raw) - 12 if late else 33  # before IEND, behind IHDR
    return raw[:at] + b"".join(chunks) + raw[at:]


def xmp(orientation: int) -> bytes:
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


def carriers(n: int) -> dict[str, bytes]:
    """Every place where an orientation may stand."""
    image, packet = PIL.Image.fromarray(STORED), b"Exif\0\0"
    profile = f"\nexif\n{len(packet + exif(n)):8}\n{(packet + exif(n)).hex()}\n".encode()
    return {
        "JPEG": jpeg_with((0xE1, packet + exif(n))), "JPEG, big-endian": jpeg_with((0xE1, packet + exif(n, order=">"))),
        "JPEG, LONG": jpeg_with((0xE1, packet + exif(n, kind=4))), "JPEG, twice Exif": jpeg_with((0xE1, packet + packet + exif(n))),
        "JPEG, XMP": jpeg_with((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(n))), "PNG": png_with(chunk(b"eXIf", exif(n))),
        "PNG, behind the pixels": png_with(chunk(b"eXIf", exif(n)), late=True),
        "PNG, profile": png_with(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile))),
        "PNG, plain profile": png_with(chunk(b"tEXt", b"Raw profile type exif\0" + profile)),
        "PNG, XMP": png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(n))),
        "PNG, packed XMP": png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp(n)))),
        "WebP": saved(image, "WEBP", exif=packet + exif(n)), "WebP, XMP": saved(image, "WEBP", xmp=xmp(n)),
        "TIFF": tiff(STORED, 2, t274=(3, [n])), "TIFF, big-endian": tiff(STORED, 2, ">", t274=(3, [n])),
        "TIFF, XMP": tiff(STORED, 2, t700=(1, xmp(n))), "BigTIFF": saved(image, "TIFF", big_tiff=True, tiffinfo={274: n}),
    }  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_from_every_place_where_they_stand(orientation):
    plain = {name: np.asarray(open_image(raw)) for name, raw in carriers(1).items()}
    for name, raw in carriers(orientation).items():
        seen = np.asarray(open_image(raw))
        assert np.array_equal(seen, TURNED[orientation](plain[name])), name
        with PIL.Image.open(io.BytesIO(raw)) as image:  # PIL's own way agrees on metadata that is sound
            assert np.array_equal(seen, np.asarray(PIL.ImageOps.exif_transpose(image).convert("RGB"))), name
        pixels, kept, _ = load(raw)
        assert np.array_equal(np.asarray(pixels), seen)
        assert kept == (raw if orientation == 1 else None)


def test_orientations_that_are_none_are_upright():
    plain = np.asarray(open_image(jpeg_with()))
    numbers, kinds, counts = (
        [exif(n) for n in (0, 9, 65535)],
        [exif(6, kind=k) for k in (2, 5, 7, 12, 99)],
        [exif(6, count=c) for c in (0, 2, 2**32 - 1)],
    )
    for packet in (*numbers, *kinds, *counts, b"", b"II", b"II*\0", b"II*\0\xff\xff\xff\xff", exif(6)[:12], b"garbage" * 9):
        assert np.array_equal(np.asarray(open_image(jpeg_with((0xE1, b"Exif\0\0" + packet)))), plain), packet


def test_the_orientation_of_avif_is_its_own_whatever_its_exif_says():
    packet = exif(6, more=struct.pack("<HHII", 0x0131, 2, 4, int.from_bytes(b"abc", "little")))
    raw = saved(PIL.Image.fromarray(STORED), "AVIF", exif=packet)
    seen = np.asarray(open_image(raw))
    assert seen.shape == (7, 5, 3)
    at = raw.index(b"II*\0")
    for length in (2, 4, 8):
        broken = raw[:at] + b"\xff" * length + raw[at + length :]
        assert np.array_equal(np.asarray(open_image(broken)), seen)


def test_an_open_pil_image_is_taken_as_it_stands():
    """What was opened by others may have been turned by them; its info tells nothing of that."""
    with PIL.Image.open(io.BytesIO(jpeg_with((0xE1, b"Exif\0\0" + exif(6))))) as image:
        assert open_image(image).size == (7, 5)
        assert open_image(PIL.ImageOps.exif_transpose(image)).size == (5, 7)


# --- metadata ----------------------------------------------------------------------------------------------------------


def mistyped(tag: int, kind: int, count: int, value: int) -> bytes:
    """Orientation 6 and one more tag of any type, count and value."""
    return jpeg_with((0xE1, b"Exif\0\0" + exif(6, more=struct.pack("<HHII", tag, kind, count, value))))


def test_nothing_in_exif_stops_or_changes_pixels():
    expected = TURNED[6](np.asarray(open_image(jpeg_with())))
    for tag in (0x011A, 0x0128, 0x0131, 0x0132, 0x013B, 0x02BC, 0x8298, 0x8769, 0x8825, 0xA005, 0x927C, 0xC4A5):
        for kind in (0, 1, 2, 3, 4, 5, 7, 10, 11, 12, 13, 16, 129, 65535):
            for count, value in ((1, 38), (1, 0), (0, 0), (3, 38), (2**31, 38), (1, 2**32 - 1)):
                assert np.array_equal(np.asarray(open_image(mistyped(tag, kind, count, value))), expected), (tag, kind, count, value)


def test_nothing_in_other_metadata_stops_or_changes_pixels():
    pixels = np.asarray(open_image(jpeg_with()))
    icc = saved(PIL.Image.fromarray(STORED), "JPEG", icc_profile=b"\0" * 200)
    for raw in (
        jpeg_with((0xE2, b"ICC_PROFILE\0")), jpeg_with((0xE2, b"ICC_PROFILE\0\1")), jpeg_with((0xE2, b"MPF\0II*\0" + b"\xff" * 40)), icc,
        jpeg_with((0xED, b"Photoshop 3.0\x008BIM\xff")), jpeg_with((0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\4abcd")),
        jpeg_with((0xE0, b"JFIF")), jpeg_with((0xEE, b"Adobe")), jpeg_with((0xFE, b"\xff\xd8\xff\xda" * 9)),
        jpeg_with((0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff")),
    ):  # fmt: skip
        assert np.array_equal(np.asarray(open_image(raw)), pixels)
    bomb, noise = zlib.compress(b"\0" * (1 << 26)), b"\xff" * 30
    contents = {
        b"eXIf": [noise], b"tEXt": [b"a" * 90, b"Raw profile type exif\0\nexif\n99\nxyz\n"], b"iTXt": [b"a\0\1\0\0\0" + bomb],
        b"zTXt": [b"a\0\0" + noise, b"a\0\7x", b"a\0\0" + bomb, b"Raw profile type exif\0\0" + bomb], b"iCCP": [b"a\0\0" + noise, b""],
        b"gAMA": [b"\0", bytes(4)], b"pHYs": [b"\0"], b"cHRM": [b"\0"], b"sRGB": [b""], b"acTL": [noise[:8]], b"fcTL": [noise[:26]],
        b"tIME": [b""],
    }  # fmt: skip
    wrong_sum = [chunk(b"tEXt", b"a\0b")[:-4] + bytes(4), chunk(b"eXIf", exif(6))[:-4] + bytes(4)]
    for one in [*wrong_sum, *(chunk(kind, content) for kind, of_kind in contents.items() for content in of_kind)]:
        for late in (False, True):
            seen = np.asarray(open_image(png_with(one, late=late)))
            assert np.array_equal(seen, STORED) or (one[4:8] == b"eXIf" and np.array_equal(seen, TURNED[6](STORED))), one[:40]
    for tag in (270, 282, 296, 305, 306, 34665, 34675, 34853, 33723, 34377, 0xBC01):
        for kind, values in ((3, [1]), (3, [1, 2]), (4, [9, 2**32 - 1, 3]), (4, [2**32 - 1])):
            assert np.array_equal(np.asarray(open_image(tiff(STORED, 2, **{f"t{tag}": (kind, values)}))), STORED), (tag, values)


def test_mistyped_exif_converts_inspects_and_trains(tmp_path):
    """The reproducer: a rational where Software is text, and where ResolutionUnit is a number."""
    stored = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8))
    more = {"software.jpg": 0x0131, "unit.jpg": 0x0128}
    for name, tag in more.items():
        packet = b"Exif\0\0" + exif(6, more=struct.pack("<HHII", tag, 5, 1, 38))
        (tmp_path / name).write_bytes(jpeg_with((0xE1, packet), image=stored))
    stored.save(tmp_path / "good.png")
    names = ["good.png", *more]
    lines = [
        {"id": n, "messages": [{"role": "user", "content": "draw"}, {"role": "assistant", "content": [{"type": "image", "image": n}]}]}
        for n in names
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    splits = [open_source(str(tmp_path / "d.jsonl"), split=split) for split in ("train", "validation")]
    shown = [source[index].answer.images[0].pixels for source in splits for index in range(source.size)]
    assert [image.size for image in shown] == [(24, 16), (16, 24), (16, 24)]
    upright = np.asarray(stored).transpose(1, 0, 2)[:, ::-1].astype(int)
    assert all(np.abs(np.asarray(image) - upright).mean() < 4 for image in shown[1:])
    for command in (
        ["data", "convert", "messages", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "out")],
        ["data", "inspect", str(tmp_path / "d.jsonl")],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert [line["id"] for line in records] == names
    for line in records[1:]:
        image = open_image(tmp_path / "out" / line["messages"][1]["content"][0]["image"])
        assert image.size == (16, 24)
        assert np.abs(np.asarray(image) - upright).mean() < 8


# --- damage ------------------------------------------------------------------------------------------------------------


def test_chunks_that_pixels_depend_on_are_checked():
    raw = png(np.full((4, 4), 9), 8, (9,))
    for kind in (b"IHDR", b"tRNS", b"IDAT", b"IEND"):
        at = raw.index(kind)
        end = at + 4 + int.from_bytes(raw[at - 4 : at], "big")
        with pytest.raises(
            ValueError, match=rf"^cannot read image of \d+ bytes: its {kind.decode()} chunk at byte \d+ is damaged \(wrong checksum\)"
        ):
            open_image(raw[:end] + bytes([raw[end] ^ 1]) + raw[end + 1 :])


@pytest.mark.parametrize(
    "error",
    [MemoryError(), struct.error("x"), KeyError(3), OverflowError(), RecursionError("x"), zlib.error(), EOFError(), AttributeError("x"),
     IndexError(), AssertionError(), NotImplementedError(), SyntaxError("x"), UnicodeDecodeError("a", b"", 0, 1, "x"),
     PIL.Image.DecompressionBombError("x"), PIL.Image.DecompressionBombWarning("x")],
)  # fmt: skip
def test_whatever_pil_raises_becomes_a_named_value_error(error, monkeypatch, tmp_path):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    raw = saved(uniform("RGB", 3), "PNG")
    (tmp_path / "a.png").write_bytes(raw)
    lazy = PIL.Image.open(tmp_path / "a.png")
    for module, name in ((PIL.Image, "open"), (PIL.Image.Image, "convert"), (PIL.Image.Image, "load")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            for source in (raw, tmp_path / "a.png", "data:image/png;base64," + base64.b64encode(raw).decode()):
                with pytest.raises(ValueError, match=r"^cannot read image .*: .+\. Give a PNG or JPEG file that opens\.$") as caught:
                    open_image(source)
                assert type(caught.value) is ValueError
    with monkeypatch.context() as patch:
        patch.setattr(type(lazy), "load", fail)
        with pytest.raises(ValueError, match=r"^cannot read image \(PIL, mode RGB, 6 x 4 pixels\)"):
            to_rgb(lazy)


def test_sources_that_are_none_are_named(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    other = [None, 3, 3.5, [], {}, io.BytesIO(b"x"), np.zeros((2, 2)), b"", b"x"]
    paths = ["", ".", "a\0b", "x" * 5000, "\ud800", tmp_path, tmp_path / "gone.png", tmp_path / "empty.png"]
    addresses = ["data:image/png;base64,", "data:image/png,abc", "data:image/png;base64,\u00e9", "data:image/"]
    for source in (*other, *paths, *addresses):
        with pytest.raises(ValueError, match=r"^cannot read image .*Give a PNG or JPEG file that opens\.$") as caught:
            open_image(source)
        assert type(caught.value) is ValueError
        assert len(str(caught.value)) < 600
    for path in (tmp_path, tmp_path / "gone.png", Path("x" * 5000), Path("a\0b")):
        with pytest.raises(MissingPicture, match="does not exist"):
            load(path)
    closed = PIL.Image.open(io.BytesIO(saved(uniform("RGB", 3), "PNG")))
    closed.close()
    with pytest.raises(ValueError, match=r"^cannot read image \(PIL"):
        open_image(closed)


def test_bombs_are_refused_and_what_is_merely_large_is_read(monkeypatch):
    raw = saved(PIL.Image.new("RGB", (10, 10)), "PNG")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 49)
    with pytest.raises(ValueError, match=r"^cannot read image of \d+ bytes: Image size \(100 pixels\) exceeds limit of 98 pixels"):
        open_image(raw)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 99)
    with pytest.warns(PIL.Image.DecompressionBombWarning):
        assert open_image(raw).size == (10, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"^cannot read image of"):
            open_image(raw)


def test_the_first_frame_of_several_is_taken():
    frames = [uniform("RGB", colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        raw = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        assert PIL.Image.open(io.BytesIO(raw)).n_frames == 3
        assert means(open_image(raw)) == pytest.approx([200, 0, 0], abs=4), kind


def test_adobe_jpegs_keep_their_colours():
    """CMYK as PIL writes it (Adobe, inverted), and YCCK: the same with the transform of its first three channels."""
    image = uniform("CMYK", (55, 155, 205, 0))
    raw = saved(image, "JPEG")
    assert b"Adobe" in raw
    assert means(open_image(raw)) == pytest.approx(ORANGE, abs=2)
    at = raw.index(b"Adobe") + 11
    with PIL.Image.open(io.BytesIO(raw[:at] + b"\2" + raw[at + 1 :])) as other:
        assert means(open_image(raw[:at] + b"\2" + raw[at + 1 :])) == pytest.approx(means(to_rgb(other)), abs=0)
    red = saved(uniform("RGB", (255, 0, 0)), "JPEG", keep_rgb=True)
    assert means(open_image(red)) == pytest.approx([255, 0, 0], abs=2)


# --- fuzz --------------------------------------------------------------------------------------------------------------


def damaged(raw: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """One of: bytes flipped, cut off, a piece twice or gone, noise inserted (as a segment or chunk), a number of extreme values."""
    data, at = bytearray(raw), int(rng.integers(len(raw)))
    way = int(rng.integers(8))
    if way < 3:
        for place in rng.integers(0, min(len(data), (len(data), 64, 200)[way]), rng.integers(1, 8)):
            data[place] = int(rng.integers(256)) if rng.random() < 0.5 else data[place] ^ (1 << int(rng.integers(8)))
    elif way == 3:
        del data[at:]
    elif way == 4:
        piece = data[at : at + int(rng.integers(1, 60))]
        data[at:at] = piece
    elif way == 5:
        del data[at : at + int(rng.integers(1, 30))]
    elif way == 6:
        noise = rng.bytes(int(rng.integers(1, 80)))
        if kind == "JPEG":
            noise = struct.pack(">BBH", 0xFF, int(rng.integers(0xC0, 0xFF)), len(noise) + 2) + noise
            at = 2
        elif kind == "PNG":
            noise, at = chunk(bytes(rng.choice(list(b"IHDRPLTEtRNSeXIfiCCPzTXtacTLfcTLfdAT"), 4)), noise), 33
        data[at:at] = noise
    else:
        data[at : at + 4] = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\xff\xff"][int(rng.integers(4))]
    return bytes(data)


def originals(kind: str) -> list[bytes]:
    """Small files of several modes, with metadata."""
    rng = np.random.default_rng(1)
    colours = PIL.Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    packet = exif(6, more=struct.pack("<HHII", 0x0131, 2, 8, 38) + struct.pack("<HHII", 0x8769, 4, 1, 8))
    modes = {
        "JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "RGBA", "P", "L", "1", "LA", "I;16"), "WEBP": ("RGB", "RGBA"), "GIF": ("P", "L"),
        "TIFF": ("RGB", "RGBA", "P", "L", "1", "I;16", "F", "CMYK"), "BMP": ("RGB", "P", "L", "1"),
    }[kind]  # fmt: skip
    found = []
    for mode in modes:
        image = PIL.Image.fromarray(rng.integers(0, 65536, (9, 12), dtype=np.uint16)) if mode == "I;16" else colours.convert(mode)
        options: dict[str, Any] = {"exif": b"Exif\0\0" + packet} if kind in ("JPEG", "PNG", "WEBP") else {}
        if mode in ("P", "L") and kind in ("PNG", "GIF"):
            options["transparency"] = 3
        found.append(saved(image, kind, **options))
        if kind == "JPEG":
            found.append(saved(image, kind, progressive=True, **options))
        if kind == "TIFF" and mode != "F":
            found += [saved(image, kind, compression=c) for c in ("tiff_lzw", "tiff_deflate", "packbits")]
        if kind in ("GIF", "WEBP", "PNG") and mode != "I;16":
            found.append(
                saved(image, kind, save_all=True, append_images=[image.transpose(PIL.Image.Transpose.ROTATE_180)], duration=9, **options)
            )
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damaged_files_are_pictures_or_refused_and_nothing_else_is_raised(kind, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 200_000)  # what claims to be large is refused before it takes time
    files, rng, seen = originals(kind), np.random.default_rng(7), {"read": 0, "refused": 0}

    def outcome(call: Callable[[], PIL.Image.Image], starts: str) -> str:
        try:
            pixels = call()
        except Exception as error:
            if type(error) is not ValueError or not str(error).startswith(starts):
                raise
            return "refused"
        assert (pixels.mode, pixels.info) == ("RGB", {})
        assert min(pixels.size) > 0
        return "read"

    for index in range(FUZZ):
        raw = damaged(files[index % len(files)], kind, rng)
        seen[outcome(lambda raw=raw: load(raw)[0], "cannot read image of ")] += 1
        if index % 5 == 0:
            try:
                image = PIL.Image.open(io.BytesIO(raw))
            except Exception:  # PIL's own, which is not ours
                continue
            outcome(lambda image=image: to_rgb(image), "cannot read image (PIL, mode ")
    print(kind, seen)
    assert min(seen.values()) > FUZZ // 50, seen


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_damage_to_metadata_alone_leaves_every_pixel(kind):
    """Bytes of the metadata behind the orientation are changed at random."""
    packet = exif(
        6, more=b"".join(struct.pack("<HHII", tag, 2, 20, 60) for tag in (0x010F, 0x0110, 0x0131, 0x0132, 0x8769, 0x8825))
    ) + bytes(60)
    image = PIL.Image.fromarray(STORED)
    if kind == "TIFF":
        raw = tiff(
            STORED, 2, t274=(3, [6]), t305=(2, b"Software, by name"), t306=(2, b"2020:01:01 00:00:00"), t34665=(4, [8]), t700=(1, xmp(3))
        )
        entries = [next(at for at in range(10, len(raw), 12) if raw[at : at + 2] == struct.pack("<H", tag)) for tag in (305, 306, 34665)]
        places = [at + i for at in entries for i in range(2, 12)]
        for words in (b"Software, by name", b"2020:01:01 00:00:00", xmp(3)):
            places += range(raw.index(words), raw.index(words) + len(words))
    else:
        raw = {
            "JPEG": jpeg_with((0xE1, b"Exif\0\0" + packet)),
            "PNG": png_with(chunk(b"eXIf", packet)),
            "WEBP": saved(image, "WEBP", exif=packet),
        }[kind]
        at = raw.index(packet)
        places = list(range(at + 22, at + len(packet)))
    expected, rng = np.asarray(open_image(raw)), np.random.default_rng(5)
    assert expected.shape == (7, 5, 3)
    for _ in range(FUZZ // 4):
        data = bytearray(raw)
        for place in rng.choice(places, int(rng.integers(1, 12))):
            data[place] = int(rng.integers(256))
        assert np.array_equal(np.asarray(open_image(bytes(data))), expected)


def test_models_draw_from_and_read_pictures_of_every_mode(models, tiny_model):
    """From end to end: rows of an example whose prompt and answer hold them, and a refusal by name."""
    for model in (*models.values(), tiny_model):
        for make, _, _ in TABLE.values():
            row = model.encode_example(
                Document((Image(make()), Text("what?")) if model is not tiny_model else (Text("red"),)), Document((Image(make()),))
            )
            assert len(row) > model.image_spec.num_positions
        with pytest.raises(ValueError, match=r"^cannot read image .*greys go from"):
            model.encode_example(Document((Text("a"),)), Document((Image(REFUSED["F, NaN"][0]()),)))


def test_tensors_become_pictures_and_come_back():
    image = PIL.Image.fromarray(STORED[:5, :5])
    tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert np.array_equal(np.asarray(to_images(tensor)[0]), np.asarray(image))
    assert decode(saved(image, "PNG")).as_stored
