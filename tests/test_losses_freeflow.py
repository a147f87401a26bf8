# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""FreeFlow's losses against flows that are known in closed form, in float64."""

import math

import pytest
import torch

from hf_flowdistill import flow
from hf_flowdistill.flow.jumps import jump_from_normal, land, noisier, step_velocity, uniform_from_normal
from hf_flowdistill.losses import freeflow


MODES = {  # means, standard deviations, weights of mixtures in one dimension
    "gaussian": ([1.5], [0.7], [1.0]),
    "two modes": ([-1.2, 0.9], [0.35, 0.6], [0.4, 0.6]),
}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Mixture:
    """Data that is a mixture of Gaussians: its velocity, and its flow from noise, by quantiles."""

    def __init__(self, name):
        self.mean, self.std, self.weight = (torch.tensor(values, dtype=torch.float64) for values in MODES[name])

    def modes(self, sigma):
        sigma = sigma[..., None]
        return (1 - sigma) * self.mean, ((1 - sigma) ** 2 * self.std**2 + sigma**2).sqrt()

    def velocity(self, x_t, sigma):
        """E[noise - x0 | x_t], [B, 1] and [B]."""
        x, sigma = x_t, sigma.reshape(-1, 1)
        mean, spread = self.modes(sigma)
        distance = (x[..., None] - mean) / spread
        share = torch.softmax(self.weight.log() - spread.log() - distance**2 / 2, -1)
        s = sigma[..., None]
        slope = (s - (1 - s) * self.std**2) / spread**2  # cov(noise - x0, x_t) / var(x_t) in a mode
        return (share * (slope * (x[..., None] - mean) - self.mean)).sum(-1)

    def flow(self, z, jump):
        """Where the flow takes z [B, 1] from sigma 1 to 1 - jump: to the same quantile."""
        mean, spread = self.modes((1 - jump).reshape(-1, 1))
        low, high = torch.full_like(z, -60.0), torch.full_like(z, 60.0)
        # the smaller tail, whose quantiles keep their digits
        sign = torch.where(z > 0, -1.0, 1.0).to(z)
        target = torch.special.ndtr(sign * z)
        for _ in range(200):
            middle = (low + high) / 2
            tail = (self.weight * torch.special.ndtr(sign[..., None] * (middle[..., None] - mean) / spread)).sum(-1)
            up = torch.where(sign > 0, tail < target, tail > target)
            low, high = torch.where(up, middle, low), torch.where(up, high, middle)
        return (low + high) / 2

    def average(self, z, jump):
        """The optimal flow map's V(z, jump), for jumps above 0."""
        return (z - self.flow(z, jump)) / jump.reshape(-1, 1)


def derivative(function, jump, step=1e-4):
    """Of fourth order."""
    one, two = (function(jump + h) - function(jump - h) for h in (step, 2 * step))
    return (8 * one - two) / (12 * step)


@pytest.fixture(params=MODES)
def mixture(request):
    return Mixture(request.param)


JUMPS = torch.tensor([0.1, 0.3, 0.5, 0.8, 0.95], dtype=torch.float64)
Z = torch.tensor([[-1.7], [-0.4], [0.2], [0.9], [2.1]], dtype=torch.float64)


def test_the_optimal_flow_map_has_no_loss_and_no_gradient(mixture):
    velocity = mixture.average(Z, JUMPS).requires_grad_()
    slope = derivative(lambda jump: mixture.average(Z, jump), JUMPS)
    teacher = mixture.velocity(land(Z, velocity, JUMPS), 1 - JUMPS)
    gap = freeflow.continuous_gap(velocity, slope, teacher, JUMPS)
    loss = freeflow.gap_loss(velocity, freeflow.power_law(gap, 0.0)).mean()
    loss.backward()
    assert gap.abs().max() < 1e-8 and loss.item() < 1e-16 and velocity.grad.abs().max() < 1e-8
    # and another map has some
    assert freeflow.continuous_gap(velocity + 0.1, slope, teacher, JUMPS).abs().min() > 0.05


def test_one_jump_of_the_optimal_map_makes_the_data(mixture):
    """x0 is the data's quantile of z, and so its noising velocity is the teacher's."""
    jump = torch.ones(5, dtype=torch.float64)
    x0 = land(Z, mixture.average(Z, jump), jump)
    tail = (mixture.weight * torch.special.ndtr((x0 - mixture.mean) / mixture.std)).sum(-1)
    assert torch.allclose(tail, torch.special.ndtr(Z[:, 0]), atol=1e-12)


