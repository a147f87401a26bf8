# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""At which noise teacher and fake score tell a student's wrong pictures from its right ones, when it is trained.

    python examples/shapes/studies/gaps.py   # after `make demo`

The student's pictures are sorted by the detector and noised to several levels, and the two predictions of x0 that its
loss compares are taken on them: where these are no further apart for a wrong picture than for a right one, the loss
tells neither from the other. A gap is the norm of x0_teacher - x0_fake, the mean of four noises and of all pictures.
"""

import copy
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_model
from study import after_calls, build_parser, load_setting, predict_x0, report, sampler_of

from detector import correct, detect
from hf_flowdistill import flow
from hf_flowdistill.cli import silence_libraries
from hf_flowdistill.errors import UserError, exit_on_user_error
from hf_flowdistill.evaluation.report import format_cells
from hf_flowdistill.methods.sid import choose_guidance
from hf_flowdistill.networks.loading import load_pipeline
from hf_flowdistill.teachers import decode
from hf_flowdistill.training.folders import latest_checkpoint


SIGMAS = (0.3, 0.5, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98)
NOISES = 4
BATCH = 100


def measure(predict_gap, latents, right, draw) -> list[dict]:
    """One row per noise level.

    Args:
        predict_gap: (x_t, sigma, which pictures) -> x0_teacher - x0_fake, as x_t.
        latents: [N, ...], of pictures; right: [N] bools; draw: () -> noise [N, ...].
    """
    rows = []
    for level in SIGMAS:
        norms = torch.zeros(len(latents))
        for _ in range(NOISES):
            noise = draw()
            for places in torch.arange(len(latents)).split(BATCH):
                sigma = torch.full((len(places),), level)
                x_t = flow.add_noise(latents[places], noise[places], sigma)
                norms[places] += predict_gap(x_t, sigma, places.tolist()).flatten(1).norm(dim=1) / NOISES
        wrong_gap, right_gap = norms[~right].mean().item(), norms[right].mean().item()
        rows.append({"sigma": level, "gap_wrong": wrong_gap, "gap_right": right_gap})
        print(f"sigma {level:g}", flush=True)
    return rows


def format_rows(rows: list[dict]) -> str:
    """One line per noise level."""
    lines = [["sigma", "gap, wrong pictures", "gap, right pictures", "ratio"]]
    for row in rows:
        wrong, right = row["gap_wrong"], row["gap_right"]
        lines.append([f"{row['sigma']:g}", f"{wrong:.2f}", f"{right:.2f}", f"{wrong / right:.2f}"])
    return format_cells(lines)


def parse_args():
    parser = build_parser(__doc__)
    parser.add_argument("--run", default="demo/run", help="--output_dir of a finished training (default: %(default)s)")
    parser.add_argument("--num_prompts", type=int, default=1000, help="freshly drawn prompts")
    return parser.parse_args()


def main():
    args = parse_args()
    run, checkpoint = Path(args.run), latest_checkpoint(args.run)
    if checkpoint is None or not (run / "student" / "model_index.json").is_file():
        raise UserError(f"{run} holds no finished training with checkpoints: `make demo` makes one, or give --run.")
    silence_libraries()
    trained = SimpleNamespace(**json.loads((run / "student" / "training_args.json").read_text())["training_args"])
    pipeline, contract, scenes, conditional, unconditional, _, noise_generator = load_setting(
        args.teacher, args.num_prompts, args.seed
    )
    generator, fake_score = load_pipeline(run / "student").transformer, copy.deepcopy(pipeline.transformer)
    load_model(fake_score, checkpoint / "fake_score.safetensors")
    draw = functools.partial(torch.randn, len(scenes), *contract.latent_shape, generator=noise_generator)
    mode, fake_mode = choose_guidance(contract, trained.guidance_mode, trained.fake_guidance_mode)
    of_teacher = trained.teacher_guidance_scale, mode, trained.guidance_rescale
    of_fake = trained.fake_guidance_scale, fake_mode

    def predict_gap(x_t, sigma, places):
        words = conditional[places], unconditional
        x0_teacher = predict_x0(contract, pipeline.transformer, x_t, sigma, *words, *of_teacher)
        return x0_teacher - predict_x0(contract, fake_score, x_t, sigma, *words, *of_fake)

    with torch.no_grad():
        latents = after_calls(contract, generator, conditional[:], *sampler_of(run / "student"), draw)[-1]
        found = [detect(picture) for picture in decode(pipeline, contract, latents, "pt")]
        right = torch.tensor([correct(*pair) for pair in zip(scenes, found)])
        print(f"{right.sum()} of {len(scenes)} pictures are right", flush=True)
        if right.all() or not right.any():
            raise UserError("all pictures are right, or none: there is nothing to compare; raise --num_prompts.")
        rows = measure(predict_gap, latents, right, draw)
    report(rows, format_rows(rows), args.output_file)


if __name__ == "__main__":
    exit_on_user_error(main)()
