# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Pictures of any kind as 8-bit RGB, without losing what they show; what cannot be kept is refused with its reason."""

import numpy as np
from PIL import Image, ImageOps


# To be raised with every change of what comes out of `to_rgb`: latents on the disk are of one such reading.
READING = 2
FULL_16_BITS = {  # (mode, format) of grey that fills 16 bits; None is a picture in memory
    *(("I;16", name) for name in ("PNG", "PPM", "JPEG2000", "TIFF", None)),
    *((mode, name) for mode in ("I;16L", "I;16B", "I;16N") for name in ("TIFF", None)),
    *(("I", name) for name in ("PNG", "PPM")),  # some versions of Pillow, and some kinds of file
}
BITS_PER_SAMPLE, WHITE_OR_BLACK_IS_ZERO = 258, 262  # tags of TIFF
KEYS = {"L;2": 85, "L;4": 17}  # grey of few bits is scaled to 8 when it is loaded, its transparent value is not


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` upright (EXIF), in 8-bit RGB, transparency over white.

    Grey of 16 bits is scaled by 1/257 (of 12 bits by 255/4095). Of an animation it is the first picture; colour
    profiles are not applied. An image straight from `Image.open` is best: what a file says is known as long as the
    picture is not loaded.

    Raises:
        ValueError: the picture's numbers have no known range (floats, 32-bit integers), or its mode has no RGB.
        Exception: of the many kinds that PIL's readers have, where a file is broken.
    """
    raw = image.tile[0].args if getattr(image, "tile", None) and image.format == "PNG" else None
    image.load()
    key = image.info.get("transparency")
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        upright, largest = ImageOps.exif_transpose(image), _largest(image)
        grey = np.asarray(upright).astype(np.int32)
        shown = (grey * 255 + largest // 2) // largest
        if _inverted(image):
            shown = 255 - shown
        shown[grey == (-1 if key is None else key)] = 255
        return Image.fromarray(shown.clip(0, 255).astype(np.uint8)).convert("RGB")
    upright = ImageOps.exif_transpose(image)
    if raw in KEYS and key is not None:
        upright.info["transparency"] = key * KEYS[raw]
    elif raw == "RGB;16B" and key is not None:
        upright.info["transparency"] = tuple(part >> 8 for part in key)
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    rgba = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _largest(image: Image.Image) -> int:
    """What white is in a grey picture of more than 8 bits."""
    if (image.mode, image.format) not in FULL_16_BITS:
        numbers = {"F": "floats", "I": "32-bit integers"}.get(image.mode, image.mode)
        of = f" in a {image.format} file" if image.format else ""
        raise ValueError(f"its pixels are {numbers}{of}, whose range is not known: save it with 8 or 16 bits, as PNG")
    if image.format != "TIFF":
        return 2**16 - 1
    return 2 ** image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0] - 1


def _inverted(image: Image.Image) -> bool:
    """Whether zero is white, which Pillow undoes for 8 bits only."""
    return image.format == "TIFF" and image.tag_v2.get(WHITE_OR_BLACK_IS_ZERO) == 0