def test_the_sign_is_minus_the_papers(mixture):
    """FreeFlow's F and u are minus ours: f = z + delta F, and F + delta dF = u(f, 1 - delta), its Eq. 7."""
    F = -mixture.average(Z, JUMPS)
    f = Z + JUMPS[:, None] * F
    assert torch.equal(f, land(Z, -F, JUMPS))
    u = -mixture.velocity(f, 1 - JUMPS)
    assert torch.allclose(derivative(lambda jump: mixture.flow(Z, jump), JUMPS), u, atol=1e-8)
    ours = mixture.average(Z, JUMPS).requires_grad_()
    theirs = (-ours.detach()).requires_grad_()
    other = randn(5, 1, seed=3)
    gap = freeflow.continuous_gap(ours, other, -u, JUMPS)
    freeflow.gap_loss(ours, gap).sum().backward()
    gap_of_paper = theirs.detach() - JUMPS[:, None] * other - u
    (theirs * gap_of_paper).sum().backward()  # Eq. 9
    assert torch.allclose(ours.grad, -theirs.grad)  # which moves f the same way


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_discrete_gap_tends_to_zero_at_the_solvers_order(mixture, solver, order):
    """At the optimal map it is the solver's local error over its step: of order p."""
    before = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    errors = []
    for count in (64, 128):
        length = torch.full_like(before, 1 / count)
        jump, start = before + length, mixture.flow(Z, before)
        at_start = torch.where(before[:, None] > 0, mixture.average(Z, before.clamp(min=0.1)), torch.zeros_like(Z))
        teacher = step_velocity(mixture.velocity, start, 1 - before, length, solver)
        gap = freeflow.discrete_gap(mixture.average(Z, jump), at_start, teacher, jump, before)
        errors.append(gap.abs().mean().item())
    assert 0 < errors[1] < 0.05 and math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_the_discrete_gap_tends_to_the_continuous_one(mixture):
    """For a map that is none of the teacher's, and the gradient of its loss with it."""

    def student(jump):
        return torch.sin(2 * jump[:, None] + Z) + Z

    slope = 2 * torch.cos(2 * JUMPS[:, None] + Z)
    teacher = mixture.velocity(land(Z, student(JUMPS), JUMPS), 1 - JUMPS)
    continuous = freeflow.continuous_gap(student(JUMPS), slope, teacher, JUMPS)
    differences = []
    for count in (200, 400):
        jump = JUMPS + 1 / count
        gap = freeflow.discrete_gap(student(jump), student(JUMPS), teacher, jump, JUMPS)
        differences.append((gap - continuous).abs().max().item())
    assert differences[0] / differences[1] == pytest.approx(2, rel=0.02) and differences[1] < 0.02


def test_the_jvp_is_the_finite_difference():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.SiLU(), torch.nn.Linear(32, 1)).double()

    def student(jump):
        return network(torch.cat([Z, jump[:, None]], 1))

    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(JUMPS, torch.ones_like(JUMPS))
        tangent = torch.autograd.forward_ad.unpack_dual(student(dual)).tangent.clone()
    assert torch.allclose(tangent, derivative(student, JUMPS).detach(), atol=1e-9)
    assert torch.allclose(tangent, torch.func.jvp(student, (JUMPS,), (torch.ones_like(JUMPS),))[1], atol=1e-14)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_the_corrections_gradient_is_that_of_the_divergence(sigma):
    """x0 = a z + b, and the fake score knows it: the Kullback-Leibler divergence of two Gaussians, without its factor
    (1 - sigma)^2 / sigma. Over z and noise in {-1, 1} expectations are exact, since all is linear in them."""
    mean, std = 1.5, 0.7
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (1.1, -0.3))
    z = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]], dtype=torch.float64)
    noise = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]], dtype=torch.float64)
    level = torch.full((4,), sigma, dtype=torch.float64)

    def velocity(m, s, x_t):
        slope = (sigma - (1 - sigma) * s**2) / ((1 - sigma) ** 2 * s**2 + sigma**2)
        return slope * (x_t - (1 - sigma) * m) - m

    network = z - (a * z + b)  # V(z, 1)
    x_t = flow.add_noise(land(z, network, torch.ones_like(level)), noise, level)
    gap = freeflow.correction_gap(velocity(b, a, x_t), velocity(mean, std, x_t))
    freeflow.gap_loss(network, gap).mean().backward()

    moving = [parameter.detach().clone().requires_grad_() for parameter in (a, b)]
    fake, real = ((1 - sigma) ** 2 * s**2 + sigma**2 for s in (moving[0], std))
    shift = (1 - sigma) * (moving[1] - mean)
    divergence = ((real / fake).log() + (fake + shift**2) / real - 1) / 2
    divergence.backward()
    factor = (1 - sigma) ** 2 / sigma
    assert factor * a.grad.item() == pytest.approx(moving[0].grad.item(), rel=1e-9)
    assert factor * b.grad.item() == pytest.approx(moving[1].grad.item(), rel=1e-9)
    assert b.grad.item() < 0  # descending moves the mean up, towards the teacher's


