# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a shapes prompt means, and how it is drawn: the grammar and the renderer.

Six categories, named after those of GenEval (arXiv 2310.11513). A prompt fixes what it says and little else: every
position, every size and the background are free, so that a prompt has many right pictures. Where it names no colour, a
shape has one that such shapes usually have; the objects of a counted group are alike.
"""

import random
from dataclasses import dataclass, replace

import torch

from arguments import CATEGORIES


SIZE = 40  # pixels, square
SHAPES = ("circle", "square", "triangle")
COLOURS = {  # RGB in [0, 1]; hues 60 degrees apart or more
    "red": (0.86, 0.16, 0.16),
    "green": (0.14, 0.68, 0.28),
    "blue": (0.18, 0.36, 0.90),
    "yellow": (0.93, 0.83, 0.14),
    "purple": (0.76, 0.20, 0.80),
}
USUAL_COLOURS = {"circle": ("red", "yellow"), "square": ("green", "blue"), "triangle": ("purple",)}
COUNTS = {"two": 2, "three": 3}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

MIN_RADIUS, MAX_RADIUS = 5.0, 6.2  # pixels
HALF_SIDE = 0.92  # of a square, in radii
GAP = 4.0  # pixels of background between the bounding boxes of two objects


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for. `objects` holds (shape, colour or None); `relation` is the direction of the first object
    seen from the second, in image coordinates (y grows downwards), or None."""

    prompt: str
    category: str
    objects: tuple
    relation: tuple | None = None


