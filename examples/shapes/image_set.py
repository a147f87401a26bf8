# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Write a set of pictures with captions, for the adversarial stage.

    python examples/shapes/image_set.py shapes-images                    # as the teacher has learned to draw
    python examples/shapes/image_set.py shapes-posters --style poster    # the same scenes, drawn in another way

An `imagefolder` of the datasets library: PNG files, and metadata.csv with the columns file_name and text.
"""

import argparse
import csv
import random
from pathlib import Path

import torch
from PIL import Image

from hf_flowdistill.errors import UserError, exit_on_user_error
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new one")
    parser.add_argument("--style", choices=STYLES, default="own", help="default: own")
    parser.add_argument("--images", type=int, default=6000, help="how many (default: 6000)")
    parser.add_argument("--seed", type=int, default=1, help="of the scenes (default: 1)")
    args = parser.parse_args()
    if args.images < 1:
        raise UserError(f"--images is {args.images}: it must be at least 1.")
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise UserError(f"{args.folder} is there already: name a new folder.")
    write_image_set(args.folder, args.style, args.images, args.seed)


if __name__ == "__main__":
    exit_on_user_error(main)()
