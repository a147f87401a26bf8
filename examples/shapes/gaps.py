# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""At which noise teacher and fake score tell a student's wrong pictures from its right ones, when it is trained.

    python examples/shapes/gaps.py   # after `make demo`

The student's pictures are sorted by the detector and noised to several levels, and the two predictions of x0 that its
loss compares are taken on them: where these are no further apart for a wrong picture than for a right one, the loss
tells neither from the other. A gap is the norm of x0_teacher - x0_fake, the mean of four noises and of all pictures.
"""

import argparse
import copy
import functools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_model

from demo import CALL, HERE, train_sid_dit
from detector import correct, detect
from hf_flowdistill import flow
from hf_flowdistill.cli import silence_libraries
from hf_flowdistill.errors import UserError, exit_on_user_error
from hf_flowdistill.evaluation.report import format_cells
from hf_flowdistill.networks.loading import load_pipeline
from hf_flowdistill.teachers import decode, encode_prompts, learn_contract
from hf_flowdistill.training.checkpointing import latest_checkpoint
from layout import after_calls, sampler_of
from scenes import SIZE, random_scene


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="demo/run", help="--output_dir of a finished training (default: %(default)s)")
    parser.add_argument("--teacher", default=str(HERE / "teacher"), help="a shapes pipeline")
    parser.add_argument("--num_prompts", type=int, default=1000, help="freshly drawn prompts")
    parser.add_argument("--seed", type=int, default=2026, help="of these prompts and of all noise")
    parser.add_argument("--output_file", help="the figures as JSON")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.num_prompts < 1:
        raise UserError("--num_prompts must be at least 1.")
    run, checkpoint = Path(args.run), latest_checkpoint(args.run)
    if checkpoint is None or not (run / "student" / "model_index.json").is_file():
        raise UserError(f"{run} holds no finished training with checkpoints: `make demo` makes one, or give --run.")
    silence_libraries()
    trained = SimpleNamespace(**json.loads((run / "student" / "training_args.json").read_text())["training_args"])
    pipeline, generator = load_pipeline(args.teacher), load_pipeline(run / "student").transformer
    teacher, fake_score = pipeline.transformer, copy.deepcopy(pipeline.transformer)
    load_model(fake_score, checkpoint / "fake_score.safetensors")
    contract = learn_contract(pipeline, height=SIZE, width=SIZE, pipeline_kwargs=CALL)
    rng, noise_generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    scenes = [random_scene(rng) for _ in range(args.num_prompts)]
    conditional, unconditional = encode_prompts(pipeline, contract, [scene.prompt for scene in scenes])
    levels, noise_type = sampler_of(run / "student")
    draw = functools.partial(torch.randn, len(scenes), *contract.latent_shape, generator=noise_generator)
    mode, fake_mode = train_sid_dit.choose_guidance(trained, contract)
    of_teacher = trained.teacher_guidance_scale, mode, trained.guidance_rescale
    of_fake = trained.fake_guidance_scale, fake_mode

    def predict_gap(x_t, sigma, places):
        words = x_t, sigma, conditional[places], unconditional
        velocities = [
            contract.guided_velocity(network, *words, *guidance)
            for network, guidance in ((teacher, of_teacher), (fake_score, of_fake))
        ]
        x0_teacher, x0_fake = (flow.x0_from_velocity(x_t, velocity, sigma) for velocity in velocities)
        return x0_teacher - x0_fake

    with torch.no_grad():
        latents = after_calls(contract, generator, conditional[:], levels, noise_type, draw)[-1]
        found = [detect(picture) for picture in decode(pipeline, contract, latents, "pt")]
        right = torch.tensor([correct(*pair) for pair in zip(scenes, found)])
        print(f"{right.sum()} of {len(scenes)} pictures are right", flush=True)
        if right.all() or not right.any():
            raise UserError("all pictures are right, or none: there is nothing to compare; raise --num_prompts.")
        rows = measure(predict_gap, latents, right, draw)
    if args.output_file:
        Path(args.output_file).write_text(json.dumps(rows, indent=2) + "\n")
    print(f"\n{format_rows(rows)}")


if __name__ == "__main__":
    exit_on_user_error(main)()
