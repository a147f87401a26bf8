# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
import math

import pytest
import torch

from hf_flowdistill import flow


SHAPES = [(64,), (64, 3), (64, 4, 5, 2)]
PAIRS = {
    "x0": (flow.x0_from_velocity, flow.velocity_from_x0),
    "noise": (flow.noise_from_velocity, flow.velocity_from_noise),
    "score": (flow.score_from_velocity, flow.velocity_from_score),
    "v_prediction": (flow.v_prediction_from_velocity, flow.velocity_from_v_prediction),
    "trigflow_output": (flow.trigflow_output_from_velocity, flow.velocity_from_trigflow_output),
}


def make_sample(shape=(64, 4, 5, 2)):
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    sigma = 0.02 + 0.96 * torch.rand(shape[0], generator=generator, dtype=torch.float64)
    return x0, noise, sigma, flow.add_noise(x0, noise, sigma)


def column(sigma, x):
    return sigma.view(-1, *[1] * (x.ndim - 1))


def assert_close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PAIRS)
def test_every_parameterisation_round_trips_through_velocity(name, shape):
    x0, noise, sigma, x_t = make_sample(shape)
    from_velocity, to_velocity = PAIRS[name]
    velocity = flow.velocity(x0, noise)
    converted = from_velocity(x_t, velocity, sigma)
    assert_close(to_velocity(x_t, converted, sigma), velocity)
    anything = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_close(from_velocity(x_t, to_velocity(x_t, anything, sigma), sigma), anything)


def test_conversions_recover_the_definitions_of_a_sample():
    x0, noise, sigma, x_t = make_sample()
    velocity, s = flow.velocity(x0, noise), column(sigma, x0)
    angle = torch.atan(s / (1 - s))
    assert_close(x_t, x0 + s * (noise - x0))
    assert_close(flow.x0_from_velocity(x_t, velocity, sigma), x0)
    assert_close(flow.noise_from_velocity(x_t, velocity, sigma), noise)
    assert_close(flow.score_from_velocity(x_t, velocity, sigma), -noise / s)
    assert_close(flow.v_prediction_from_velocity(x_t, velocity, sigma), (1 - s) * noise - s * x0)
    trigflow_output = torch.cos(angle) * noise - torch.sin(angle) * x0
    assert_close(flow.trigflow_output_from_velocity(x_t, velocity, sigma), trigflow_output)


def test_conversions_agree_with_gaussian_conditional_expectations():
    """Data N(m, s^2): the marginal score, E[x0 | x_t] and E[noise | x_t] are known without the maps under test."""
    mean, std = 0.7, 1.3
    _, _, sigma, x_t = make_sample((64, 3))
    s = column(sigma, x_t)
    x_t = x_t.requires_grad_()
    variance = (1 - s) ** 2 * std**2 + s**2
    log_density = -((x_t - (1 - s) * mean) ** 2) / (2 * variance)
    (score,) = torch.autograd.grad(log_density.sum(), x_t)
    residual = x_t.detach() - (1 - s) * mean
    expected_x0 = mean + (1 - s) * std**2 / variance * residual
    expected_noise = s / variance * residual
    x_t = x_t.detach()

    velocity = expected_noise - expected_x0
    assert_close(flow.velocity_from_score(x_t, score, sigma), velocity)
    assert_close(flow.score_from_velocity(x_t, velocity, sigma), score)
    assert_close(flow.velocity_from_x0(x_t, expected_x0, sigma), velocity)
    assert_close(flow.x0_from_velocity(x_t, velocity, sigma), expected_x0)
    assert_close(flow.velocity_from_noise(x_t, expected_noise, sigma), velocity)
    assert_close(flow.noise_from_velocity(x_t, velocity, sigma), expected_noise)
    expected_v = (1 - s) * expected_noise - s * expected_x0
    assert_close(flow.velocity_from_v_prediction(x_t, expected_v, sigma), velocity)
    expected_output = expected_v / torch.sqrt(s**2 + (1 - s) ** 2)
    assert_close(flow.velocity_from_trigflow_output(x_t, expected_output, sigma), velocity)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_trigflow_against_its_definition(sigma_data):
    """Corrupt and predict on TrigFlow's own circle; arrive at the rectified flow of the same x0 and noise."""
    x0, noise, _, _ = make_sample((64, 3))
    angle = torch.linspace(0.01, math.pi / 2 - 0.01, 64, dtype=torch.float64)
    t = column(angle, x0)
    x_trig = torch.cos(t) * sigma_data * x0 + torch.sin(t) * sigma_data * noise
    output = torch.cos(t) * noise - torch.sin(t) * x0

    sigma = flow.trigflow_to_sigma(angle)
    assert_close(sigma / (1 - sigma), torch.tan(angle))
    assert_close(flow.sigma_to_trigflow(sigma), angle)
    x_t = flow.trigflow_to_rectified(x_trig, sigma, sigma_data)
    assert_close(x_t, flow.add_noise(x0, noise, sigma))
    assert_close(flow.rectified_to_trigflow(x_t, sigma, sigma_data), x_trig)
    assert_close(flow.velocity_from_trigflow_output(x_t, output, sigma), noise - x0)


