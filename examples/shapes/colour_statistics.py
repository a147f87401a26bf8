# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What pictures of shapes have for colours, told by the rules of the detector."""

from collections import Counter

import numpy as np
import torch
from scipy import ndimage

from detector import MIN_CHROMA, detect, nearest_colour
from scenes import COLOURS, USUAL_COLOURS


CHANNELS = ("red", "green", "blue")


def measure(images: torch.Tensor) -> dict[str, float]:
    """Means and standard deviations of pictures [N, 3, H, W] in [0, 1]: of the background's brightness, from pixel to
    pixel and from picture to picture; and of each colour's pixels, by channel."""
    grey, within, pixels = [], [], {name: [] for name in COLOURS}
    for image in images.float().permute(0, 2, 3, 1).numpy():
        coloured = image.max(-1) - image.min(-1) > MIN_CHROMA
        behind = ~ndimage.binary_dilation(coloured, iterations=2)
        inside = ndimage.binary_erosion(coloured)
        if behind.any():
            grey.append(image[behind].mean())
            within.append(image[behind].mean(-1).std())
        nearest = nearest_colour(image)
        for index, name in enumerate(COLOURS):
            pixels[name].append(image[inside & (nearest == index)])
    found = {
        "background, mean": np.mean(grey),
        "background, spread in a picture": np.mean(within),
        "background, spread between pictures": np.std(grey),
    }
    for name, parts in pixels.items():
        values = np.concatenate(parts)
        found |= {f"{name} objects, {channel}": values[:, i].mean() for i, channel in enumerate(CHANNELS)}
        found[f"{name} objects, spread"] = values.std(0).mean()
    return {name: float(value) for name, value in found.items()}


def balance(scenes, images: torch.Tensor) -> dict[str, float]:
    """Of the shapes that may have one of two colours where the prompt names none, the share of the first one."""
    free = [image for scene, image in zip(scenes, images) if all(colour is None for _, colour in scene.objects)]
    drawn = Counter((placed.shape, placed.colour) for image in free for placed in detect(image))
    shares = {}
    for shape in ("circle", "square"):
        colours = USUAL_COLOURS[shape]
        counts = [drawn[shape, colour] for colour in colours]
        shares[f"{' or '.join(colours)} {shape}s, {colours[0]}"] = counts[0] / max(1, sum(counts))
    return shares
