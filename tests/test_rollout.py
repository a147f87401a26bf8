# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.rollout import NOISE_TYPES, rollout


SHAPE = (3, 2, 4)


class Network(torch.nn.Module):
    """A velocity with memory of its calls: (sigma, was autograd recording)."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 4, dtype=dtype)
        self.calls = []

    def forward(self, x_t, sigma):
        assert sigma.shape == x_t.shape[:1] and not x_t.requires_grad
        self.calls.append((sigma.tolist(), torch.is_grad_enabled()))
        return torch.tanh(self.linear(x_t)) * (1 + sigma.view(-1, 1, 1))


class Noises:
    """Reproducible noise of each step, with memory of which were asked for."""

    def __init__(self, dtype=torch.float32):
        self.dtype, self.asked = dtype, []

    def __call__(self, i):
        self.asked.append(i)
        return torch.randn(SHAPE, generator=torch.Generator().manual_seed(i), dtype=self.dtype)


def by_hand(network, noise_type, k, sigmas=(1.0, 0.75, 0.5, 0.25)):
    """The formulas of SiD-DiT Eq. 16, prefix detached by hand rather than by no_grad."""
    dtype = network.linear.weight.dtype
    n, x, D = Noises(dtype)(0), None, torch.zeros(SHAPE, dtype=dtype)
    for i in range(k):
        if i > 0 and noise_type == "fresh":
            n = Noises(dtype)(i)
        if i > 0 and noise_type == "ddim":
            n = ((x - (1 - sigmas[i - 1]) * D) / sigmas[i - 1]).detach()
        x = (1 - sigmas[i]) * D.detach() + sigmas[i] * n
        D = x - sigmas[i] * network(x, torch.full((SHAPE[0],), sigmas[i], dtype=dtype))
    return D


@pytest.mark.parametrize("num_steps", [4, 2])
def test_fresh_equals_diffusers_stochastic_sampling(num_steps):
    network = Network()
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0, use_dynamic_shifting=False, shift_terminal=1 / num_steps, stochastic_sampling=True
    )
    scheduler.set_timesteps(num_inference_steps=num_steps)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(7)
        sample = randn_tensor(SHAPE, generator=generator)
        for t in scheduler.timesteps:
            velocity = network(sample, (t / 1000).expand(SHAPE[0]))
            sample = scheduler.step(velocity, t, sample, generator=generator).prev_sample
        generator = torch.Generator().manual_seed(7)
        ours = rollout(network, lambda i: randn_tensor(SHAPE, generator=generator), num_steps=num_steps)
    assert len(network.calls) == 2 * num_steps
    torch.testing.assert_close(ours, sample, rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("noise_type", NOISE_TYPES)
def test_value_and_gradient_equal_the_hand_computation(noise_type, k):
    network, reference = Network(torch.float64), Network(torch.float64)
    noises = Noises(torch.float64)
    x0 = rollout(network, noises, k=k, noise_type=noise_type)
    expected = by_hand(reference, noise_type, k)
    torch.testing.assert_close(x0, expected, rtol=0, atol=1e-12)
    x0.square().sum().backward()
    expected.square().sum().backward()
    for parameter, reference_parameter in zip(network.parameters(), reference.parameters()):
        assert parameter.grad.abs().max() > 1e-3
        torch.testing.assert_close(parameter.grad, reference_parameter.grad, rtol=0, atol=1e-12)
    # One recorded call, the k-th; nothing after it; no noise drawn that is not used.
    assert [sigma for sigma, _ in network.calls] == [[level] * 3 for level in (1.0, 0.75, 0.5, 0.25)[:k]]
    assert [recorded for _, recorded in network.calls] == [False] * (k - 1) + [True]
    assert noises.asked == (list(range(k)) if noise_type == "fresh" else [0])


def test_noise_types_differ_after_the_first_step():
    network = Network()
    with torch.no_grad():
        first = [rollout(network, Noises(), k=1, noise_type=noise_type) for noise_type in NOISE_TYPES]
        last = [rollout(network, Noises(), noise_type=noise_type) for noise_type in NOISE_TYPES]
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])
    assert all((last[i] - last[j]).abs().max() > 0.05 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_ddim_is_exact_on_a_straight_flow():
    """With one data point m, velocity (x_t - m) / sigma is exact, and every step must return m."""
    x0 = rollout(lambda x_t, sigma: (x_t - 0.3) / sigma.view(-1, 1, 1), Noises(torch.float64), noise_type="ddim")
    torch.testing.assert_close(x0, torch.full(SHAPE, 0.3, dtype=torch.float64))


def test_ddim_equals_the_euler_ode_step():
    """Renoising with the implied noise is one Euler step of the flow, x' = x + (sigma' - sigma) velocity."""
    network = Network(torch.float64)
    levels = [1.0, 0.75, 0.5, 0.25, 0.0]
    with torch.no_grad():
        x = Noises(torch.float64)(0)
        for sigma, following in zip(levels, levels[1:]):
            x = x + (following - sigma) * network(x, torch.full((3,), sigma, dtype=torch.float64))
        ours = rollout(network, Noises(torch.float64), noise_type="ddim")
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)


def test_callers_no_grad_is_respected():
    network = Network()
    with torch.no_grad():
        x0 = rollout(network, Noises(), k=3)
    assert not x0.requires_grad and not any(recorded for _, recorded in network.calls)


def test_gradient_survives_a_prefix_under_autocast():
    """Autocast's weight cache, filled under no_grad, must not cut the graph of step k."""
    network = Network()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            rollout(network, Noises(), k=1)
        x0 = rollout(network, Noises(), k=3)
    assert x0.dtype == torch.float32
    x0.sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())


def test_latents_and_sigma_are_at_least_float32():
    seen = []

    def velocity(x_t, sigma):
        seen.append((x_t.dtype, sigma.dtype))
        return x_t.to(torch.bfloat16)

    x0 = rollout(velocity, Noises(torch.bfloat16))
    assert x0.dtype == torch.float32 and set(seen) == {(torch.float32, torch.float32)}


@pytest.mark.parametrize("sigmas", [[1.0, 0.6, 0.2], torch.tensor([1.0, 0.6, 0.2], dtype=torch.float64)])
def test_given_sigmas_replace_the_grid(sigmas):
    network = Network(torch.float64)
    x0 = rollout(network, Noises(torch.float64), sigmas=sigmas)
    torch.testing.assert_close(x0, by_hand(network, "fresh", 3, (1.0, 0.6, 0.2)), rtol=0, atol=1e-12)


def test_misuse_is_refused():
    network = Network()
    with pytest.raises(UserError, match="unknown noise type 'none': choose one of 'fresh', 'fixed', 'ddim'"):
        rollout(network, Noises(), noise_type="none")
    with pytest.raises(UserError, match="num_steps is 0"):
        rollout(network, Noises(), num_steps=0)
    for k in (0, 5):
        with pytest.raises(ValueError, match="expected 1 to 4"):
            rollout(network, Noises(), k=k)
    for sigmas in ([], [0.9, 0.5], [1.0, 0.5, 0.5], [1.0, 0.5, 0.0]):
        with pytest.raises(ValueError, match="sigmas must start at 1"):
            rollout(network, Noises(), sigmas=sigmas)
    assert network.calls == []
