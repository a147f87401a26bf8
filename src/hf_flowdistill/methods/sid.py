# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Score identity distillation with long-and-short guidance: the two turns of SiD-DiT (Sec. 3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_flowdistill import flow
from hf_flowdistill.flow.rollout import rollout
from hf_flowdistill.losses.sid import fake_score_loss, sid_generator_loss
from hf_flowdistill.networks.roles import Networks


@dataclass(frozen=True)
class SiDConfig:
    """The method's settings; the defaults are the paper's.

    Attributes:
        num_steps: sampler steps of the generator.
        sigmas: their noise levels, `num_steps` numbers that fall from 1; None is `few_step_sigmas(num_steps)`.
        noise_type: "fresh", "fixed" or "ddim"; see `rollout`.
        alpha: weight of the second term of the generator loss; 1 gives Eq. 18.
        weighting: name of w(sigma), see `weighting.WEIGHTINGS`.
        loss_scale: lambda_sid, a factor on the generator loss.
        teacher_guidance_scale: guidance of the teacher in the generator loss; 1 = off.
        fake_guidance_scale: guidance of the fake score in the generator loss; 1 = off.
        fake_train_guidance_scale: guidance inside the fake score's own regression; 1 = off.
        guidance_rescale: of the teacher in the generator loss, in [0, 1]; 0 = off, see `flow.rescale_guidance`.
        guidance_mode: of the teacher, "cfg", "embedded" or "both"; see `Contract.guided_velocity`.
        fake_guidance_mode: the same of the fake score, in both places.
    """

    num_steps: int = 4
    sigmas: Sequence[float] | None = None
    noise_type: str = "fresh"
    alpha: float = 1.0
    weighting: str = "1-sigma"
    loss_scale: float = 100.0
    teacher_guidance_scale: float = 4.5
    fake_guidance_scale: float = 4.5
    fake_train_guidance_scale: float = 4.5
    guidance_rescale: float = 0.0
    guidance_mode: str = "cfg"
    fake_guidance_mode: str = "cfg"


@dataclass
class SiDBatch:
    """Everything random that one turn needs for B samples, already drawn.

    Attributes:
        conditional: Conditioning of the prompts, B rows.
        unconditional: Conditioning of the negative prompt, one row or B.
        k: the sampler step whose x0 is used, in 1..num_steps.
        noises: i -> noise of sampler step i (from 0), [B, ...].
        sigma: noise level of the loss, [B], in (0, 1).
        noise: noise of the loss, [B, ...].
        x0: what the generator makes of `noises`, [B, ...], without graph; `generator_turn` leaves it here, and
            `fake_score_turn` takes it where it is given, instead of running the generator again.
    """

    conditional: Any
    unconditional: Any
    k: int
    noises: Callable[[int], Tensor]
    sigma: Tensor
    noise: Tensor
    x0: Tensor | None = None


def generate_x0(
    generator, contract, conditional, noises, *, k=None, num_steps=4, noise_type="fresh", sigmas=None
) -> Tensor:
    """x0 of the unguided few-step generator at step k (None = the last), [B, ...]; gradient through step k only."""
    conditional = conditional.with_embedded_guidance(1.0)

    def velocity_fn(x_t, sigma):
        return contract.velocity(generator, x_t, sigma, conditional)

    return rollout(velocity_fn, noises, k=k, num_steps=num_steps, noise_type=noise_type, sigmas=sigmas)


def generate(networks: Networks, contract, batch: SiDBatch, config: SiDConfig) -> Tensor:
    """`generate_x0` of a batch."""
    return generate_x0(
        networks.generator,
        contract,
        batch.conditional,
        batch.noises,
        k=batch.k,
        num_steps=config.num_steps,
        noise_type=config.noise_type,
        sigmas=config.sigmas,
    )


def fake_score_turn(networks: Networks, contract, batch: SiDBatch, config: SiDConfig):
    """The fake score's loss on what the generator makes: (scalar, metrics of detached scalars).

    Gradient reaches `networks.fake_score` alone, through both halves of its guided prediction; the generator runs
    without a graph, or not at all if `batch.x0` is there.
    """
    with torch.no_grad():
        x0 = generate(networks, contract, batch, config) if batch.x0 is None else batch.x0
        x_t = flow.add_noise(x0, batch.noise, batch.sigma)
    velocity_fake = contract.guided_velocity(
        networks.fake_score,
        x_t,
        batch.sigma,
        batch.conditional,
        batch.unconditional,
        config.fake_train_guidance_scale,
        config.fake_guidance_mode,
    )
    return fake_score_loss(velocity_fake, x0, batch.noise)


def generator_turn(networks: Networks, contract, batch: SiDBatch, config: SiDConfig):
    """The generator's loss, SiD-DiT Eq. 18: (scalar, metrics of detached scalars).

    Gradient flows through x0 directly and through x_t into the inputs of the teacher and of the fake score, whose
    parameters the caller has frozen (`Networks.training("generator")`).
    """
    x0 = generate(networks, contract, batch, config)
    batch.x0 = x0.detach()
    x_t = flow.add_noise(x0, batch.noise, batch.sigma)

    def predict_x0(network, scale, mode, rescale=0.0):
        words = batch.conditional, batch.unconditional
        velocity = contract.guided_velocity(network, x_t, batch.sigma, *words, scale, mode, rescale)
        return flow.x0_from_velocity(x_t, velocity, batch.sigma)

    return sid_generator_loss(
        x0,
        predict_x0(networks.teacher, config.teacher_guidance_scale, config.guidance_mode, config.guidance_rescale),
        predict_x0(networks.fake_score, config.fake_guidance_scale, config.fake_guidance_mode),
        batch.sigma,
        alpha=config.alpha,
        weighting=config.weighting,
        scale=config.loss_scale,
    )
