# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Which of a student's calls goes wrong: the guided teacher goes on from what the student has after each of them.

    python examples/shapes/studies/layout.py   # after `make demo`

What the student has after a call is noised to the sigma of this call, and to that of the next, and the teacher makes a
picture of either with what is left from there of its 28 even steps. What it cannot mend was decided wrongly before;
what is right from the first sigma and wrong from the second, this call has added. Renders of the prompts, noised
alike, show what the teacher makes of pictures that are right.
"""

import functools
from pathlib import Path

import torch
from PIL import Image
from study import after_calls, build_parser, load_setting, make_latents, report, sampler_of

from detector import accuracy
from hf_flowdistill import flow
from hf_flowdistill.cli import silence_libraries
from hf_flowdistill.errors import UserError, exit_on_user_error
from hf_flowdistill.evaluation.report import format_cells
from hf_flowdistill.networks.loading import load_pipeline
from hf_flowdistill.teachers import decode, learn_image_encoder
from scenes import render


BATCH = 100


def encode(encoder, images):
    """Latents of pictures [N, 3, H, W] in [0, 1]."""
    pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    return encoder([Image.fromarray(picture) for picture in pixels])


def parse_args():
    parser = build_parser(__doc__)
    parser.add_argument("--student", default="demo/run/student", help="a student's folder (default: %(default)s)")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="of the teacher, as in the recipe")
    parser.add_argument("--num_prompts", type=int, default=1000, help="freshly drawn prompts")
    return parser.parse_args()


def main():
    args = parse_args()
    if not Path(args.student, "model_index.json").is_file():
        raise UserError(f"{args.student} holds no student: `make demo` makes one, or give --student.")
    silence_libraries()
    levels, noise_type = sampler_of(args.student)
    pipeline, contract, all_scenes, conditional, unconditional, rng, noise_generator = load_setting(
        args.teacher, args.num_prompts, args.seed
    )
    generator, encoder = load_pipeline(args.student).transformer, learn_image_encoder(pipeline, contract)
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
    report(rows, format_rows(rows), args.output_file)


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
