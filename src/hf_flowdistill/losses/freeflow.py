# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""FreeFlow: prediction, which follows the teacher's velocity from noise, and correction, which aligns distributions.

Each is the gap between a velocity of the student's and the teacher's, and its gradient is that gap at the output of
the student's network (FreeFlow Eq. 9 and 11). Gaps are of our velocities, noise - x0, minus the paper's; both
signs change, and the gradient is the same. Everything is computed in float32, or float64 if it is given that: gaps
are small differences of large numbers.
"""

import math

import torch
from torch import Tensor

from hf_flowdistill.flow import expand_like
from hf_flowdistill.losses.sid import at_least_float32


def continuous_gap(velocity: Tensor, derivative: Tensor, velocity_teacher: Tensor, jump: Tensor) -> Tensor:
    """Generating minus teacher's velocity: velocity + jump * derivative - velocity_teacher. FreeFlow Eq. 7 and 9.

    Args:
        velocity: [B, ...], the student's average velocity V(z, jump).
        derivative: [B, ...], its derivative in the length of the jump.
        velocity_teacher: [B, ...], the teacher's at z - jump V(z, jump) and sigma 1 - jump.
        jump: [B] in [0, 1].

    Returns:
        [B, ...], detached.
    """
    velocity, derivative, velocity_teacher, jump = _detached(velocity, derivative, velocity_teacher, jump)
    return velocity + expand_like(jump, velocity) * derivative - velocity_teacher


def discrete_gap(velocity: Tensor, velocity_before: Tensor, velocity_teacher: Tensor, jump: Tensor, before: Tensor):
    """The same with a difference in place of the derivative. FreeFlow Eq. 14 and 15.

    Args:
        velocity: [B, ...], V(z, jump).
        velocity_before: [B, ...], V(z, before).
        velocity_teacher: [B, ...], the teacher's at z - before V(z, before) and sigma 1 - before, or of a solver's
            step from there.
        jump, before: [B], 0 <= before < jump <= 1.

    Returns:
        [B, ...], detached.
    """
    tensors = _detached(velocity, velocity_before, velocity_teacher, jump, before)
    velocity, velocity_before, velocity_teacher, jump, before = tensors
    jump, before = expand_like(jump, velocity), expand_like(before, velocity)
    return (jump * velocity - before * velocity_before) / (jump - before) - velocity_teacher


def power_law(gap: Tensor, k: float, epsilon: float = 1e-4) -> Tensor:
    """gap / (mean of its squares + epsilon)^k, each sample by its own mean. FreeFlow Sec. 5.1.

    k = 0 leaves it; at k = 1 a sample counts the less the larger its gap is.
    """
    weight = (gap.square().flatten(1).mean(1) + epsilon) ** -k
    return expand_like(weight, gap) * gap


def gap_loss(velocity: Tensor, gap: Tensor) -> Tensor:
    """A loss of each sample, [B], whose gradient at `velocity` is `gap`. FreeFlow Eq. 9 and 11.

    It is half the squared distance of the velocity to a constant, which is itself minus `gap`: so |gap|^2 / 2, and
    zero where there is no gap.

    Args:
        velocity: [B, ...], the output of the student's network; the only argument that receives gradient.
        gap: [B, ...].
    """
    with torch.autocast(velocity.device.type, enabled=False):
        velocity, gap = at_least_float32(velocity, gap.detach())
        return (velocity - (velocity.detach() - gap)).square().flatten(1).sum(1) / 2


def norms(gap: Tensor) -> Tensor:
    """The length of each sample, divided by the root of its number of elements: [B]."""
    return gap.square().flatten(1).mean(1).sqrt()


def correction_gap(velocity_fake: Tensor, velocity_teacher: Tensor) -> Tensor:
    """Noising minus teacher's velocity, [B, ...], detached: that of the fake score, which follows what the student
    makes, minus that of the teacher, guided or not, at the same x_t of the student's x0. FreeFlow Eq. 11.

    The factor (1 - sigma)^2 / sigma of the Kullback-Leibler divergence's gradient is left out, as there.
    """
    velocity_fake, velocity_teacher = _detached(velocity_fake, velocity_teacher)
    return velocity_fake - velocity_teacher


def balance(alpha: float, prediction_norm: float, correction_norm: float, epsilon: float = 1e-6) -> float:
    """lambda, the factor on the correction: alpha E|prediction gap| / (E|correction gap| + epsilon). Sec. 5.1.

    The prediction's gap is the weighted one, whose share of the gradient App. A.3 counts.
    """
    return alpha * prediction_norm / (correction_norm + epsilon)


def alpha_at(images_seen: int, alpha: float, *, delay: int = 0, warmup: int = 0, decay: int | None = None) -> float:
    """alpha after `images_seen` images: 0 for `delay` images, then linearly up within `warmup`, and with `decay` down
    again as 1 / sqrt(images_seen / decay) from there on. FreeFlow App. A.3."""
    if images_seen < delay:
        return 0.0
    rise = min(1.0, (images_seen - delay) / warmup) if warmup else 1.0
    return alpha * rise / math.sqrt(max(1.0, images_seen / decay if decay else 1.0))


def confident_level(images_seen: int, warmup: int) -> float:
    """The least noise level at which the teacher is asked, which falls from 1 to 0 within `warmup` images. FreeFlow
    App. A.1."""
    return max(0.0, 1 - images_seen / warmup) if warmup else 0.0


def _detached(*tensors: Tensor) -> list[Tensor]:
    return at_least_float32(*(tensor.detach() for tensor in tensors))
