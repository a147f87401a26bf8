# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the studies share: arguments, the teacher with freshly drawn prompts, its latents and a student's, the rows.

It puts examples/shapes on the path, so a study imports it before the modules there.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

import torch


sys.path.append(str(Path(__file__).parents[1]))
from arguments import CALL, HERE  # noqa: E402  (from the folder above, not installed)
from hf_flowdistill import flow  # noqa: E402
from hf_flowdistill.errors import UserError  # noqa: E402
from hf_flowdistill.flow.timesteps import few_step_sigmas  # noqa: E402
from hf_flowdistill.hub.settings import read_settings  # noqa: E402
from hf_flowdistill.methods.sid import generate_x0  # noqa: E402
from hf_flowdistill.networks.loading import load_pipeline  # noqa: E402
from hf_flowdistill.teachers import encode_prompts, learn_contract  # noqa: E402
from scenes import SIZE, random_scene  # noqa: E402


class Setting(NamedTuple):
    """A teacher with prompts: `conditional` has one sample for each of the `scenes`, `unconditional` one in all.

    `rng` has drawn the scenes and goes on with pictures of them; all noise comes from `generator`.
    """

    pipeline: object
    contract: object
    scenes: list
    conditional: object
    unconditional: object
    rng: random.Random
    generator: torch.Generator


def build_parser(description: str, seed: int = 2026) -> argparse.ArgumentParser:
    """The arguments of every study; `seed` is the default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(HERE / "teacher"), help="a shapes pipeline")
    parser.add_argument("--seed", type=int, default=seed, help="of the prompts and of all noise")
    parser.add_argument("--output_file", help="the figures as JSON")
    return parser


def load_setting(teacher, num_prompts: int, seed: int) -> Setting:
    """A teacher from its folder, frozen, and so many freshly drawn prompts.

    Raises:
        UserError: for less than one prompt.
    """
    if num_prompts < 1:
        raise UserError("--num_prompts must be at least 1.")
    pipeline = load_pipeline(teacher)
    contract = learn_contract(pipeline, height=SIZE, width=SIZE, pipeline_kwargs=CALL)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    scenes = [random_scene(rng) for _ in range(num_prompts)]
    words = encode_prompts(pipeline, contract, [scene.prompt for scene in scenes])
    pipeline.transformer.requires_grad_(False)
    return Setting(pipeline, contract, scenes, *words, rng, generator)


def predict_x0(contract, network, x_t, sigma, *guided) -> torch.Tensor:
    """Of x_t [B, ...] at sigma [B]; `guided` is what `Contract.guided_velocity` takes behind them."""
    return flow.x0_from_velocity(x_t, contract.guided_velocity(network, x_t, sigma, *guided), sigma)


def make_latents(contract, teacher, conditional, unconditional, scale, x_t, num_steps=28, start=1.0):
    """The teacher's latents, by Euler's method from `x_t` at sigma `start`, in `start` times `num_steps` even ones."""
    sigmas = torch.linspace(start, 0, round(num_steps * start) + 1)
    for sigma, following in zip(sigmas, sigmas[1:]):
        level = sigma.expand(len(x_t))
        velocity = contract.guided_velocity(teacher, x_t, level, conditional, unconditional, scale)
        x_t = x_t + (following - sigma) * velocity
    return x_t


def after_calls(contract, generator, conditional, sigmas, noise_type, draw):
    """The student's x0 after 1 to all calls, at `sigmas`, of the same noises; `draw()` gives some."""
    noises = [draw() for _ in sigmas]
    return [
        generate_x0(generator, contract, conditional, noises.__getitem__, k=k, sigmas=sigmas, noise_type=noise_type)
        for k in range(1, len(sigmas) + 1)
    ]


def sampler_of(student) -> tuple[list[float], str]:
    """The noise levels and the noise type of a student's own sampler."""
    settings = read_settings(student)["student"]
    levels = settings["call_defaults"].get("sigmas") or few_step_sigmas(settings["num_steps"]).tolist()
    return levels, settings["noise_type"]


def report(rows: list[dict], table: str, output_file) -> None:
    """Print the table, and write the rows where they are asked for."""
    if output_file:
        Path(output_file).write_text(json.dumps(rows, indent=2) + "\n")
    print(f"\n{table}")
