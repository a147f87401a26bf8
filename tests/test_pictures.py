# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A picture comes out as it looks, whatever kind of file it is in; or it is refused with the reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from hf_flowdistill.data.image_dataset import UnusableImage, open_image
from hf_flowdistill.errors import UserError
from hf_flowdistill.hub.export import add_results


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)  # all shades of grey, or of a colour
WIDE = RAMP.astype(np.uint16) * 257


def file_of(image, form, **more) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **more)
    return file.getvalue()


def png(depth: int, colour: int, row: bytes, width: int, transparent: bytes | None = None) -> bytes:
    """A PNG file of one row, as Pillow does not write them."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    key = b"" if transparent is None else chunk(b"tRNS", transparent)
    return b"\x89PNG\r\n\x1a\n" + head + key + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


def twelve_bits() -> bytes:
    """A TIFF file of 12 bits a pixel: 0, 4095, 2048, 1."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 0, 277: 1, 278: 1, 279: 6}.items():
        tags[tag] = value
        tags.tagtype[tag] = 3
    return b"II*\0" + struct.pack("<I", 8) + tags.tobytes(8) + bytes.fromhex("000fff800001")  # the offset is added


def white_is_zero() -> bytes:
    data = bytearray(file_of(Image.fromarray(65535 - WIDE), "TIFF"))
    place = data.index(struct.pack("<HHI", 262, 3, 1) + b"\1")
    data[place + 8] = 0
    return bytes(data)


def transparent(mode: str) -> Image.Image:
    """The left half black and hidden, the right one grey (red, where there is colour) and half of it let through."""
    hidden, shown = ((0, 0, 0, 0), (100, 0, 0, 128)) if mode == "RGBA" else ((0, 0), (100, 128))
    image = Image.new(mode, (2, 1))
    if mode == "PA":
        image.putpalette([shade for shade in range(256) for _ in range(3)])
    image.putpixel((0, 0), hidden)
    image.putpixel((1, 0), shown)
    return image


def palette() -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 200, 10, 20])
    image.putpixel((1, 0), 1)
    return file_of(image, "PNG", transparency=0)


GREY = np.repeat(RAMP[..., None], 3, 2)
HALF = 177  # 100 / 255 under half a veil of white
AS_THEY_LOOK = {
    "16 bits, PNG": (file_of(Image.fromarray(WIDE), "PNG"), GREY),
    "16 bits, TIFF": (file_of(Image.fromarray(WIDE), "TIFF"), GREY),
    "16 bits, TIFF of a big-endian machine": (file_of(Image.fromarray(WIDE.astype(">u2")), "TIFF"), GREY),
    "16 bits, TIFF, white is zero": (white_is_zero(), GREY),
    "16 bits, PGM, which Pillow opens as 32": (file_of(Image.fromarray(WIDE), "PPM"), GREY),
    "16 bits, JPEG 2000": (file_of(Image.fromarray(WIDE), "JPEG2000", irreversible=False), GREY),
    "16 bits, in memory": (Image.fromarray(WIDE), GREY),
    "12 bits, TIFF": (twelve_bits(), [[[0] * 3, [255] * 3, [128] * 3, [0] * 3]]),
    "16 bits, one of them transparent": (
        png(16, 0, struct.pack(">3H", 40000, 25700, 0), 3, struct.pack(">H", 40000)),
        [[[255] * 3, [100] * 3, [0] * 3]],
    ),
    "2 bits, one of them transparent": (
        png(2, 0, bytes([0b00011011]), 4, b"\0\1"),
        [[[0] * 3, [255] * 3, [170] * 3, [255] * 3]],
    ),
    "1 bit, black transparent": (png(1, 0, b"\x80", 2, b"\0\0"), [[[255] * 3, [255] * 3]]),
    "16 bits a colour, one of them transparent": (
        png(16, 2, struct.pack(">6H", 0, 0, 65535, 65535, 0, 0), 2, struct.pack(">3H", 0, 0, 65535)),
        [[[255] * 3, [255, 0, 0]]],
    ),
    "RGBA": (file_of(transparent("RGBA"), "PNG"), [[[255] * 3, [HALF, 127, 127]]]),
    "RGBA, WebP": (file_of(transparent("RGBA"), "WEBP", lossless=True), [[[255] * 3, [HALF, 127, 127]]]),
    "LA": (file_of(transparent("LA"), "PNG"), [[[255] * 3, [HALF] * 3]]),
    "LA, in memory": (transparent("LA"), [[[255] * 3, [HALF] * 3]]),
    "PA, in memory": (transparent("PA"), [[[255] * 3, [HALF] * 3]]),
    "a palette with a transparent colour": (palette(), [[[255] * 3, [200, 10, 20]]]),
    "RGB with a transparent colour": (
        file_of(Image.fromarray(np.uint8([[[1, 2, 3], [4, 5, 6]]])), "PNG", transparency=(1, 2, 3)),
        [[[255] * 3, [4, 5, 6]]],
    ),
    "grey with a transparent shade": (
        file_of(Image.fromarray(np.uint8([[0, 7]])), "PNG", transparency=0),
        [[[255] * 3, [7] * 3]],
    ),
    "1 bit": (file_of(Image.fromarray(np.uint8([[0, 255]])).convert("1"), "PNG"), [[[0] * 3, [255] * 3]]),
    "CMYK": (file_of(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), [[[255, 0, 0]]]),
}


