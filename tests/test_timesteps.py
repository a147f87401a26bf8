# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
import math

import pytest
import torch

from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.timesteps import few_step_sigmas, logit_normal, pi, sigma_from_normal


GRID = torch.linspace(0, 1, 400_001, dtype=torch.float64)[1:-1]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


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
    # p(sigma) of logit(sigma) ~ N(ln 2, 1.6^2)
    normal = torch.distributions.Normal(math.log(2), 1.6)
    density, weight = torch.exp(normal.log_prob(torch.logit(GRID))) / (GRID * (1 - GRID)), 1 - GRID
    result = pi(GRID, density, weight)
    assert torch.trapezoid(result, GRID).item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(pi(GRID, 3 * density, 7 * weight), result)
    # Independently: mean and spread of pi are weighted moments of samples from p.
    samples = logit_normal(400_000, generator=seeded(), dtype=torch.float64)
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
