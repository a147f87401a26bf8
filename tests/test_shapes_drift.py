# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The measurement behind the drift section of docs/shapes_search.md."""

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path

import drift
import pytest
import torch

from arguments import CALL
from hf_flowdistill.networks.loading import load_pipeline
from hf_flowdistill.teachers import encode_prompts, learn_contract


ROOT = Path(__file__).parents[1]
PROMPTS = ["a red circle", "two blue squares", "a green triangle", "a circle and a square"]


@pytest.fixture(scope="module")
def shapes():
    pipeline = load_pipeline(ROOT / "examples/shapes/teacher")
    contract = learn_contract(pipeline, height=40, width=40, pipeline_kwargs=CALL)
    latents = torch.randn(4, *contract.latent_shape, generator=torch.Generator().manual_seed(0))
    return (
        pipeline,
        contract,
        pipeline.transformer.requires_grad_(False),
        *encode_prompts(pipeline, contract, PROMPTS),
        latents,
    )


def test_latents_are_those_of_the_pipeline(shapes):
    """Euler's method on evenly spaced sigmas is the stock scheduler without its shift."""
    pipeline, contract, teacher, conditional, unconditional, noise = shapes
    with torch.no_grad():
        made = drift.make_latents(contract, teacher, conditional, unconditional, 2.0, noise, num_steps=4)
    stock = copy.copy(pipeline)
    stock.register_modules(scheduler=type(pipeline.scheduler).from_config(pipeline.scheduler.config, shift=1.0))
    sigmas = [1.0, 0.75, 0.5, 0.25]
    called = stock(PROMPTS, sigmas=sigmas, guidance_scale=2.0, latents=noise, output_type="latent", **CALL)
    assert (made - called.images).abs().max() < 1e-4


def test_a_fake_score_that_is_the_teacher_leaves_no_gap(shapes):
    _, contract, teacher, conditional, unconditional, latents = shapes
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        rows = drift.measure(contract, teacher, teacher, conditional, unconditional, latents, 2.0, generator)
    guided, unguided = rows[::2], rows[1::2]
    assert [row["sigma"] for row in guided] == list(drift.SIGMAS)
    assert all(row["gap"] == row["push"] == 0 for row in guided)
    assert all(row["gap"] > 0.01 for row in unguided if row["sigma"] >= 0.7)


def test_the_push_is_the_contrast_that_is_missing(shapes):
    """A fake score whose x0 is the teacher's, a tenth fainter, is pushed to 1 / 0.9 of its contrast."""
    _, contract, teacher, conditional, unconditional, latents = shapes

    class Faint:
        def guided_velocity(self, network, x_t, sigma, *conditioning):
            velocity = contract.guided_velocity(teacher, x_t, sigma, *conditioning)
            level = sigma.view(-1, 1, 1, 1)
            return velocity if network == "teacher" else (x_t - 0.9 * (x_t - level * velocity)) / level

    with torch.no_grad():
        rows = drift.measure(
            *(Faint(), "teacher", "faint", conditional, unconditional, latents, 2.0),
            torch.Generator().manual_seed(1),
        )
    assert all(abs(row["push"] - 1 / 9) < 1e-4 for row in rows[::2])


def test_fitting_lowers_the_loss_on_its_latents(shapes):
    _, contract, teacher, conditional, unconditional, latents = shapes
    args = argparse.Namespace(updates=12, learning_rate=5e-4, guidance_scale=2.0)
    fitted = copy.deepcopy(teacher).requires_grad_(True)
    drift.fit_fake_score(fitted, contract, conditional, unconditional, latents, args, torch.Generator().manual_seed(2))
    sigma = torch.full((4,), 0.7)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    x_t = drift.flow.add_noise(latents, noise, sigma)
    with torch.no_grad():
        before, after = (
            drift.fake_score_loss(
                contract.guided_velocity(network, x_t, sigma, conditional, unconditional, 2.0), latents, noise
            )[0]
            for network in (teacher, fitted)
        )
    assert after < 0.95 * before


@pytest.mark.parametrize("words", [["--num_latents", "500"], ["--guidance_scale", "1"]])
def test_a_mistake_is_one_sentence(words):
    script = str(ROOT / "examples/shapes/studies/drift.py")
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_the_document_shows_the_figures():
    rows = json.loads((ROOT / "docs/results/shapes_drift.json").read_text())
    assert drift.format_rows(rows) in (ROOT / "docs/shapes_search.md").read_text(encoding="utf-8")
