# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Sets of pictures with captions, in two styles."""

import csv
import random
from pathlib import Path

import torch
from PIL import Image

from scenes import COLOURS, SIZE, Placed, coverage, draw, place, random_scene


PAPER = (0.93, 0.89, 0.78)  # cream
INK = 0.12  # grey of the outlines
OUTLINE = 1.2  # pixels
DARKER = 0.8


def draw_poster(placed: list[Placed], rng: random.Random) -> torch.Tensor:
    """The same objects as flat, darker colours with an outline, on paper; [3, SIZE, SIZE] in [0, 1].

    Hues, positions and sizes are those of `scenes.draw`, so captions still hold; backgrounds and edges are not.
    """
    image = torch.tensor(PAPER)[:, None, None].expand(3, SIZE, SIZE).clone()
    for p in placed:
        for radius, colour in (
            (p.radius, (INK,) * 3),
            (p.radius - OUTLINE, [DARKER * part for part in COLOURS[p.colour]]),
        ):
            mask = coverage(p.shape, p.x, p.y, radius)
            image = image * (1 - mask) + torch.tensor(colour)[:, None, None] * mask
    return image


STYLES = {"own": draw, "poster": draw_poster}


def write_image_set(folder: Path, style: str, images: int, seed: int) -> None:
    """Draw `images` fresh scenes in one of `STYLES`; the same seed gives the same scenes in every style."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text"])
        for number in range(images):
            rng = random.Random(f"{seed} {number}")
            scene = random_scene(rng)
            picture = STYLES[style](place(scene, rng), rng)
            pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / f"{number:06}.png")
            rows.writerow([f"{number:06}.png", scene.prompt])
