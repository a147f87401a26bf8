# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Jumps from pure noise along a flow: the map, how long jumps are drawn, and one step of a solver. FreeFlow Sec. 4.

A jump of length delta in [0, 1] goes from noise z at sigma 1 to sigma 1 - delta. FreeFlow's velocities point from
noise to data: they are minus ours, so its z + delta F is z - delta * velocity here.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_flowdistill.flow.paths import expand_like


def land(z: Tensor, velocity: Tensor, jump: Tensor) -> Tensor:
    """Where a jump ends: z - jump * velocity, with the average velocity over it. FreeFlow Sec. 4, f = z + delta F.

    Args:
        z: [B, ...], noise.
        velocity: [B, ...].
        jump: [B] in [0, 1].
    """
    return z - expand_like(jump, z) * velocity


def uniform_from_normal(z: Tensor) -> Tensor:
    """Uniform numbers in [0, 1] from standard normal ones, any shape."""
    return (1 + torch.erf(z / math.sqrt(2))) / 2


def jump_from_normal(
    z: Tensor, chance: Tensor, *, mean: float = 0.0, std: float = 1.0, zeros: float = 0.1, num_jumps: int | None = None
) -> Tensor:
    """Lengths of jumps, [B] in [0, 1]: 0 for a share `zeros` of them, the others logit-normal. FreeFlow Table 3.

    Args:
        z, chance: [B], standard normal draws.
        num_jumps: round down to multiples of 1/num_jumps, of which 1 is none; None leaves them as they are.
    """
    jump = torch.sigmoid(mean + std * z)
    jump = torch.where(uniform_from_normal(chance) < zeros, torch.zeros_like(jump), jump)
    if num_jumps is not None:
        jump = (jump * num_jumps).floor().clamp(max=num_jumps - 1) / num_jumps
    return jump


def noisier(x_t: Tensor, noise: Tensor, sigma: Tensor, level: float) -> Tensor:
    """x_t at noise level `level`, where that is above its own `sigma` [B]; elsewhere as it is. FreeFlow App. A.1.

    x_t (1 - level) / (1 - sigma) + sqrt(level^2 - (1 - level)^2 sigma^2 / (1 - sigma)^2) noise, which has the
    distribution of the path at `level` if x_t has it at sigma.
    """
    share = expand_like(((1 - level) / (1 - sigma).clamp(min=1e-12)).clamp(max=1), x_t)
    spread = (level**2 - (share * expand_like(sigma, x_t)) ** 2).clamp(min=0).sqrt()
    return torch.where(expand_like(sigma < level, x_t), share * x_t + spread * noise, x_t)


def step_velocity(
    velocity_fn: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, sigma: Tensor, length: Tensor, solver: str
) -> Tensor:
    """The velocity with which a solver goes from sigma to sigma - length, [B, ...]; FreeFlow App. A.1, "u type".

    "euler" calls `velocity_fn(x_t, sigma)`, "heun" also where that leads, and takes the mean.
    """
    first = velocity_fn(x_t, sigma)
    if solver == "euler":
        return first
    return (first + velocity_fn(x_t - expand_like(length, x_t) * first, (sigma - length).clamp(min=0))) / 2
