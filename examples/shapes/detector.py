# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Does a picture show what its prompt says? GenEval in miniature: segment by colour, name each blob, compare.

Strict: every object asked for, and no other. A blob that is no clear shape counts as an object of unknown shape, so
that smears and ghosts fail.
"""

from collections import Counter
from itertools import permutations

import numpy as np
import torch
from scipy import ndimage

from scenes import CATEGORIES, COLOURS, HALF_SIDE, Placed, Scene, coverage, related


MIN_CHROMA = 0.27  # max - min over RGB; backgrounds stay below 0.1, objects above 0.5
MIN_AREA = 14  # pixels; the smallest object covers 50
MIN_OVERLAP = 0.72  # intersection over union with the best-fitting ideal shape
IDEALS = {  # area / radius^2, and how far the centre of mass lies below the centre, / radius
    "circle": (np.pi, 0.0),
    "square": ((2 * HALF_SIDE) ** 2, 0.0),
    "triangle": (2.0, 1 / 3),
}


def _hue(rgb):
    """Hue angle in radians of RGB values [..., 3]."""
    r, g, b = np.moveaxis(np.asarray(rgb, dtype=np.float32), -1, 0)
    return np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)


_HUES = _hue(np.array(list(COLOURS.values())))


def nearest_colour(rgb: np.ndarray) -> np.ndarray:
    """Number in `COLOURS` of the colour whose hue is nearest to that of RGB values [..., 3], [...]."""
    return np.abs(np.angle(np.exp(1j * (_hue(rgb)[..., None] - _HUES)))).argmin(-1)


def _name(blob: np.ndarray, x: float, y: float) -> tuple[str, float]:
    """The ideal shape of the blob's area and centre that covers it best, and its overlap (intersection over union)."""
    best = ("unknown", 0.0)
    for shape, (area, drop) in IDEALS.items():
        radius = float(np.sqrt(blob.sum() / area))
        ideal = coverage(shape, x, y - drop * radius, radius, blob.shape[0]).numpy() > 0.5
        overlap = float((blob & ideal).sum() / (blob | ideal).sum())
        best = max(best, (shape, overlap), key=lambda candidate: candidate[1])
    return best


def detect(image: torch.Tensor) -> list[Placed]:
    """Objects of a picture [3, H, W] in [0, 1]; a blob that fits no shape has shape "unknown"."""
    rgb = image.float().permute(1, 2, 0).numpy()
    coloured = rgb.max(-1) - rgb.min(-1) > MIN_CHROMA
    nearest = nearest_colour(rgb)
    found = []
    for index, colour in enumerate(COLOURS):
        blobs, count = ndimage.label(coloured & (nearest == index))
        for label in range(1, count + 1):
            blob = blobs == label
            area = int(blob.sum())
            if area < MIN_AREA:
                continue
            y, x = (c + 0.5 for c in ndimage.center_of_mass(blob))
            shape, overlap = _name(blob, x, y)
            found.append(Placed(shape if overlap >= MIN_OVERLAP else "unknown", colour, x, y, (area / np.pi) ** 0.5))
    return found


def correct(scene: Scene, found: list[Placed]) -> bool:
    """Whether the objects found are exactly those the prompt asks for, in the relation it asks for."""
    if len(found) != len(scene.objects):
        return False
    for order in permutations(found):
        named = all(
            f.shape == shape and colour in (None, f.colour) for f, (shape, colour) in zip(order, scene.objects)
        )
        if named and (scene.relation is None or related(order[0], order[1], scene.relation)):
            return True
    return False


def accuracy(scenes: list[Scene], images: torch.Tensor) -> tuple[float, dict[str, float]]:
    """Share of right pictures, over all and by category. images: [N, 3, H, W] in [0, 1]."""
    right, total = Counter(), Counter()
    for scene, image in zip(scenes, images):
        total[scene.category] += 1
        right[scene.category] += correct(scene, detect(image))
    by_category = {name: right[name] / total[name] for name in CATEGORIES if total[name]}
    return sum(right.values()) / sum(total.values()), by_category
