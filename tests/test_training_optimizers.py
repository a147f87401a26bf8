# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
import math

import pytest
import torch

from hf_flowdistill.training.optimizers import (
    apply_update,
    build_optimizer,
    learning_rate_factor,
    round_stochastically,
)


def test_schedules_count_images():
    def factors(schedule, warmup=0):
        rule = {"batch_size": 50, "warmup": warmup, "end": 400}
        return [learning_rate_factor(schedule, seen, **rule) for seen in (0, 100, 200, 300, 400, 500)]

    assert factors("constant") == [1] * 6
    assert factors("linear") == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0])
    assert factors("cosine") == pytest.approx([(1 + math.cos(math.pi * x)) / 2 for x in (0, 0.25, 0.5, 0.75, 1, 1)])
    assert factors("constant", warmup=200) == pytest.approx([0.25, 0.75, 1, 1, 1, 1])
    assert factors("linear", warmup=200) == pytest.approx([0.25, 0.75, 1, 0.5, 0, 0])


def one_weight(gradient):
    network = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    network.weight.grad = torch.tensor([gradient])
    return network, build_optimizer(network)


def test_an_update_is_adam_without_momentum():
    network, optimizer = one_weight([3.0, -4.0])
    taken, norm = apply_update(optimizer, loss=1.0, learning_rate=0.1)
    assert taken and norm == 5
    assert torch.allclose(network.weight, torch.tensor([[-0.1, 0.1]]))
    assert network.weight.grad is None
    network.weight.grad = torch.tensor([[0.0, 4.0]])
    apply_update(optimizer, loss=1.0, learning_rate=0.1)
    assert network.weight[0, 0].item() == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("gradient", "loss"), [([math.nan, 1.0], 1.0), ([math.inf, 1.0], 1.0), ([1.0, 1.0], math.nan)]
)
def test_what_is_not_finite_is_not_taken(gradient, loss):
    network, optimizer = one_weight(gradient)
    taken, norm = apply_update(optimizer, loss=loss, learning_rate=0.1)
    assert not taken and (math.isfinite(norm) == math.isfinite(sum(gradient)))
    assert not network.weight.any() and network.weight.grad is None and not optimizer.state


def test_clipping_scales_and_the_norm_is_that_before():
    network, optimizer = one_weight([3.0, -4.0])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(network.weight.grad.clone()))
    taken, norm = apply_update(optimizer, loss=1.0, learning_rate=0.1, max_grad_norm=1.0)
    assert norm == 5 and torch.allclose(seen[0], torch.tensor([[0.6, -0.8]]), atol=1e-5)


def test_rounding_is_to_a_neighbour_and_right_on_average():
    weights = torch.linspace(-3, 3, 1001)[:-1] * torch.tensor([1e-3, 1.0, 1e3])[:, None]
    nearest, total = weights.bfloat16(), torch.zeros_like(weights, dtype=torch.float64)
    spacing = 2.0**-7 * torch.where(
        weights == 0, 1.0, 2.0 ** weights.abs().log2().floor()
    )  # of bfloat16 numbers there
    for draw in range(400):
        rounded = torch.empty_like(nearest)
        round_stochastically(weights.clone(), rounded, draw)
        assert ((rounded.float() - weights).abs() < spacing).all()
        total += rounded.double()
    error = (total / 400 - weights) / spacing
    assert error.abs().max() < 6 * 0.5 / 400**0.5 and error.mean().abs() < 1e-3
    kept = torch.empty_like(nearest)
    round_stochastically(nearest.float(), kept, 0)
    assert torch.equal(kept, nearest)


def trained(weight, rounding="stochastic", dtype=torch.bfloat16, steps=200, gradient=1e-3, **settings):
    """Weights of one size after steps of 1e-5 along a steady gradient: their mean way, and the optimizer."""
    network = torch.nn.Linear(128, 64, bias=False).to(dtype)
    torch.nn.init.constant_(network.weight, weight)
    start = network.weight.detach().double().clone()
    optimizer = build_optimizer(network, epsilon=1e-4, rounding=rounding, **settings)
    for _ in range(steps):
        network.weight.grad = torch.full_like(network.weight, gradient)
        apply_update(optimizer, loss=0.0, learning_rate=1e-5)
    return (network.weight.detach().double() - start).mean().item(), network, optimizer


