# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Which noise levels are visited: p(sigma) in training, the schedules it is compared with, and few-step grids."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_flowdistill.errors import UserError


# p(sigma) of SiD-DiT: the schedule SANA-Sprint's teacher was fine-tuned with (Sec. 4.1).
SIGMA_MEAN = math.log(2)
SIGMA_STD = 1.6


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


def sigma_from_snr(snr: Tensor) -> Tensor:
    """The sigma of rectified flow with signal-to-noise ratio alpha^2 / sigma^2 = snr: 1 / (1 + sqrt(snr)). Fig. 2."""
    return 1 / (1 + torch.sqrt(snr))


@dataclass(frozen=True)
class LogitNormal:
    """logit(sigma) ~ N(mean, std^2)."""

    mean: float
    std: float
    support: tuple[float, float] = (0.0, 1.0)

    def density(self, sigma: Tensor) -> Tensor:
        """p(sigma) for sigma inside (0, 1), any shape."""
        z = (torch.logit(sigma) - self.mean) / self.std
        return torch.exp(-(z**2) / 2) / (self.std * math.sqrt(2 * math.pi) * sigma * (1 - sigma))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw [n] sigmas, float64."""
        return logit_normal(n, mean=self.mean, std=self.std, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class LinearBeta:
    """DDPM's linear beta in continuous time: s ~ U(0, 1), -log alpha_bar = b0 s + (b1 - b0) s^2 / 2.

    b0 and b1 are 1000 times the first and last beta of the 1000 discrete steps.
    """

    b0: float = 0.1
    b1: float = 20.0

    @property
    def support(self) -> tuple[float, float]:
        return 0.0, self.sigma(torch.ones(1, dtype=torch.float64)).item()

    def sigma(self, s: Tensor) -> Tensor:
        """Time s in [0, 1] to sigma; the signal-to-noise ratio is alpha_bar / (1 - alpha_bar)."""
        minus_log_alpha_bar = self.b0 * s + (self.b1 - self.b0) * s**2 / 2
        return sigma_from_snr(1 / torch.expm1(minus_log_alpha_bar))

    def density(self, sigma: Tensor) -> Tensor:
        """p(sigma) = ds / dsigma for sigma inside (0, 1), any shape; 0 outside of `support`."""
        ratio = sigma / (1 - sigma)
        minus_log_alpha_bar = torch.log1p(ratio**2)
        beta = torch.sqrt(self.b0**2 + 2 * (self.b1 - self.b0) * minus_log_alpha_bar)  # b0 + (b1 - b0) s
        density = 2 * ratio / ((1 + ratio**2) * (1 - sigma) ** 2 * beta)
        return torch.where(sigma <= self.support[1], density, 0.0)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw [n] sigmas, float64."""
        return self.sigma(torch.rand(n, generator=generator, dtype=torch.float64))


@dataclass(frozen=True)
class KarrasGrid:
    """EDM's sampling grid in continuous time: s ~ U(0, end), noise^(1/rho) = low^(1/rho) (1 - s) + high^(1/rho) s.

    EDM adds noise to unscaled data, so that the signal-to-noise ratio is 1 / noise^2.
    """

    end: float
    low: float = 0.002
    high: float = 80.0
    rho: float = 7.0

    @property
    def support(self) -> tuple[float, float]:
        first, last = self.sigma(torch.tensor([0.0, self.end], dtype=torch.float64)).tolist()
        return first, last

    def sigma(self, s: Tensor) -> Tensor:
        """Position s in [0, 1] of the grid, 0 the cleanest, to sigma."""
        low, high = self.low ** (1 / self.rho), self.high ** (1 / self.rho)
        return sigma_from_snr((low + s * (high - low)) ** (-2 * self.rho))

    def density(self, sigma: Tensor) -> Tensor:
        """p(sigma) = ds / dsigma / end for sigma inside (0, 1), any shape; 0 outside of `support`."""
        low, high = self.low ** (1 / self.rho), self.high ** (1 / self.rho)
        ratio = sigma / (1 - sigma)
        density = ratio ** (1 / self.rho - 1) / (self.rho * (high - low) * self.end * (1 - sigma) ** 2)
        inside = (sigma >= self.support[0]) & (sigma <= self.support[1])
        return torch.where(inside, density, 0.0)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw [n] sigmas, float64."""
        return self.sigma(self.end * torch.rand(n, generator=generator, dtype=torch.float64))


# The six columns of SiD-DiT Figure 2, each mapped to sigma by equal signal-to-noise ratio. The paper gives numbers for
# the first alone; the others are those of the works it names. Discrete schedules are taken in their continuous limit.
SCHEDULES: dict[str, LogitNormal | LinearBeta | KarrasGrid] = {
    # tan(t) = e^tau / sigma_data with sigma_data 0.5, hence the ln 2; tau ~ N(0, 1.6^2).
    "sid-dit": LogitNormal(SIGMA_MEAN, SIGMA_STD),
    # As above with tau ~ N(-1, 1.4^2), the default of Lu & Song (2025).
    "trigflow": LogitNormal(math.log(2) - 1.0, 1.4),
    # t ~ logit-normal(0, 1), shifted by 3: sigma = 3 t / (1 + 2 t), i.e. logit(sigma) = logit(t) + ln 3.
    "sana": LogitNormal(math.log(3), 1.0),
    "ddpm": LinearBeta(),
    # ln(noise) ~ N(-1.2, 1.2^2) with signal-to-noise ratio 1 / noise^2.
    "edm-training": LogitNormal(-1.2, 1.2),
    # The cleaner 80 % of the grid's positions, as in SiD, whose steps run from 0 to 800 of 1000.
    "edm-sampling": KarrasGrid(end=0.8),
}


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
