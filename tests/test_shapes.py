# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The embedded default: its grammar and renderer, its detector and FID, and the teacher that is shipped."""

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from detector import accuracy, correct, detect
from features import FeatureNetwork
from hf_flowdistill.evaluation.fid import FID
from hf_flowdistill.evaluation.generate import generate
from hf_flowdistill.evaluation.report import format_table, row
from scenes import CATEGORIES, SIZE, Scene, corrupt, draw, place, random_scene, render


SHAPES = Path(__file__).parents[1] / "examples" / "shapes"


@pytest.fixture(scope="module")
def scenes():
    rng = random.Random(31)
    return [random_scene(rng, CATEGORIES[i % len(CATEGORIES)]) for i in range(600)]


def test_the_detector_is_right_on_fresh_renders(scenes):
    overall, by_category = accuracy(scenes, render(scenes, random.Random(32)))
    assert overall >= 0.99
    assert min(by_category.values()) >= 0.98 and set(by_category) == set(CATEGORIES)


def test_the_detector_fails_pictures_that_contradict_the_prompt(scenes):
    rng = random.Random(33)
    broken = torch.stack([draw(corrupt(scene, place(scene, rng), rng), rng) for scene in scenes])
    assert accuracy(scenes, broken)[0] <= 0.01


def test_the_detector_fails_spoiled_pictures(scenes):
    """Blur leaves a lone object recognisable, so it is the one kind of damage that some pictures survive."""
    pictures = render(scenes, random.Random(34))
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    blurred = F.avg_pool2d(F.pad(pictures, (4, 4, 4, 4), mode="replicate"), 9, stride=1)
    averaged = 0.5 * pictures + 0.5 * pictures.roll(1, 0)  # what a generator that averages its modes would draw
    assert accuracy(scenes, (pictures + 0.3 * noise).clamp(0, 1))[0] < 0.05
    assert accuracy(scenes, averaged)[0] < 0.1
    assert accuracy(scenes, pictures.roll(1, 0))[0] < 0.1
    assert accuracy(scenes, blurred)[0] < 0.25


def test_the_detector_finds_what_was_drawn_where_it_was_drawn():
    rng = random.Random(35)
    for _ in range(50):
        scene = random_scene(rng, "position")
        placed = place(scene, rng)
        found = {(p.shape, p.colour): p for p in detect(draw(placed, rng))}
        for p in placed:
            match = found[p.shape, p.colour]
            drop = p.radius / 3 if p.shape == "triangle" else 0  # the centre of mass lies below the centre of the box
            assert abs(match.x - p.x) < 1 and abs(match.y - p.y - drop) < 1


def test_relations_are_the_ones_of_the_prompt():
    left = Scene("a red circle left of a blue square", "position", (("circle", "red"), ("square", "blue")), (-1, 0))
    rng = random.Random(36)
    picture = draw(place(left, rng), rng)
    assert correct(left, detect(picture))
    for relation in ((1, 0), (0, 1), (0, -1)):
        assert not correct(Scene("", "position", left.objects, relation), detect(picture))


def test_shipped_prompts_come_from_the_grammar():
    stream = random.Random(1)
    assert (SHAPES / "prompts.txt").read_text().splitlines() == [random_scene(stream).prompt for _ in range(3000)]


def test_fid_is_zero_for_the_same_pictures_and_grows_with_damage(scenes):
    pictures = render(scenes, random.Random(37))
    fid = FID(FeatureNetwork.load(SHAPES / "features.safetensors"), pictures)
    others = render(scenes, random.Random(38))
    noisy = (others + 0.05 * torch.randn(others.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    empty = render([Scene("", "", ())] * len(scenes), random.Random(39))
    assert fid(pictures) == pytest.approx(0, abs=1e-3)
    assert 0 < fid(others) < fid(noisy) < fid(empty)
    assert fid(others) == fid(others)  # nothing is kept between calls


def test_folder_is_small():
    assert sum(file.stat().st_size for file in SHAPES.rglob("*") if "__pycache__" not in str(file)) <= 12 * 2**20


@pytest.fixture(scope="module")
def teacher():
    pipeline = DiffusionPipeline.from_pretrained(SHAPES / "teacher")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_teacher_is_a_stock_pipeline_whose_words_are_tokens(teacher):
    assert type(teacher) is StableDiffusion3Pipeline and teacher.transformer.dtype == torch.float32
    rng = random.Random(40)
    for category in CATEGORIES:
        for _ in range(50):
            prompt = random_scene(rng, category).prompt
            assert len(teacher.tokenizer(prompt)["input_ids"]) == len(prompt.split()) + 2 <= 10


def test_teacher_draws_what_the_prompt_says(teacher, scenes):
    part = scenes[:60]
    generated = generate(
        teacher,
        [s.prompt for s in part],
        num_steps=14,
        guidance_scale=2.0,
        seed=1,
        batch_size=30,
        max_sequence_length=1,
    )
    assert generated.images.shape == (60, 3, SIZE, SIZE) and generated.forwards_per_image == 28
    assert accuracy(part, generated.images)[0] >= 0.8


def test_pictures_do_not_depend_on_the_batch_size(teacher):
    call = {"num_steps": 3, "guidance_scale": 2.0, "seed": 5, "max_sequence_length": 1}
    prompts = ["a red circle", "two squares", "a circle and a triangle"]
    whole, single = (generate(teacher, prompts, batch_size=n, **call).images for n in (3, 1))
    assert (whole - single).abs().max() < 1e-4
    assert (whole[0] - whole[1]).abs().max() > 0.1


def test_null_tokens_of_the_stock_call_change_little(teacher, scenes):
    """The stock call appends 256 tokens of the silent third encoder; ours one."""
    part = scenes[:12]
    call = {"num_steps": 6, "guidance_scale": 2.0, "seed": 1}
    ours = generate(teacher, [s.prompt for s in part], max_sequence_length=1, **call).images
    stock = generate(teacher, [s.prompt for s in part], max_sequence_length=256, **call).images
    assert (ours - stock).abs().mean() < 0.03


def test_table_has_a_line_for_every_row():
    class Cost:
        forwards_per_image, seconds_per_image = 4.0, 0.01

    rows = [row("student", n, 1.0, Cost, 0.5, {"colors": 0.25}, 12.34) for n in (4, 2)]
    lines = format_table(rows).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert "12.3" in lines[2] and "0.25" in lines[2]