@pytest.mark.parametrize("use_8bit_adam", [False, True])
@pytest.mark.parametrize("weight", [0.02, 1.0])
def test_stochastic_rounding_moves_what_rounding_to_nearest_does_not(weight, use_8bit_adam):
    if use_8bit_adam:
        pytest.importorskip("bitsandbytes")
    expected, *_ = trained(weight, dtype=torch.float32)
    assert expected < -1e-3
    assert trained(weight, "nearest")[0] == 0
    moved, network, optimizer = trained(weight, use_8bit_adam=use_8bit_adam)
    assert moved == pytest.approx(expected, rel=0.1)
    assert network.weight.dtype == torch.bfloat16
    state = next(iter(optimizer.state.values()))
    assert {state[name].dtype for name in state if name in ("exp_avg_sq", "state2")} == {
        torch.uint8 if use_8bit_adam else torch.float32
    }


def test_an_update_before_rounding_is_torchs_own():
    """Of weights that are large beside the update, by exactly what Adam in float32 makes of the same gradients."""
    gradients = torch.randn(20, 64, 128, generator=torch.Generator().manual_seed(0))
    networks = [torch.nn.Linear(128, 64, bias=False).to(dtype) for dtype in (torch.bfloat16, torch.float32)]
    optimizers = [build_optimizer(network, betas=(0.9, 0.99), seed=5) for network in networks]
    for step, gradient in enumerate(gradients):
        with torch.no_grad():
            networks[1].weight.copy_(networks[0].weight)
        for network, optimizer in zip(networks, optimizers):
            network.weight.grad = gradient.to(torch.bfloat16).to(network.weight.dtype)
            apply_update(optimizer, loss=0.0, learning_rate=1e-3)
        expected = torch.empty_like(networks[0].weight)
        round_stochastically(networks[1].weight.detach().clone(), expected, 5, step + 1, 0)
        assert torch.equal(networks[0].weight, expected)


@pytest.mark.parametrize("use_8bit_adam", [False, True])
def test_float32_parameters_beside_bfloat16_ones_are_not_rounded(use_8bit_adam):
    if use_8bit_adam:
        pytest.importorskip("bitsandbytes")
    network = torch.nn.Linear(128, 64)
    alone = torch.nn.Linear(128, 64)
    alone.load_state_dict(network.state_dict())
    network.weight.data = network.weight.data.bfloat16()
    for one in (network, alone):
        optimizer = build_optimizer(one, use_8bit_adam=use_8bit_adam)
        for parameter in one.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        apply_update(optimizer, loss=0.0, learning_rate=1e-5)
    assert torch.equal(network.bias, alone.bias) and network.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("use_8bit_adam", [False, True])
def test_an_optimizer_goes_on_from_its_state(use_8bit_adam, tmp_path):
    """Moments keep their dtype on the way through a file, and the rounding its place in the sequence."""
    if use_8bit_adam:
        pytest.importorskip("bitsandbytes")
    _, network, optimizer = trained(0.1, steps=3, use_8bit_adam=use_8bit_adam, seed=3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    copied = torch.nn.Linear(128, 64, bias=False).bfloat16()
    copied.load_state_dict(network.state_dict())
    resumed = build_optimizer(copied, epsilon=1e-4, use_8bit_adam=use_8bit_adam, seed=3)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other = build_optimizer(copied, epsilon=1e-4, use_8bit_adam=use_8bit_adam, seed=4)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))

    def step(network, optimizer):
        network.weight.grad = torch.full_like(network.weight, 1e-3)
        apply_update(optimizer, loss=0.0, learning_rate=1e-5)
        return network.weight.detach().clone()

    before = copied.weight.detach().clone()
    expected = step(network, optimizer)
    assert torch.equal(step(copied, resumed), expected)
    with torch.no_grad():
        copied.weight.copy_(before)
    assert not torch.equal(step(copied, other), expected)