def test_trigflow_conditional_expectation():
    """The best TrigFlow output, by regression on exact Gaussian moments, is the best velocity in other clothes."""
    mean, std, sigma_data = -0.4, 0.8, 0.5
    angle = torch.tensor([0.2, 0.8, 1.4], dtype=torch.float64)
    cos, sin = torch.cos(angle), torch.sin(angle)
    x_trig = torch.tensor([0.3, -1.1, 2.0], dtype=torch.float64)
    variance = sigma_data**2 * (cos**2 * std**2 + sin**2)
    covariance = sigma_data * (cos * sin - sin * cos * std**2)  # of the target and x_trig
    output = -sin * mean + covariance / variance * (x_trig - sigma_data * cos * mean)

    sigma = flow.trigflow_to_sigma(angle)
    x_t = flow.trigflow_to_rectified(x_trig, sigma, sigma_data)
    marginal = (1 - sigma) ** 2 * std**2 + sigma**2
    slope = (sigma - (1 - sigma) * std**2) / marginal  # of E[noise - x0 | x_t]
    velocity = -mean + slope * (x_t - (1 - sigma) * mean)
    assert_close(flow.velocity_from_trigflow_output(x_t, output, sigma), velocity)
    assert_close(flow.trigflow_output_from_velocity(x_t, velocity, sigma), output)


def test_ends_of_the_interval():
    x0, noise, _, _ = make_sample((2, 3))
    sigma = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x_t = flow.add_noise(x0, noise, sigma)
    velocity = flow.velocity(x0, noise)
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[1], noise[1])
    assert_close(flow.x0_from_velocity(x_t, velocity, sigma), x0)
    assert_close(flow.noise_from_velocity(x_t, velocity, sigma), noise)
    for from_velocity, to_velocity in (PAIRS["v_prediction"], PAIRS["trigflow_output"]):
        assert_close(to_velocity(x_t, from_velocity(x_t, velocity, sigma), sigma), velocity)
    assert_close(flow.sigma_to_trigflow(sigma), torch.tensor([0.0, math.pi / 2], dtype=torch.float64))
    assert_close(flow.trigflow_to_sigma(flow.sigma_to_trigflow(sigma)), sigma)
    # Documented as not finite, rather than clamped.
    assert not flow.score_from_velocity(x_t, velocity, sigma)[0].isfinite().any()
    assert not flow.velocity_from_x0(x_t, x0, sigma)[0].isfinite().any()
    assert not flow.velocity_from_noise(x_t, noise, sigma)[1].isfinite().any()


def test_guidance_commutes_with_conversion():
    x0, noise, sigma, x_t = make_sample()
    unconditional, conditional = flow.velocity(x0, noise), 0.3 * noise + x0
    guided = flow.guide(unconditional, conditional, 4.5)
    assert_close(guided, 4.5 * conditional - 3.5 * unconditional)
    assert_close(flow.guide(unconditional, conditional, 1.0), conditional)
    assert_close(flow.guide(unconditional, conditional, 0.0), unconditional)
    for from_velocity, _ in PAIRS.values():
        parts = (from_velocity(x_t, part, sigma) for part in (unconditional, conditional))
        assert_close(flow.guide(*parts, 4.5), from_velocity(x_t, guided, sigma))


def test_rescaled_guidance_has_the_contrast_asked_for():
    x0, noise, sigma, x_t = make_sample()
    unconditional, conditional = flow.velocity(x0, noise), 0.3 * noise + x0
    guided = flow.guide(unconditional, conditional, 4.5)

    def x0_of(velocity):
        return flow.x0_from_velocity(x_t, velocity, sigma)

    def contrast(velocity):
        return x0_of(velocity).flatten(1).std(1)

    for factor in (0.0, 0.3, 1.0):
        rescaled = flow.rescale_guidance(guided, conditional, x_t, sigma, factor)
        wanted = (1 - factor) * contrast(guided) + factor * contrast(conditional)
        assert_close(contrast(rescaled), wanted)
        ratio = flow.expand_like(wanted / contrast(guided), x_t)
        assert_close(x0_of(rescaled), ratio * x0_of(guided))


def test_sigma_is_per_sample_and_keeps_its_precision():
    x = torch.zeros(3, 3, dtype=torch.bfloat16)
    sigma = torch.tensor([0.999, 0.5, 0.1])
    assert flow.expand_like(sigma, x).shape == (3, 1)
    x_t = flow.add_noise(x, torch.ones_like(x), sigma)
    assert x_t.dtype == torch.float32 and torch.equal(x_t, sigma[:, None].expand(3, 3))
    for bad in (torch.ones(2), torch.ones(3, 1), torch.tensor(0.5)):
        with pytest.raises(ValueError, match="expected \\(3,\\)"):
            flow.expand_like(bad, x)
