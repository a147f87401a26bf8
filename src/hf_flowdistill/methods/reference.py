# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a student is shown beside while it trains: the teacher's own latents."""

import torch

from hf_flowdistill.flow import add_noise
from hf_flowdistill.losses.sid import fake_score_loss, x0_statistics


def measure_on_samples(sample, regress, samples, draw_sigma, *, batch_size: int) -> dict[str, float]:
    """`measure_teacher` on the reference noise and prompts of `samples`, at eight noise levels of `draw_sigma`."""
    return measure_teacher(
        sample,
        regress,
        samples.noise("reference"),
        [draw_sigma(samples, f"reference sigma {i}") for i in range(8)],
        [samples.noise(f"reference noise {i}") for i in range(8)],
        samples.conditional("reference"),
        samples.size.unconditional,
        batch_size=batch_size,
    )


@torch.no_grad()
def measure_teacher(sample, regress, noise, sigmas, noises, conditional, unconditional, *, batch_size, num_steps=20):
    """What the generator is shown beside: statistics of latents that the teacher makes itself, and its loss on them.

    Args:
        sample: `sample(x_t=, sigma=, conditional=, unconditional=)`, the velocity that is integrated from `noise` at
            sigma 1 to 0 in `num_steps` equal Euler steps.
        regress: the same signature, the velocity whose regression error is taken on the finished latents.
        noise: [B, ...], the latents at sigma 1.
        sigmas: tensors [B] in (0, 1), the noise levels of that error, with `noises`, tensors [B, ...].
        batch_size: how many samples go through the network at a time.

    Returns:
        "teacher_latent_mean", "_std" and "_peak" (of `x0_statistics`), and "teacher_error", the mean of
        `fake_score_loss`'s "fake_score_error".
    """
    latents, errors = [], []
    for rows in torch.arange(len(noise)).split(batch_size):
        there, words = rows.to(noise.device), {"conditional": conditional[rows], "unconditional": unconditional}
        x_t = noise[there]
        for i in range(num_steps):
            x_t = x_t - sample(x_t=x_t, sigma=x_t.new_full((len(rows),), 1 - i / num_steps), **words) / num_steps
        latents.append(x_t)
        for sigma, eps in zip(sigmas, noises):
            velocity = regress(x_t=add_noise(x_t, eps[there], sigma[there]), sigma=sigma[there], **words)
            errors.append(fake_score_loss(velocity, x_t, eps[there])[1]["fake_score_error"] * len(rows))
    statistics = {f"teacher_latent_{name}": value.item() for name, value in x0_statistics(torch.cat(latents)).items()}
    return statistics | {"teacher_error": torch.stack(errors).sum().item() / (len(noise) * len(sigmas))}
