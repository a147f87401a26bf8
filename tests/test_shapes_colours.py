# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What tells whether colours have drifted: it finds what was changed in real renders, and nothing else."""

import random

import pytest
import torch
from training_helpers import ROOT, run_command

from colour_statistics import balance, measure
from colours import tabulate
from detector import MIN_CHROMA
from scenes import Scene, random_scene, render


@pytest.fixture(scope="module")
def renders():
    rng = random.Random(4)
    return render([random_scene(rng) for _ in range(300)], rng)


def change(images, objects=lambda pixels: pixels, background=lambda pixels: pixels):
    coloured = images.amax(1, keepdim=True) - images.amin(1, keepdim=True) > MIN_CHROMA
    return torch.where(coloured, objects(images), background(images))


def test_of_renders_it_finds_what_they_were_drawn_with(renders):
    found = measure(renders)
    assert found["background, mean"] == pytest.approx(0.525, abs=0.02)  # grey from .3 to .75
    assert found["background, spread between pictures"] == pytest.approx(0.45 / 12**0.5, abs=0.02)
    assert found["red objects, red"] == pytest.approx(0.86, abs=0.01)
    assert found["blue objects, green"] == pytest.approx(0.36, abs=0.01)
    assert found["yellow objects, spread"] == pytest.approx(0.08 / 12**0.5, abs=0.006)


def test_more_contrast_behind_and_paler_objects_are_seen(renders):
    def contrast(pixels):
        mean = pixels.mean((1, 2, 3), keepdim=True)
        return mean + 1.2 * (pixels - mean)

    before, after = measure(renders), measure(change(renders, lambda pixels: 0.95 * pixels, contrast))
    ratio = {name: after[name] / before[name] for name in before}
    assert ratio.pop("background, spread in a picture") == pytest.approx(1.2, abs=0.03)
    assert ratio.pop("background, mean") == pytest.approx(1.0, abs=0.02)
    assert ratio.pop("background, spread between pictures") == pytest.approx(1.0, abs=0.05)
    assert all(value == pytest.approx(0.95, abs=0.01) for value in ratio.values())
    assert " 1.2" in tabulate(before, before, [after]) and " 0.95 |" in tabulate(before, before, [after])


def test_of_shapes_that_may_have_two_colours_it_finds_how_many_have_which():
    rng, any_square = random.Random(5), Scene("a square", "single_object", (("square", None),))
    green, blue = (Scene(f"a {colour} square", "colors", (("square", colour),)) for colour in ("green", "blue"))
    images = render([green] * 30 + [blue] * 10 + [green] * 5, rng)
    shares = balance([any_square] * 40 + [green] * 5, images)  # the last five were told their colour
    assert shares["green or blue squares, green"] == 0.75


def test_a_folder_without_a_student_is_refused(tmp_path):
    refused = run_command(ROOT / "examples/shapes/colours.py", "--students", tmp_path, check=False)
    assert refused.returncode == 2 and "is no student" in refused.stderr and "Traceback" not in refused.stderr
