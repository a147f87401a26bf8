# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Which noise levels are visited: p(sigma) in training, what a loss makes of it, and few-step grids."""

import torch
from torch import Tensor

from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.names import SIGMA_MEAN, SIGMA_STD


def few_step_sigmas(num_steps: int) -> Tensor:
    """The generator's grid [num_steps], 1 - i / num_steps from i = 0: [1, .75, .5, .25] for 4. SiD-DiT Eq. 16.

    Raises:
        UserError: num_steps < 1.
    """
    if num_steps < 1:
        raise UserError(f"num_steps is {num_steps}: a generator needs at least one step")
    return 1 - torch.arange(num_steps) / num_steps


def sigma_from_normal(z: Tensor, mean: float = SIGMA_MEAN, std: float = SIGMA_STD) -> Tensor:
    """sigmoid(mean + std z): standard normal draws of any shape to sigma in (0, 1), same shape and dtype."""
    return torch.sigmoid(mean + std * z)


def logit_normal(
    batch: int,
    *,
    mean: float = SIGMA_MEAN,
    std: float = SIGMA_STD,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw sigma [batch] with logit(sigma) ~ N(mean, std^2), unclipped. SiD-DiT Sec. 4.1.

    Drawn on the generator's own device, then moved, so that one seed gives one sequence on every `device`.
    """
    source = device if generator is None else generator.device
    z = torch.randn(batch, generator=generator, device=source, dtype=dtype)
    return sigma_from_normal(z, mean, std).to(device)


def pi(sigma_grid: Tensor, density: Tensor, weight: Tensor) -> Tensor:
    """The weight-normalised distribution of sigma: w p / integral of w p. SiD-DiT Eq. 14.

    What a loss emphasises is this product; neither p(sigma) nor w(sigma) means anything alone.

    Args:
        sigma_grid: [N], increasing, strictly inside (0, 1): several weights are inf at 0.
        density: [N], p(sigma) on the grid, of any scale.
        weight: [N], w(sigma) on the grid.

    Returns:
        [N], whose trapezoid integral over the grid is 1.

    Raises:
        ValueError: the product is not finite, or vanishes everywhere.
    """
    product = weight * density
    total = torch.trapezoid(product, sigma_grid)
    if not torch.isfinite(total) or total <= 0:
        raise ValueError("w(sigma) p(sigma) has no finite positive integral; keep the grid strictly inside (0, 1)")
    return product / total
