# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The adversarial terms of SiD-DiT's data-aided stage (SiD2a): Diffusion GAN on features of the fake score.

Logits are [B, ...]: all that a sample has are averaged, after the cross-entropy and not before. Then a sample counts
for as many elements as its latent has, since the losses of `losses.sid` sum over these. Computed in float32 (float64
inputs stay float64) even inside autocast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_flowdistill.losses.sid import at_least_float32


LOGIT_LIMIT = 10.0  # beyond it a logit has no gradient


def discriminator_loss(real: Tensor, fake: Tensor, *, elements: int) -> tuple[Tensor, dict[str, Tensor]]:
    """elements * (BCE(real, 1) + BCE(fake, 0)) / 2, which joins the fake score's regression.

    Args:
        real: [B, ...], logits of real latents with noise; clamped to +-10, like all logits here.
        fake: [B, ...], logits of generated latents with the same noise at the same sigma.
        elements: of one sample's latent, C*H*W.

    Gradient flows through both.

    Returns:
        The scalar loss, and detached scalars: "discriminator_loss", per element; "real_accuracy" and "fake_accuracy",
        the shares of logits on the right side of 0; "real_logit" and "fake_logit", their means before the clamp.

    Raises:
        ValueError: the logits of a sample have different shapes.
    """
    if real.shape[1:] != fake.shape[1:]:
        raise ValueError(f"logits of real and fake samples differ: {tuple(real.shape)} and {tuple(fake.shape)}")
    with torch.autocast(real.device.type, enabled=False):
        real, fake = at_least_float32(real, fake)
        loss = (_cross_entropy(real, 1).mean() + _cross_entropy(fake, 0).mean()) / 2
        diagnostics = {
            "discriminator_loss": loss.detach(),
            "real_accuracy": (real.detach() > 0).to(real.dtype).mean(),
            "fake_accuracy": (fake.detach() < 0).to(fake.dtype).mean(),
            "real_logit": real.detach().mean(),
            "fake_logit": fake.detach().mean(),
        }
    return elements * loss, diagnostics


def adversarial_generator_loss(fake: Tensor, weight: Tensor, *, elements: int) -> Tensor:
    """elements * w(sigma) * BCE(fake, 1), the mean over the batch: a scalar.

    Args:
        fake: [B, ...], logits of generated latents with noise; gradient flows through them.
        weight: [B], w(sigma) of `weighting`, as in `sid_generator_loss`; detached here.
        elements: of one sample's latent, C*H*W.

    Raises:
        ValueError: the weights are not one for each sample.
    """
    if weight.shape != fake.shape[:1]:
        raise ValueError(f"expected a weight for each of {len(fake)} samples, got {tuple(weight.shape)}")
    with torch.autocast(fake.device.type, enabled=False):
        fake, weight = at_least_float32(fake, weight.detach())
        return elements * (weight * _cross_entropy(fake, 1)).mean()


def _cross_entropy(logits: Tensor, label: int) -> Tensor:
    """Binary cross-entropy of clamped logits with one label, the mean of each sample: [B]."""
    logits = logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT).flatten(1)
    return F.softplus(-logits if label else logits).mean(1)
