# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""One picture of many: rows of samples under their prompts, with captions and gutters."""

import textwrap
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont


SMALLEST = 128  # pixels of the shorter side of a sample: smaller ones are enlarged, every pixel to a square
PAPER, INK, FAINT = "white", (32, 32, 32), (112, 112, 112)
CAPTION_LINES = 2


@dataclass(frozen=True)
class Block:
    """The samples of one prompt: (what made them, images of one size) for each row, all equally many."""

    caption: str
    rows: list[tuple[str, list[Image.Image]]]


def contact_sheet(blocks: list[Block], *, title: str, note: str = "") -> Image.Image:
    """The sheet of `blocks`, from top to bottom, in RGB; `note` stands under the title."""
    cell = _enlarged(blocks[0].rows[0][1][0]).size
    unit = max(12, min(cell) // 18)  # of all that is not a sample
    large, small = ImageFont.load_default(unit * 5 // 4), ImageFont.load_default(unit)
    gutter, line = unit // 2, unit * 3 // 2
    labels = [label for block in blocks for label, _ in block.rows]
    left = 2 * gutter + round(max(small.getlength(label) for label in labels)) + gutter
    columns = max(len(images) for block in blocks for _, images in block.rows)
    right = left + columns * (cell[0] + gutter) - gutter
    width = right + 2 * gutter

    drawn = []  # (x, y, text, font, ink) and (x, y, image)
    y = 2 * gutter
    for text, font, ink in ((title, large, INK), (note, small, FAINT)):
        for words in wrapped(text, font, width - 4 * gutter, lines=3):
            drawn.append((2 * gutter, y, words, font, ink))
            y += line * 5 // 4 if font is large else line
    for block in blocks:
        y += gutter
        for words in wrapped(block.caption, small, right - left, lines=CAPTION_LINES):
            drawn.append((left, y, words, small, INK))
            y += line
        for label, images in block.rows:
            drawn.append((2 * gutter, y + (cell[1] - line) // 2, label, small, FAINT))
            drawn += [(left + i * (cell[0] + gutter), y, image) for i, image in enumerate(images)]
            y += cell[1] + gutter
    sheet = Image.new("RGB", (width, y + gutter), PAPER)
    draw = ImageDraw.Draw(sheet)
    for x, top, what, *style in drawn:
        if style:
            draw.text((x, top), what, font=style[0], fill=style[1])
        else:
            sheet.paste(_enlarged(what), (x, top))
    return sheet


def wrapped(text: str, font, width: float, *, lines: int) -> list[str]:
    """`text` in lines that are at most `width` pixels wide in `font`, shortened to so many; [] of no text."""
    text = " ".join(text.split())
    for letters in range(min(len(text), round(width / font.getlength("i"))), 0, -1):
        parts = textwrap.wrap(text, max(letters, 4), max_lines=lines, placeholder="...")
        if letters <= 4 or all(font.getlength(part) <= width for part in parts):
            return parts
    return []


def _enlarged(image: Image.Image) -> Image.Image:
    times = -(-SMALLEST // min(image.size))
    image = image.convert("RGB")
    return image if times == 1 else image.resize([times * side for side in image.size], Image.Resampling.NEAREST)