@dataclass(frozen=True)
class Placed:
    """One object of a picture: centre and radius in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


def random_scene(rng: random.Random, category: str | None = None) -> Scene:
    """Draw a prompt: the category uniformly (unless given), then its words uniformly."""
    category = category or rng.choice(CATEGORIES)
    shape, other = rng.choice(SHAPES), rng.choice(SHAPES)
    colour, other_colour = rng.sample(list(COLOURS), 2)
    if category == "single_object":
        return Scene(f"a {shape}", category, ((shape, None),))
    if category == "colors":
        return Scene(f"a {colour} {shape}", category, ((shape, colour),))
    if category == "two_object":
        shape, other = rng.sample(SHAPES, 2)
        return Scene(f"a {shape} and a {other}", category, ((shape, None), (other, None)))
    if category == "counting":
        word = rng.choice(list(COUNTS))
        named = rng.choice((colour, None))
        prompt = f"{word} {named} {shape}s" if named else f"{word} {shape}s"
        return Scene(prompt, category, ((shape, named),) * COUNTS[word])
    objects = ((shape, colour), (other, other_colour))
    if category == "color_attribution":
        return Scene(f"a {colour} {shape} and a {other_colour} {other}", category, objects)
    word = rng.choice(list(RELATIONS))
    return Scene(f"a {colour} {shape} {word} a {other_colour} {other}", category, objects, RELATIONS[word])


def related(first, second, relation, slack: float = 1.0) -> bool:
    """Whether `first` lies in direction `relation` of `second`: along the axis further apart than across it (times
    `slack`)."""
    dx, dy = first.x - second.x, first.y - second.y
    along, across = (dx * relation[0], abs(dy)) if relation[0] else (dy * relation[1], abs(dx))
    return along > 0 and across <= slack * along


def place(scene: Scene, rng: random.Random) -> list[Placed]:
    """Put the objects of a scene anywhere they fit: uniform positions, rejected where boxes come closer than `GAP`."""
    while True:
        placed = []
        usual = {shape: rng.choice(colours) for shape, colours in USUAL_COLOURS.items()}
        for shape, colour in scene.objects:
            if not placed or scene.category != "counting":
                radius = rng.uniform(MIN_RADIUS, MAX_RADIUS)
            low, high = radius + 0.5, SIZE - radius - 0.5
            placed.append(
                Placed(shape, colour or usual[shape], rng.uniform(low, high), rng.uniform(low, high), radius)
            )
        apart = all(
            max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + GAP
            for i, a in enumerate(placed)
            for b in placed[:i]
        )
        # a clear relation only: nobody should have to decide whether 44 degrees is "left of"
        if apart and (scene.relation is None or related(placed[0], placed[1], scene.relation, slack=0.7)):
            return placed


def corrupt(scene: Scene, placed: list[Placed], rng: random.Random) -> list[Placed]:
    """Break what the prompt says about a picture in one place: an object lost, added, or of another shape or colour,
    or the relation turned round. What the prompt leaves free is not touched."""
    kinds = (
        ["lost", "added", "shape"]
        + ["colour"] * (scene.objects[0][1] is not None)
        + ["relation"] * (scene.relation is not None)
    )
    kind = rng.choice(kinds)
    if kind == "relation":
        a, b = placed
        return [replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)]
    if kind == "added":
        extra = Scene("", "", tuple((p.shape, p.colour) for p in placed) + ((rng.choice(SHAPES), None),))
        return place(extra, rng)
    i = rng.randrange(len(placed))
    if kind == "lost":
        return placed[:i] + placed[i + 1 :]
    if kind == "shape":
        changed = replace(placed[i], shape=rng.choice([s for s in SHAPES if s != placed[i].shape]))
    else:
        changed = replace(placed[i], colour=rng.choice([c for c in COLOURS if c != placed[i].colour]))
    return placed[:i] + [changed] + placed[i + 1 :]


def coverage(shape: str, x, y, radius, size: int = SIZE) -> torch.Tensor:
    """Anti-aliased mask of a shape, [size, size] in [0, 1]: 1 inside, a ramp of one pixel at the edge."""
    grid = torch.arange(size) + 0.5
    dx, dy = grid[None, :] - x, grid[:, None] - y
    if shape == "circle":
        distance = (dx**2 + dy**2).sqrt() - radius
    elif shape == "square":
        distance = torch.maximum(dx.abs(), dy.abs()) - HALF_SIDE * radius
    else:  # an upright triangle that fills its box
        slope = (1 + 0.25) ** 0.5
        distance = torch.maximum(dy - radius, (dx.abs() - (dy + radius) / 2) / slope)
    return (0.5 - distance).clamp(0, 1)


def background(rng: random.Random) -> torch.Tensor:
    """A grey gradient under two long waves with a faint tint, [3, SIZE, SIZE] in [0, 1]."""
    grid = (torch.arange(SIZE) + 0.5) / SIZE - 0.5
    gx, gy = grid[None, :], grid[:, None]
    grey = rng.uniform(0.3, 0.75) + rng.uniform(-0.25, 0.25) * gx + rng.uniform(-0.25, 0.25) * gy
    for _ in range(2):
        angle, frequency, phase = rng.uniform(0, 3.1416), rng.uniform(1.0, 3.0), rng.uniform(0, 6.2832)
        direction = torch.cos(torch.tensor(angle)) * gx + torch.sin(torch.tensor(angle)) * gy
        grey = grey + rng.uniform(0, 0.06) * torch.sin(6.2832 * frequency * direction + phase)
    tint = torch.tensor([rng.uniform(-0.04, 0.04) for _ in range(3)])
    return (grey[None] + tint[:, None, None]).clamp(0, 1)


def draw(placed: list[Placed], rng: random.Random) -> torch.Tensor:
    """Render a picture, [3, SIZE, SIZE] in [0, 1]."""
    image = background(rng)
    for p in placed:
        mask = coverage(p.shape, p.x, p.y, p.radius)
        colour = torch.tensor([min(max(c + rng.uniform(-0.04, 0.04), 0), 1) for c in COLOURS[p.colour]])
        image = image * (1 - mask) + colour[:, None, None] * mask
    return image


def render(scenes: list[Scene], rng: random.Random) -> torch.Tensor:
    """One fresh picture per scene, [N, 3, SIZE, SIZE] in [0, 1]."""
    return torch.stack([draw(place(scene, rng), rng) for scene in scenes])


if __name__ == "__main__":  # python examples/shapes/scenes.py > examples/shapes/prompts.txt
    stream = random.Random(1)
    print(*(random_scene(stream).prompt for _ in range(3000)), sep="\n")
