# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
import math

import pytest
import torch

from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.timesteps import (
    SCHEDULES,
    few_step_sigmas,
    logit_normal,
    pi,
    sigma_from_normal,
    sigma_from_snr,
)


GRID = torch.linspace(0, 1, 400_001, dtype=torch.float64)[1:-1]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def alpha_bar(step):
    """DDPM's discrete linear schedule, from its definition."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[step]


@pytest.mark.parametrize("name", SCHEDULES)
def test_density_integrates_to_one(name):
    assert torch.trapezoid(SCHEDULES[name].density(GRID), GRID).item() == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_density_matches_a_histogram_of_samples(name):
    schedule, n = SCHEDULES[name], 200_000
    samples = schedule.sample(n, seeded())
    low, high = schedule.support
    assert samples.shape == (n,) and samples.min() >= low and samples.max() <= high
    edges = torch.linspace(0, 1, 41, dtype=torch.float64)
    counts = torch.histogram(samples, edges).hist / n
    for i, observed in enumerate(counts.tolist()):
        cell = torch.linspace(edges[i], edges[i + 1], 20_001, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
        expected = torch.trapezoid(schedule.density(cell), cell).item()
        five_sigmas = 5 * math.sqrt(max(expected, 1 / n) / n)
        assert observed == pytest.approx(expected, abs=five_sigmas + 2e-4)


def test_snr_alignment():
    sigma = torch.tensor([0.01, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(sigma_from_snr(((1 - sigma) / sigma) ** 2), sigma)
    snr = torch.tensor([4.0, 1.0, 1 / 9], dtype=torch.float64)
    torch.testing.assert_close(sigma_from_snr(snr), torch.tensor([1 / 3, 0.5, 0.75], dtype=torch.float64))


def test_schedules_are_the_ones_they_are_named_after():
    """Quantiles against each work's own formula for the noise level, aligned by signal-to-noise ratio."""
    u = torch.tensor([0.1, 0.35, 0.5, 0.8, 0.95], dtype=torch.float64)
    z = torch.special.ndtri(u)
    sana = torch.sigmoid(z)
    rho = 7
    edm_noise = (80 ** (1 / rho) + (1 - 0.8 * u) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    snr = {
        "sid-dit": 1 / (torch.exp(1.6 * z) / 0.5) ** 2,
        "trigflow": 1 / (torch.exp(-1 + 1.4 * z) / 0.5) ** 2,
        "sana": ((1 - sana) / (3 * sana)) ** 2,
        "ddpm": alpha_bar((1000 * u).long() - 1) / (1 - alpha_bar((1000 * u).long() - 1)),
        "edm-training": 1 / torch.exp(-1.2 + 1.2 * z) ** 2,
        "edm-sampling": 1 / edm_noise**2,
    }
    assert snr.keys() == SCHEDULES.keys()
    for name, values in snr.items():
        quantiles = 1 / (1 + torch.sqrt(values))
        density = SCHEDULES[name].density(GRID)
        cumulative = torch.cumulative_trapezoid(density, GRID)
        found = GRID[1:][torch.searchsorted(cumulative, u * cumulative[-1])]
        # The continuous limit moves DDPM's quantiles by about half of one of its thousand steps.
        torch.testing.assert_close(found, quantiles, rtol=0, atol=1e-3 if name == "ddpm" else 1e-4)


def test_logit_normal_defaults_and_seeds():
    sigma = logit_normal(100_000, generator=seeded())
    assert sigma.dtype == torch.float32 and sigma.shape == (100_000,)
    assert 0 < sigma.min() and sigma.max() < 1
    logits = torch.logit(sigma.double())
    assert logits.mean().item() == pytest.approx(math.log(2), abs=0.02)
    assert logits.std().item() == pytest.approx(1.6, abs=0.02)
    assert torch.equal(sigma[:7], sigma_from_normal(torch.randn(100_000, generator=seeded()))[:7])
    assert torch.equal(logit_normal(5, generator=seeded(3)), logit_normal(5, generator=seeded(3)))
    z = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(torch.logit(sigma_from_normal(z, mean=0.5, std=2.0)), 0.5 + 2 * z)


def test_few_step_sigmas():
    assert few_step_sigmas(4).tolist() == [1, 0.75, 0.5, 0.25]
    assert few_step_sigmas(1).tolist() == [1]
    torch.testing.assert_close(few_step_sigmas(3), torch.tensor([1, 2 / 3, 1 / 3]))
    with pytest.raises(UserError, match="num_steps is 0"):
        few_step_sigmas(0)


def test_pi_is_the_normalised_product():
    schedule = SCHEDULES["sid-dit"]
    density, weight = schedule.density(GRID), 1 - GRID
    result = pi(GRID, density, weight)
    assert torch.trapezoid(result, GRID).item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(pi(GRID, 3 * density, 7 * weight), result)
    # Independently: mean and spread of pi are weighted moments of samples from p.
    samples = schedule.sample(400_000, seeded())
    for power in (1, 2):
        expected = ((1 - samples) * samples**power).mean() / (1 - samples).mean()
        assert torch.trapezoid(result * GRID**power, GRID).item() == pytest.approx(expected.item(), abs=2e-3)


def test_pi_in_closed_form():
    """p = 1 with w = (1 - sigma)^2 is the Beta(1, 3) distribution."""
    result = pi(GRID, torch.ones_like(GRID), (1 - GRID) ** 2)
    torch.testing.assert_close(result, 3 * (1 - GRID) ** 2, rtol=1e-4, atol=0)


def test_pi_refuses_the_end_points():
    grid = torch.linspace(0, 1, 11)
    with pytest.raises(ValueError, match="strictly inside"):
        pi(grid, torch.ones(11), 1 / grid)
