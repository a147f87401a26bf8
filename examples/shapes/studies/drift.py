# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What score distillation would do to pictures that are already right: the guided teacher's own.

    python examples/shapes/studies/drift.py

A fake score is fitted to latents that the teacher itself made, with guidance, in 28 steps. The generator's gradient is
driven by x0_teacher - x0_fake, which would be zero if such latents were what the distillation is after. The table says
how far from zero it is, at noised versions of latents held out, for the guided and for the unguided teacher:

    gap    sqrt(mean (x0_teacher - x0_fake)^2), in units of the latents
    push   <x0_teacher - x0_fake, x0_fake> / <x0_fake, x0_fake>, the part of it that changes only the contrast
"""

import copy

import torch
from study import build_parser, load_setting, make_latents, predict_x0, report

from hf_flowdistill import flow
from hf_flowdistill.cli import silence_libraries
from hf_flowdistill.errors import UserError, exit_on_user_error
from hf_flowdistill.evaluation.report import format_cells
from hf_flowdistill.flow.timesteps import logit_normal
from hf_flowdistill.losses.sid import fake_score_loss


SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
HELD_OUT = 400


def parse_args():
    parser = build_parser(__doc__, seed=0)
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="of the teacher and of the fake score")
    parser.add_argument("--num_latents", type=int, default=4000, help=f"that the teacher makes, {HELD_OUT} held out")
    parser.add_argument("--updates", type=int, default=400, help="of the fake score, in batches of 48")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="of the fake score, decaying to zero")
    return parser.parse_args()


def fit_fake_score(network, contract, conditional, unconditional, latents, args, generator):
    """The fake score's own regression, on fixed latents."""
    optimizer = torch.optim.Adam(network.parameters())
    for update in range(args.updates):
        pick = torch.randint(len(latents), (48,), generator=generator).tolist()
        x0, sigma = latents[pick], logit_normal(48, mean=1.0, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        velocity = contract.guided_velocity(
            network, flow.add_noise(x0, noise, sigma), sigma, conditional[pick], unconditional, args.guidance_scale
        )
        optimizer.zero_grad()
        fake_score_loss(velocity, x0, noise)[0].backward()
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 - update / args.updates)
        optimizer.step()


def measure(contract, teacher, fake_score, conditional, unconditional, latents, guidance_scale, generator):
    """One row per noise level and guidance of the teacher."""
    rows = []
    for level in SIGMAS:
        sigma = torch.full((len(latents),), level)
        x_t = flow.add_noise(latents, torch.randn(latents.shape, generator=generator), sigma)

        words = x_t, sigma, conditional, unconditional
        x0_fake = predict_x0(contract, fake_score, *words, guidance_scale)
        for scale in (guidance_scale, 1.0):
            gap = predict_x0(contract, teacher, *words, scale) - x0_fake
            push = (gap * x0_fake).sum() / x0_fake.square().sum()
            rows.append(
                {
                    "sigma": level,
                    "guidance_scale": scale,
                    "gap": gap.square().mean().sqrt().item(),
                    "push": push.item(),
                }
            )
    return rows


def main():
    args = parse_args()
    if args.num_latents < 2 * HELD_OUT:
        raise UserError(f"--num_latents must be at least {2 * HELD_OUT}: {HELD_OUT} of them are held out.")
    if args.guidance_scale == 1:
        raise UserError("--guidance_scale 1 is no guidance: give another one to compare with it.")
    silence_libraries()
    pipeline, contract, _, conditional, unconditional, _, generator = load_setting(
        args.teacher, args.num_latents, args.seed
    )
    teacher = pipeline.transformer

    print(f"making {args.num_latents} latents with the teacher ...", flush=True)
    parts = [list(range(i, min(i + 200, args.num_latents))) for i in range(0, args.num_latents, 200)]
    with torch.no_grad():
        latents = torch.cat(
            [
                make_latents(
                    *(contract, teacher, conditional[part], unconditional, args.guidance_scale),
                    x_t=torch.randn(len(part), *contract.latent_shape, generator=generator),
                )
                for part in parts
            ]
        )
    print(f"fitting a fake score in {args.updates} updates ...", flush=True)
    fake_score = copy.deepcopy(teacher).requires_grad_(True)
    fit_fake_score(fake_score, contract, conditional, unconditional, latents[:-HELD_OUT], args, generator)
    held_out = list(range(args.num_latents - HELD_OUT, args.num_latents))
    with torch.no_grad():
        rows = measure(
            *(contract, teacher, fake_score, conditional[held_out], unconditional, latents[held_out]),
            *(args.guidance_scale, generator),
        )
    report(rows, format_rows(rows), args.output_file)


def format_rows(rows: list[dict]) -> str:
    """One line per noise level: the guided teacher's gap and push, then the unguided one's."""
    lines = [["sigma", "gap, guided", "push, guided", "gap, unguided", "push, unguided"]]
    for guided, unguided in zip(rows[::2], rows[1::2]):
        figures = [figure for row in (guided, unguided) for figure in (f"{row['gap']:.3f}", f"{row['push']:+.1%}")]
        lines.append([f"{guided['sigma']:g}", *figures])
    return format_cells(lines)


if __name__ == "__main__":
    exit_on_user_error(main)()
