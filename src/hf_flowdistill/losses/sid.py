# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Score identity distillation (SiD): the generator loss and the fake-score loss.

Both sum over all axes but the first, average over the batch, and are computed in float32 (float64 inputs stay float64)
even inside autocast: each term is a product of small differences of large numbers, which bfloat16 would round away.
"""

import torch
from torch import Tensor

from hf_flowdistill.flow import velocity
from hf_flowdistill.flow.weighting import get_weighting


def sid_generator_loss(
    x0: Tensor,
    x0_teacher: Tensor,
    x0_fake: Tensor,
    sigma: Tensor,
    *,
    alpha: float = 1.0,
    weighting: str = "1-sigma",
    scale: float = 100.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The generator's loss, SiD-DiT Eq. 18 (alpha = 1) and its SiD form for any alpha:

        scale * w(sigma) * <x0_teacher - x0_fake, (x0_teacher - x0) - alpha (x0_teacher - x0_fake)>

    Args:
        x0: [B, ...], what the generator made.
        x0_teacher: [B, ...], the teacher's x0 prediction at x_t = add_noise(x0, noise, sigma), guided or not.
        x0_fake: [B, ...], the fake score's x0 prediction at the same x_t.
        sigma: [B] in (0, 1), the noise level of x_t.
        alpha: 1.0 in SiD-DiT.
        weighting: a name in `weighting.WEIGHTINGS`.
        scale: a constant factor, lambda_sid in SiD-DiT's Tables 3 and 4.

    Gradient flows through x0, x0_teacher and x0_fake: the two networks are frozen in this turn, but their input x_t
    depends on the generator. Cutting either path gives another objective. The weight is detached.

    Returns:
        The scalar loss, and a dict of detached scalars. The loss is signed and, at alpha = 1, zero in expectation
        whenever the fake score is right, so its value says nothing about progress. The diagnostics do:
        "x0_gap" = mean |x0_teacher - x0_fake|, "weight", "x0_mean", "x0_std" and "x0_peak" (`x0_statistics`),
        "x0_teacher_mean", "x0_teacher_std".

    Raises:
        UserError: unknown weighting.
        ValueError: shapes differ.
    """
    weight_function = get_weighting(weighting)
    if not x0.shape == x0_teacher.shape == x0_fake.shape or sigma.shape != x0.shape[:1]:
        shapes = [tuple(tensor.shape) for tensor in (x0, x0_teacher, x0_fake, sigma)]
        raise ValueError(f"x0, x0_teacher, x0_fake must share one shape and sigma be its first axis, got {shapes}")
    with torch.autocast(x0.device.type, enabled=False):
        x0, x0_teacher, x0_fake, sigma = at_least_float32(x0, x0_teacher, x0_fake, sigma)
        weight = weight_function(sigma, x0, x0_teacher).detach()
        gap = x0_teacher - x0_fake
        inner = (gap * ((x0_teacher - x0) - alpha * gap)).flatten(1).sum(1)
        loss = scale * (weight * inner).mean()
        with torch.no_grad():
            diagnostics = {
                "x0_gap": gap.abs().mean(),
                "weight": weight.mean(),
                **{f"x0_{name}": value for name, value in x0_statistics(x0).items()},
                "x0_teacher_mean": x0_teacher.mean(),
                "x0_teacher_std": x0_teacher.std(correction=0),
            }
    return loss, diagnostics


def x0_statistics(x0: Tensor) -> dict[str, Tensor]:
    """Of latents [B, ...]: "mean" and "std" over all elements, and "peak", the largest |element| of a sample, averaged
    over the samples, which grows where colours saturate. Scalars."""
    return {"mean": x0.mean(), "std": x0.std(correction=0), "peak": x0.abs().flatten(1).amax(1).mean()}


def fake_score_loss(velocity_fake: Tensor, x0: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Flow-matching regression of the fake score on what the generator makes, unweighted. SiD-DiT Eq. 9 and Sec. 3.

    Args:
        velocity_fake: [B, ...], the fake score's velocity at add_noise(x0, noise, sigma); already guided if guidance
            is used inside the regression (long-and-short guidance). The only argument that receives gradient.
        x0: [B, ...], what the generator made; detached here.
        noise: [B, ...], the noise in x_t.

    Returns:
        The scalar loss, and {"fake_score_error": mean squared error per element}, detached, which does not grow with
        the size of the latents.

    Raises:
        ValueError: shapes differ.
    """
    if not velocity_fake.shape == x0.shape == noise.shape:
        shapes = [tuple(tensor.shape) for tensor in (velocity_fake, x0, noise)]
        raise ValueError(f"velocity_fake, x0 and noise must share one shape, got {shapes}")
    with torch.autocast(x0.device.type, enabled=False):
        velocity_fake, x0, noise = at_least_float32(velocity_fake, x0.detach(), noise.detach())
        squared_error = (velocity_fake - velocity(x0, noise)).square()
        loss = squared_error.flatten(1).sum(1).mean()
    return loss, {"fake_score_error": squared_error.detach().mean()}


def at_least_float32(*tensors: Tensor) -> list[Tensor]:
    """The tensors, those of a lower precision in float32."""
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
