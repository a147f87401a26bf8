# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The SiD losses against Gaussian problems whose scores, gradients and divergences are known in closed form."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_flowdistill import flow
from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.timesteps import logit_normal
from hf_flowdistill.flow.weighting import WEIGHTINGS
from hf_flowdistill.losses import fake_score_loss, sid_generator_loss


TEACHER = (1.5, 0.7)  # mean and std of the teacher's data


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameter(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def posterior_mean(mean, std, sigma):
    """(slope, intercept) of E[x0 | x_t] = slope x_t + intercept for data N(mean, std^2)."""
    slope = (1 - sigma) * std**2 / ((1 - sigma) ** 2 * std**2 + sigma**2)
    return slope, mean - slope * (1 - sigma) * mean


def gaussian_loss(a, b, z, noise, sigma, fake, **options):
    """The loss of the generator x0 = a z + b, through x_t and both networks, as a training step computes it."""
    x0 = a * z + b
    x_t = flow.add_noise(x0, noise, sigma)
    predictions = []
    for mean, std in (TEACHER, fake):
        slope, intercept = posterior_mean(mean, std, flow.expand_like(sigma, x0))
        predictions.append(slope * x_t + intercept)
    return sid_generator_loss(x0, *predictions, sigma, **options)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("alpha", [1.0, 0.5, 1.2, 0.0])
def test_gradient_equals_the_analytic_one(alpha, weighting):
    z, noise, sigma = randn(16, 3, 2), randn(16, 3, 2, seed=1), torch.sigmoid(1.5 * randn(16, seed=2))
    a, b, fake, scale = parameter(1.1), parameter(-0.3), (0.4, 1.2), 100.0
    loss, _ = gaussian_loss(a, b, z, noise, sigma, fake, alpha=alpha, weighting=weighting, scale=scale)
    loss.backward()

    # By hand, with s = sigma: the gap is affine in x_t, x_t is affine in x0, and the weight is a constant.
    s = sigma.view(-1, 1, 1)
    x0 = (a * z + b).detach()
    x_t = (1 - s) * x0 + s * noise
    (slope_t, intercept_t), (slope_f, intercept_f) = posterior_mean(*TEACHER, s), posterior_mean(*fake, s)
    gap, gap_slope = (slope_t - slope_f) * x_t + intercept_t - intercept_f, (slope_t - slope_f) * (1 - s)
    other = slope_t * x_t + intercept_t - x0 - alpha * gap
    other_slope = slope_t * (1 - s) - 1 - alpha * gap_slope
    w = {
        "1-sigma": 1 - s,
        "(1-sigma)^2": (1 - s) ** 2,
        "1/sigma": s**-1,
        "1/sigma^2": s**-2,
        "(1-sigma)/sigma": (1 - s) / s,
        "((1-sigma)/sigma)^2": (1 - s) ** 2 / s**2,
        "1/mean|x0-x0_teacher|": 6 / (x0 - slope_t * x_t - intercept_t).abs().sum((1, 2), keepdim=True),
    }[weighting]
    gradient_x0 = scale / 16 * w * (gap_slope * other + gap * other_slope)
    assert loss.item() == pytest.approx((scale / 16 * w * gap * other).sum().item(), rel=1e-9)
    assert gradient_x0.sum().abs() > 1
    assert b.grad.item() == pytest.approx(gradient_x0.sum().item(), rel=1e-9)
    assert a.grad.item() == pytest.approx((gradient_x0 * z).sum().item(), rel=1e-9)


def four_points(sigma):
    """z, noise in {-1, 1}: the mean over these four rows is the exact expectation of anything quadratic in them."""
    z = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]], dtype=torch.float64)
    noise = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]], dtype=torch.float64)
    return z, noise, torch.full((4,), sigma, dtype=torch.float64)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_expected_gradient_in_closed_form(sigma):
    """Over all z and noise, from the moments of (x0, x_t): no autograd, no samples."""
    a, b, fake = parameter(1.1), parameter(-0.3), (0.4, 1.2)
    loss, _ = gaussian_loss(a, b, *four_points(sigma), fake, alpha=1.0, weighting="1-sigma", scale=1.0)
    loss.backward()
    (slope_t, intercept_t), (slope_f, intercept_f) = posterior_mean(*TEACHER, sigma), posterior_mean(*fake, sigma)
    c, d, r = slope_t - slope_f, intercept_t - intercept_f, 1 - sigma
    # E[(c x_t + d)(slope_f x_t + intercept_f - x0)], differentiated in a and b.
    square = c * slope_f * r**2 - c * r
    grad_b = 2 * square * b.item() + (c * intercept_f + d * slope_f) * r - d
    assert a.grad.item() == pytest.approx(r * 2 * square * a.item(), rel=1e-9)
    assert b.grad.item() == pytest.approx(r * grad_b, rel=1e-9)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_mean_descends_the_fisher_divergence(sigma, alpha):
    """With the fake score optimal and equal variances, the gradient is half that of E |x0_teacher - x0_fake|^2."""
    mean, std = TEACHER
    b = parameter(-0.3)
    loss, diagnostics = gaussian_loss(
        std, b, *four_points(sigma), (b.item(), std), alpha=alpha, weighting="1-sigma", scale=1.0
    )
    loss.backward()

    moving = parameter(b.item())
    slope, intercept = posterior_mean(mean, std, sigma)
    fake_slope, fake_intercept = posterior_mean(moving, std, sigma)
    assert slope == fake_slope
    divergence = (1 - sigma) * (intercept - fake_intercept) ** 2
    divergence.backward()
    assert b.grad.item() == pytest.approx(moving.grad.item() / 2, rel=1e-9)
    assert b.grad.item() < 0  # descending moves the mean up, towards the teacher's
    assert diagnostics["x0_gap"].item() == pytest.approx(abs(intercept - fake_intercept.item()), rel=1e-9)
    # E <gap, x0_fake - x0> vanishes under the optimal fake, which leaves (1 - alpha) E |gap|^2.
    assert loss.item() == pytest.approx((1 - alpha) * divergence.item(), abs=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_a_gaussian_generator_becomes_the_teacher(alpha):
    """Descent with an optimal fake score after every step, sigma from the training distribution."""
    a, b = parameter(0.3), parameter(-2.0)
    z, noise, _ = four_points(0.5)
    z, noise = z.repeat(16, 1), noise.repeat(16, 1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        sigma = logit_normal(16, generator=generator, dtype=torch.float64).repeat_interleave(4)
        loss, _ = gaussian_loss(a, b, z, noise, sigma, (b.item(), a.item()), alpha=alpha, scale=1.0)
        gradients = torch.autograd.grad(loss, (a, b))
        with torch.no_grad():
            a -= 0.5 * gradients[0]
            b -= 0.5 * gradients[1]
    assert b.item() == pytest.approx(TEACHER[0], abs=1e-3)
    assert a.item() == pytest.approx(TEACHER[1], abs=1e-3)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_nothing_to_learn_when_fake_equals_teacher(alpha, weighting):
    def run(fake_factor):
        x0 = randn(8, 2, 3).requires_grad_()
        sigma = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
        x_t = flow.add_noise(x0, randn(8, 2, 3, seed=1), sigma)
        teacher, fake = torch.tanh(x_t), fake_factor * torch.tanh(x_t)
        loss, diagnostics = sid_generator_loss(x0, teacher, fake, sigma, alpha=alpha, weighting=weighting)
        (gradient,) = torch.autograd.grad(loss, x0)
        return loss.item(), diagnostics["x0_gap"].item(), gradient.abs()

    loss, x0_gap, gradient = run(fake_factor=1.0)
    assert loss == 0 and x0_gap == 0 and gradient.max() == 0
    loss, x0_gap, gradient = run(fake_factor=0.9)
    assert loss != 0 and x0_gap > 0 and gradient.min() > 0


def test_exact_sample_does_not_give_nan():
    """x0 == x0_teacher makes the error weight's denominator zero."""
    x0 = randn(2, 4)
    loss, _ = sid_generator_loss(x0, x0, x0 + 1, torch.tensor([0.5, 0.5]), weighting="1/mean|x0-x0_teacher|")
    assert loss.isfinite()


def test_gradient_reaches_all_three_predictions_and_not_the_weight():
    tensors = [randn(2, 3, seed=seed).requires_grad_() for seed in range(3)]
    sigma = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
    x0, teacher, fake = (tensor.detach() for tensor in tensors)
    loss, diagnostics = sid_generator_loss(*tensors, sigma, alpha=0.7, weighting="1/mean|x0-x0_teacher|", scale=2.0)
    loss.backward()
    assert sigma.grad is None and not any(value.requires_grad for value in diagnostics.values())
    w = 2.0 / 2 / (x0 - teacher).abs().mean(1, keepdim=True)
    gap = teacher - fake
    torch.testing.assert_close(tensors[0].grad, -w * gap)
    torch.testing.assert_close(tensors[1].grad, w * ((teacher - x0 - 0.7 * gap) + gap * 0.3))
    torch.testing.assert_close(tensors[2].grad, w * (-(teacher - x0 - 0.7 * gap) + 0.7 * gap))


def test_sum_over_elements_mean_over_batch_and_diagnostics():
    shape = (2, 3, 4, 5)
    x0, teacher, fake = torch.full(shape, 1.0), torch.full(shape, 4.0), torch.full(shape, 2.0)
    loss, diagnostics = sid_generator_loss(x0, teacher, fake, torch.tensor([0.25, 0.75]))
    assert loss.item() == pytest.approx(100 * (0.75 + 0.25) / 2 * 60 * 2 * (2 - 1))
    assert {name: value.item() for name, value in diagnostics.items()} == {
        "x0_gap": 2,
        "weight": 0.5,
        "x0_mean": 1,
        "x0_std": 0,
        "x0_peak": 1,
        "x0_teacher_mean": 4,
        "x0_teacher_std": 0,
    }


def test_fake_score_loss():
    prediction, x0, noise = (randn(2, 3, 4, seed=seed).requires_grad_() for seed in range(3))
    loss, diagnostics = fake_score_loss(prediction, x0, noise)
    error = (prediction - (noise - x0)).detach()
    assert loss.item() == pytest.approx((error**2).sum().item() / 2)
    assert diagnostics["fake_score_error"].item() == pytest.approx((error**2).mean().item())
    loss.backward()
    torch.testing.assert_close(prediction.grad, error)
    assert x0.grad is None and noise.grad is None


def test_fake_score_loss_is_least_at_the_conditional_expectation():
    """Regressing on Gaussian samples finds the closed-form slope and intercept of E[velocity | x_t]."""
    mean, std, level = 0.5, 0.8, 0.4
    z, noise, sigma = four_points(level)
    x0 = std * z + mean
    x_t = flow.add_noise(x0, noise, sigma)
    slope, intercept = posterior_mean(mean, std, level)
    best = parameter([(1 - slope) / level, -intercept / level])  # velocity = (x_t - E[x0 | x_t]) / sigma
    loss, _ = fake_score_loss(best[0] * x_t + best[1], x0, noise)
    (gradient,) = torch.autograd.grad(loss, best)
    assert gradient.abs().max().item() < 1e-12


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_inputs_give_float32_losses(autocast):
    x0, teacher, noise = (randn(2, 64, 64, seed=seed).to(torch.bfloat16) for seed in range(3))
    fake = (teacher.float() + 0.01).to(torch.bfloat16)
    sigma = torch.tensor([0.999, 0.3])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, diagnostics = sid_generator_loss(x0, teacher, fake, sigma)
        fake_loss, fake_diagnostics = fake_score_loss(teacher, x0, noise)
    values = [loss, fake_loss, *diagnostics.values(), *fake_diagnostics.values()]
    assert all(value.dtype == torch.float32 for value in values)
    double = [tensor.double() for tensor in (x0, teacher, fake, sigma)]
    expected, expected_fake = sid_generator_loss(*double)[0], fake_score_loss(double[1], double[0], noise.double())[0]
    assert expected.dtype == expected_fake.dtype == torch.float64
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert fake_loss.item() == pytest.approx(expected_fake.item(), rel=1e-5)


def test_misuse_is_refused():
    x, sigma = torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(UserError, match="unknown weighting"):
        sid_generator_loss(x, x, x, sigma, weighting="one")
    for bad in ((x, x[:1], x, sigma), (x, x, x[:, :1], sigma), (x, x, x, sigma[:, None]), (x, x, x, sigma[0])):
        with pytest.raises(ValueError, match="share one shape"):
            sid_generator_loss(*bad)
    with pytest.raises(ValueError, match="share one shape"):
        fake_score_loss(x, x[:1], x)


def test_losses_need_nothing_but_torch():
    source = Path(__file__).parents[1] / "src"
    code = (
        f"import sys, torch; sys.path.insert(0, {str(source)!r}); before = set(sys.modules);"
        "import hf_flowdistill.losses;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names) - {'torch'}), 'diffusers' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split("\n")[0] == "['hf_flowdistill'] False"
