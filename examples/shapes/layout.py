# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Which of a student's calls goes wrong: the guided teacher goes on from what the student has after each of them.

    python examples/shapes/layout.py   # after `make demo`

What the student has after a call is noised to the sigma of this call, and to that of the next, and the teacher makes a
picture of either with what is left from there of its 28 even steps. What it cannot mend was decided wrongly before;
what is right from the first sigma and wrong from the second, this call has added. Renders of the prompts, noised
alike, show what the teacher makes of pictures that are right.
"""

import argparse
import functools
import json
import random
from pathlib import Path

import torch
from PIL import Image

from demo import CALL, HERE
from detector import accuracy
from drift import make_latents
from hf_flowdistill import flow
from hf_flowdistill.cli import silence_libraries
from hf_flowdistill.errors import UserError, exit_on_user_error
from hf_flowdistill.evaluation.report import format_cells
from hf_flowdistill.flow.timesteps import few_step_sigmas
from hf_flowdistill.hub.settings import read_settings
from hf_flowdistill.methods.sid import generate_x0
from hf_flowdistill.networks.loading import load_pipeline
from hf_flowdistill.teachers import decode, encode_prompts, learn_contract, learn_image_encoder
from scenes import SIZE, random_scene, render


BATCH = 100


def encode(encoder, images):
    """Latents of pictures [N, 3, H, W] in [0, 1]."""
    pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    return encoder([Image.fromarray(picture) for picture in pixels])


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


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="demo/run/student", help="a student's folder (default: %(default)s)")
    parser.add_argument("--teacher", default=str(HERE / "teacher"), help="a shapes pipeline")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="of the teacher, as in the recipe")
    parser.add_argument("--num_prompts", type=int, default=1000, help="freshly drawn prompts")
    parser.add_argument("--seed", type=int, default=2026, help="of these prompts and of all noise")
    parser.add_argument("--output_file", help="the figures as JSON")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.num_prompts < 1:
        raise UserError("--num_prompts must be at least 1.")
    if not Path(args.student, "model_index.json").is_file():
        raise UserError(f"{args.student} holds no student: `make demo` makes one, or give --student.")
    silence_libraries()
    levels, noise_type = sampler_of(args.student)
    pipeline, generator = load_pipeline(args.teacher), load_pipeline(args.student).transformer
    contract = learn_contract(pipeline, height=SIZE, width=SIZE, pipeline_kwargs=CALL)
    encoder = learn_image_encoder(pipeline, contract)
    rng, noise_generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    all_scenes = [random_scene(rng) for _ in range(args.num_prompts)]
    conditional, unconditional = encode_prompts(pipeline, contract, [scene.prompt for scene in all_scenes])
    sigmas = [*levels, 0.0]
    of_renders = [(0, sigma) for sigma in sigmas[1:-1]]
    of_student = [(k, sigma) for k in range(1, len(levels) + 1) for sigma in sigmas[k - 1 : k + 1]]
    finished = {case: [] for case in [*of_renders, *of_student]}

    for first in range(0, args.num_prompts, BATCH):
        scenes = all_scenes[first : first + BATCH]
        places = list(range(first, first + len(scenes)))
        draw = functools.partial(torch.randn, len(scenes), *contract.latent_shape, generator=noise_generator)
        with torch.no_grad():
            own = after_calls(contract, generator, conditional[places], levels, noise_type, draw)
            x0 = [encode(encoder, render(scenes, rng)), *own]
            for (k, sigma), latents in finished.items():
                x_t = flow.add_noise(x0[k], draw(), torch.full((len(scenes),), sigma))
                words = conditional[places], unconditional, args.guidance_scale
                latents.append(make_latents(contract, pipeline.transformer, *words, x_t, start=sigma))
        print(f"{places[-1] + 1}/{args.num_prompts} prompts", flush=True)

    rows = []
    for (k, sigma), latents in finished.items():
        images = decode(pipeline, contract, torch.cat(latents), "pt")
        right, by_category = accuracy(all_scenes, images)
        rows.append({"calls": k, "sigma": sigma, "accuracy": right, "accuracy_by_category": by_category})
    if args.output_file:
        Path(args.output_file).write_text(json.dumps(rows, indent=2) + "\n")
    print(f"\n{format_rows(rows)}")


def format_rows(rows: list[dict]) -> str:
    """A line per place in the student's sampler, a column per sigma that the teacher goes on from."""
    sigmas = sorted({row["sigma"] for row in rows}, reverse=True)
    lines = [["what is noised", *(f"{sigma:g}" for sigma in sigmas)]]
    for k in sorted({row["calls"] for row in rows}):
        found = {row["sigma"]: f"{row['accuracy']:.3f}" for row in rows if row["calls"] == k}
        name = f"the student's, after {k} call{'s' * (k > 1)}" if k else "renders"
        lines.append([name, *(found.get(sigma, "") for sigma in sigmas)])
    return format_cells(lines)


if __name__ == "__main__":
    exit_on_user_error(main)()
