# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The sigma convention and the linear maps between what a network may predict.

Everywhere in this library `sigma` lies in [0, 1] and 1 is pure noise:

    x_t = (1 - sigma) * x0 + sigma * noise        velocity = noise - x0

Given x_t, each prediction (x0, noise, score, v, velocity, TrigFlow output) fixes all the others, for samples and for
conditional expectations alike (SiD-DiT Sec. 2). `velocity` is the hub: each quantity has a map to it and one from it.

Shapes: latents are [B, ...]; sigma is [B]. Results follow torch's type promotion, so bfloat16 latents with a float32
sigma give float32. All functions are differentiable in all tensor arguments.

Ends of the interval: a map that divides by sigma or by 1 - sigma says so, and gives inf or nan there. Nothing is
clamped, because a clamp would silently change the objective; the sigmas this library draws for training lie strictly
inside (0, 1), and a generator's first step, at sigma = 1, uses only maps that hold there.
"""

import torch
from torch import Tensor


def expand_like(sigma: Tensor, x: Tensor) -> Tensor:
    """View sigma [B] as [B, 1, ..., 1] so that it broadcasts over x [B, ...]. Keeps sigma's own dtype.

    Raises:
        ValueError: sigma is not [B]. (Plain broadcasting would align it with the last axis instead.)
    """
    if sigma.shape != x.shape[:1]:
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}; expected ({x.shape[0]},) for x of {tuple(x.shape)}")
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t = (1 - sigma) x0 + sigma noise. SiD-DiT Eq. 1 with alpha_t = 1 - t, sigma_t = t; Eq. 17."""
    sigma = expand_like(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """velocity = noise - x0, the regression target of rectified flow. SiD-DiT Eq. 9."""
    return noise - x0


def x0_from_velocity(x_t: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """x0 = x_t - sigma velocity, for every sigma in [0, 1]. SiD-DiT Eq. 11."""
    return x_t - expand_like(sigma, x_t) * velocity


def velocity_from_x0(x_t: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """velocity = (x_t - x0) / sigma. SiD-DiT Eq. 11. Not finite at sigma = 0."""
    return (x_t - x0) / expand_like(sigma, x_t)


def noise_from_velocity(x_t: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """noise = x_t + (1 - sigma) velocity, for every sigma in [0, 1]. SiD-DiT Eq. 11."""
    return x_t + (1 - expand_like(sigma, x_t)) * velocity


def velocity_from_noise(x_t: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """velocity = (noise - x_t) / (1 - sigma). SiD-DiT Eq. 11. Not finite at sigma = 1."""
    return (noise - x_t) / (1 - expand_like(sigma, x_t))


def score_from_velocity(x_t: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """score = grad log p(x_t) = -(x_t + (1 - sigma) velocity) / sigma. SiD-DiT Eq. 12. Not finite at sigma = 0."""
    return -noise_from_velocity(x_t, velocity, sigma) / expand_like(sigma, x_t)


def velocity_from_score(x_t: Tensor, score: Tensor, sigma: Tensor) -> Tensor:
    """velocity = -(x_t + sigma score) / (1 - sigma). SiD-DiT Eq. 11. Not finite at sigma = 1."""
    sigma = expand_like(sigma, x_t)
    return -(x_t + sigma * score) / (1 - sigma)


def v_prediction_from_velocity(x_t: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """v = (1 - sigma) noise - sigma x0, from the velocity, for every sigma in [0, 1]. SiD-DiT Eq. 8 and 11.

    The factors are those of rectified flow, which do not lie on the unit circle; for the variance-preserving v of
    TrigFlow see `trigflow_output_from_velocity`.
    """
    sigma = expand_like(sigma, x_t)
    return (sigma**2 + (1 - sigma) ** 2) * velocity - (2 * sigma - 1) * x_t


def velocity_from_v_prediction(x_t: Tensor, v_prediction: Tensor, sigma: Tensor) -> Tensor:
    """velocity = ((2 sigma - 1) x_t + v) / (sigma^2 + (1 - sigma)^2), for every sigma in [0, 1]. SiD-DiT Eq. 11."""
    sigma = expand_like(sigma, x_t)
    return ((2 * sigma - 1) * x_t + v_prediction) / (sigma**2 + (1 - sigma) ** 2)


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: unconditional + scale (conditional - unconditional). SiD-DiT Eq. 15.

    scale 1 is the conditional prediction, 0 the unconditional one. At a given x_t the maps of this file are affine in
    the prediction, so guiding velocities and guiding x0 predictions are the same thing. Gradient flows through both.
    """
    return unconditional + scale * (conditional - unconditional)


def rescale_guidance(guided: Tensor, unguided: Tensor, x_t: Tensor, sigma: Tensor, factor: float) -> Tensor:
    """The guided velocity whose x0 is scaled towards the contrast of the unguided x0. arXiv:2305.08891, Sec. 3.4.

    x0 is multiplied by 1 - factor + factor * std(x0 of unguided) / std(x0 of guided), each standard deviation over
    all elements of a sample; factor 0 changes nothing, 1 gives x0 the unguided contrast. The paper does so to the
    network's output; here it is x0, which is the same whatever the network predicts. Gradient flows through all.

    Args:
        guided, unguided: velocities, [B, ...].
        x_t: what they were predicted at, [B, ...].
        sigma: [B], in (0, 1].
    """
    x0_guided, x0_unguided = (x0_from_velocity(x_t, velocity, sigma) for velocity in (guided, unguided))
    dims = tuple(range(1, x_t.ndim))
    ratio = x0_unguided.std(dims, keepdim=True) / x0_guided.std(dims, keepdim=True)
    return guided + factor * (1 - ratio) * x0_guided / expand_like(sigma, x_t)


# TrigFlow: x_trig = sigma_data (cos(t) x0 + sin(t) noise), t in [0, pi/2]. SiD-DiT Sec. 2.2, last paragraph.


def trigflow_to_sigma(t: Tensor) -> Tensor:
    """The sigma of equal signal-to-noise ratio: sin t / (sin t + cos t), for angles t in [0, pi/2], any shape."""
    return torch.sin(t) / (torch.sin(t) + torch.cos(t))


def sigma_to_trigflow(sigma: Tensor) -> Tensor:
    """The angle t in [0, pi/2] with tan t = sigma / (1 - sigma); inverse of `trigflow_to_sigma`, any shape."""
    return torch.atan2(sigma, 1 - sigma)


def trigflow_to_rectified(x_trig: Tensor, sigma: Tensor, sigma_data: float = 1.0) -> Tensor:
    """x_t = x_trig sqrt(sigma^2 + (1 - sigma)^2) / sigma_data; sigma is the converted time, not the angle."""
    return x_trig * _norm(expand_like(sigma, x_trig)) / sigma_data


def rectified_to_trigflow(x_t: Tensor, sigma: Tensor, sigma_data: float = 1.0) -> Tensor:
    """x_trig = x_t sigma_data / sqrt(sigma^2 + (1 - sigma)^2); inverse of `trigflow_to_rectified`."""
    return x_t * sigma_data / _norm(expand_like(sigma, x_t))


def velocity_from_trigflow_output(x_t: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
    """Velocity from a TrigFlow network's output F, for every sigma in [0, 1].

    F estimates cos(t) noise - sin(t) x0 (sigma_data is a factor outside of it), i.e. v-prediction on the unit circle.
    x_t is the rectified-flow latent; convert with `trigflow_to_rectified` first.
    """
    return velocity_from_v_prediction(x_t, output * _norm(expand_like(sigma, x_t)), sigma)


def trigflow_output_from_velocity(x_t: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The TrigFlow network output F that stands for this velocity; inverse of `velocity_from_trigflow_output`."""
    return v_prediction_from_velocity(x_t, velocity, sigma) / _norm(expand_like(sigma, x_t))


def _norm(sigma: Tensor) -> Tensor:
    """Length of (1 - sigma, sigma), at least sqrt(1/2)."""
    return torch.sqrt(sigma**2 + (1 - sigma) ** 2)