@pytest.mark.parametrize("kind", AS_THEY_LOOK)
def test_a_picture_comes_out_as_it_looks(kind):
    source, expected = AS_THEY_LOOK[kind]
    picture = open_image(source)
    assert picture.mode == "RGB"
    assert np.abs(np.asarray(picture, int) - np.asarray(expected)).max() <= 1


def test_opaque_pictures_keep_every_bit():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for form in ("RGB", "RGBA"):
        assert (np.asarray(open_image(file_of(image.convert(form), "PNG"))) == pixels).all()


@pytest.mark.parametrize("dtype", ["float32", "int32"])
@pytest.mark.parametrize("form", ["TIFF", None])
def test_numbers_of_no_known_range_are_refused_with_the_reason(form, dtype):
    image = Image.fromarray(np.linspace(0, 1, 64).reshape(8, 8).astype(dtype))
    numbers = {"float32": "floats", "int32": "32-bit integers"}[dtype]
    with pytest.raises(UnusableImage, match=f"its pixels are {numbers}.*range is not known: save it with 8 or 16 bit"):
        open_image(image if form is None else file_of(image, form))


def test_a_deep_picture_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = open_image(file_of(Image.fromarray(WIDE[:4]), "PNG", exif=exif))
    assert (np.asarray(picture)[..., 0] == np.rot90(RAMP[:4], -1)).all()


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_picture_is_taken_and_that_is_known(form):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    more = {"lossless": True} if form == "WEBP" else {}
    picture = open_image(file_of(red, form, save_all=True, append_images=[blue], **more))
    assert picture.getpixel((4, 4)) == (255, 0, 0) and picture.info["animated"]
    assert not open_image(file_of(red, form, **more)).info["animated"]


def test_a_picture_for_a_card_comes_out_as_it_looks_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = Image.fromarray(RAMP[:4]).convert("CMYK")  # which PNG does not know
    sideways.save(tmp_path / "samples.jpg", exif=exif, quality=100)
    add_results(tmp_path, grid=tmp_path / "samples.jpg")
    with Image.open(tmp_path / "grid.png") as grid:
        assert np.abs(np.asarray(grid, int)[..., 0] - np.rot90(RAMP[:4], -1)).max() < 16
    (tmp_path / "no.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="no.png cannot be read"):
        add_results(tmp_path, grid=tmp_path / "no.png")