def test_k_damps_large_gaps_and_keeps_their_direction():
    gap = randn(3, 4, 5)
    gap[1], gap[2] = 10 * gap[0], 1e-6 * gap[0]
    assert torch.equal(freeflow.power_law(gap, 0.0), gap)
    squares = gap.square().mean((1, 2))
    for k in (0.5, 1.0):
        velocity = randn(3, 4, 5, seed=1).requires_grad_()
        freeflow.gap_loss(velocity, freeflow.power_law(gap, k)).sum().backward()
        expected = gap / (squares + 1e-4)[:, None, None] ** k
        assert torch.allclose(velocity.grad, expected)
        ratio = (velocity.grad[1].norm() / velocity.grad[0].norm()).item()
        assert ratio == pytest.approx(10 ** (1 - 2 * k), rel=1e-3)
        # the norm is of an element: more elements of the same size weigh the same
        twice = freeflow.power_law(torch.cat([gap, gap], 2), k)
        assert torch.allclose(twice[..., :5], expected)


def test_lambda_makes_the_corrections_share_of_the_gradient():
    """With alpha .3 and a quarter of the batch, a tenth of the prediction's: App. A.3."""
    velocity = randn(8, 6, seed=4).requires_grad_()
    prediction, correction = freeflow.power_law(randn(6, 6), 1.0), 40 * randn(2, 6, seed=5)
    sizes = (freeflow.norms(prediction).mean().item(), freeflow.norms(correction).mean().item())
    weight = freeflow.balance(0.3, *sizes)
    losses = (
        freeflow.gap_loss(velocity[:6], prediction).sum() + weight * freeflow.gap_loss(velocity[6:], correction).sum()
    )
    losses.backward()
    shares = [velocity.grad[rows].norm(dim=1).sum().item() for rows in (slice(6, 8), slice(6))]
    assert shares[0] / shares[1] == pytest.approx(0.3 * 2 / 6, rel=1e-5)
    assert freeflow.balance(0.3, 1.0, 0.0) == pytest.approx(3e5)


def test_alpha_waits_rises_and_decays():
    settings = {"delay": 100, "warmup": 50}
    values = [freeflow.alpha_at(images, 0.6, **settings) for images in (0, 99, 100, 125, 150, 10_000)]
    assert values == pytest.approx([0, 0, 0, 0.3, 0.6, 0.6])
    assert freeflow.alpha_at(1000, 0.6, **settings, decay=250) == pytest.approx(0.3)
    assert freeflow.alpha_at(200, 0.6, **settings, decay=250) == pytest.approx(0.6)
    assert freeflow.alpha_at(0, 0.6) == 0.6


@pytest.mark.parametrize("level", [0.3, 0.7, 1.0])
def test_noisier_states_have_the_distribution_of_the_path(mixture, level):
    """Their mean and variance, from those of x_t and of the noise; x_t at a higher level stays, also at sigma 1."""
    sigma = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    first, second = (noisier(Z, value + 0 * Z, sigma, level) for value in (0.0, 1.0))
    share, spread = (first / Z)[:, 0], (second - first)[:, 0]
    below = sigma < level
    assert torch.equal(first[~below], Z[~below]) and not spread[~below].any() and first.isfinite().all()
    mean, deviation = (mixture.weight * mixture.mean).sum(), 1.3
    for i in below.nonzero().flatten().tolist():
        s = sigma[i]
        assert share[i] * (1 - s) * mean == pytest.approx((1 - level) * mean.item())
        variance = share[i] ** 2 * ((1 - s) ** 2 * deviation**2 + s**2) + spread[i] ** 2
        assert variance.item() == pytest.approx((1 - level) ** 2 * deviation**2 + level**2)
    assert [freeflow.confident_level(images, 100) for images in (0, 25, 100, 1000)] == [1, 0.75, 0, 0]
    assert freeflow.confident_level(0, 0) == 0


def test_lengths_of_jumps():
    z, chance = randn(20_000), randn(20_000, seed=1)
    uniform = uniform_from_normal(z)
    assert 0 <= uniform.min() and uniform.max() <= 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01) and uniform.std().item() == pytest.approx(
        12**-0.5, abs=0.01
    )
    free = jump_from_normal(z, chance, mean=-0.4, std=1.2)
    assert (free == 0).double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.logit(free[free > 0]).mean().item() == pytest.approx(-0.4, abs=0.03)
    stepped = jump_from_normal(z, chance, mean=-0.4, std=1.2, num_jumps=8)
    assert set((8 * stepped).tolist()) == set(range(8))
    assert ((free - stepped >= 0) & (free - stepped < 1 / 8)).all()
    assert jump_from_normal(torch.full((1,), 50.0), torch.ones(1), num_jumps=8).item() == 7 / 8


def test_low_precision_is_not_computed_in():
    velocity = randn(2, 3).bfloat16().requires_grad_()
    gap = freeflow.correction_gap(velocity, velocity + 1)
    assert gap.dtype == torch.float32 and freeflow.gap_loss(velocity, gap).dtype == torch.float32
