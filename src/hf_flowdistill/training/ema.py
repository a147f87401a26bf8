# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Exponential moving average of a network, with its half-life in images."""

import torch

from hf_flowdistill.networks.roles import plain_copy


def ema_decay(batch_size: int, images_seen: int, half_life_images: float, rampup: float = 0.05) -> float:
    """How much of the average survives one step of `batch_size` images.

    beta = 0.5 ** (batch / min(half_life, rampup * images_seen)), the rule of SiD-LSG (half-life 500k images, ramp-up
    5 %): early on the half-life is a fixed share of what has been seen, so the start is soon forgotten.
    `images_seen` counts this step's batch. A half-life of 0 means no average: the result is 0.
    """
    half_life = min(half_life_images, rampup * images_seen)
    return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0


class EMA:
    """A float32 copy of `model` in `ema.model` that follows it; the copy never carries gradient.

    `copy(model, dtype)` makes it, e.g. `Sharding.copy`.
    """

    def __init__(
        self, model: torch.nn.Module, half_life_images: float = 500_000, rampup: float = 0.05, copy=plain_copy
    ):
        self.model = copy(model, torch.float32).requires_grad_(False).eval()
        self.half_life_images = half_life_images
        self.rampup = rampup

    @torch.no_grad()
    def update(self, model: torch.nn.Module, *, batch_size: int, images_seen: int) -> float:
        """Move the average towards `model` and return the decay that was used."""
        decay = ema_decay(batch_size, images_seen, self.half_life_images, self.rampup)
        for average, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(parameter.to(average.dtype), 1 - decay)
        return decay
