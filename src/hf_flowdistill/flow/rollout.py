# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The few-step generator: denoise to x0, noise again to the next sigma, and so on. SiD-DiT Eq. 16."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_flowdistill import flow
from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.names import NOISE_TYPES, falls_from_one
from hf_flowdistill.flow.timesteps import few_step_sigmas


@dataclass(frozen=True)
class Sampler:
    """How a few-step generator samples: arguments of `rollout`.

    Attributes:
        num_steps: how many steps; of `sigmas`, where they are given, their number.
        noise_type: "fresh", "fixed" or "ddim".
        sigmas: the noise levels, [num_steps]; None is the even grid 1 - i / num_steps.
    """

    num_steps: int = 4
    noise_type: str = "fresh"
    sigmas: Sequence[float] | None = None


def rollout(
    velocity_fn: Callable[[Tensor, Tensor], Tensor],
    noises: Callable[[int], Tensor],
    *,
    k: int | None = None,
    num_steps: int = 4,
    noise_type: str = "fresh",
    sigmas: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Run the generator to step k and return its x0 there, [B, ...] in the latent layout.

    Step i (from 0) is x_t = (1 - sigma_i) x0 + sigma_i n_i, then x0 = x_t - sigma_i velocity_fn(x_t, sigma_i). It
    starts at x0 = 0, whose factor is 0, as sigma_0 = 1. With "fresh" noise and two steps or more it is diffusers'
    FlowMatchEulerDiscreteScheduler with stochastic_sampling=True, shift=1 and shift_terminal=1/num_steps.

    Args:
        velocity_fn: (x_t [B, ...], sigma [B]) -> velocity [B, ...].
        noises: i -> the standard normal noise of step i, [B, ...]; called only for the steps that need their own.
        k: in 1..num_steps, the step to stop after; None means the last one.
        num_steps: length of the default grid 1 - i / num_steps. Ignored when `sigmas` is given.
        noise_type: n_i is `noises(i)` for "fresh", `noises(0)` at every step for "fixed", and for "ddim" the noise
            implied by the step before, (x_t - (1 - sigma) x0) / sigma.
        sigmas: the noise levels instead, strictly decreasing in (0, 1], the first one 1.

    The steps before k run under no_grad; step k runs in the caller's grad mode, so gradient reaches the parameters of
    velocity_fn through exactly one call. x_t, sigma and x0 are at least float32 whatever the dtype of the noise;
    velocity_fn decides the precision of the network.

    Raises:
        UserError: unknown noise type, or num_steps < 1.
        ValueError: k out of range, or unusable sigmas.
    """
    if noise_type not in NOISE_TYPES:
        raise UserError(f"unknown noise type '{noise_type}': choose one of {', '.join(map(repr, NOISE_TYPES))}")
    sigmas = _checked(few_step_sigmas(num_steps) if sigmas is None else sigmas)
    k = len(sigmas) if k is None else k
    if not 1 <= k <= len(sigmas):
        raise ValueError(f"k is {k}; expected 1 to {len(sigmas)}")

    noise = noises(0)
    x0 = torch.zeros_like(noise)
    for i, level in enumerate(sigmas[:k]):
        if i > 0 and noise_type == "fresh":
            noise = noises(i)
        dtype = torch.promote_types(noise.dtype, torch.float32)
        sigma = torch.full((noise.shape[0],), level, dtype=dtype, device=noise.device)
        last = i == k - 1
        if last and torch.is_grad_enabled():
            # Autocast caches low-precision copies of the weights. In older PyTorch (pytorch/pytorch#112583) those made
            # under no_grad have no history, and reusing them here would silently leave the weights without gradient.
            torch.clear_autocast_cache()
        with torch.set_grad_enabled(last and torch.is_grad_enabled()):
            x_t = flow.add_noise(x0, noise, sigma)
            velocity = velocity_fn(x_t, sigma)
            x0 = flow.x0_from_velocity(x_t, velocity, sigma)
            if noise_type == "ddim" and not last:
                noise = flow.noise_from_velocity(x_t, velocity, sigma)
    return x0


def _checked(sigmas: Sequence[float] | Tensor) -> list[float]:
    levels = [float(level) for level in sigmas]
    if not falls_from_one(levels):
        raise ValueError(f"sigmas must start at 1 and decrease strictly towards 0 without reaching it, got {levels}")
    return levels
