# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
import pytest
import torch

from hf_flowdistill.training.ema import EMA, ema_decay


def test_the_rule_of_sid_lsg():
    """beta = 0.5 ** (batch / min(500k, 5 % of the images seen))."""
    assert ema_decay(256, 256, 500_000) == 0.5**20
    assert ema_decay(256, 1_000_000, 500_000) == pytest.approx(0.5 ** (256 / 50_000))
    assert ema_decay(256, 20_000_000, 500_000) == pytest.approx(0.5 ** (256 / 500_000))
    assert ema_decay(48, 10**9, 3310) == pytest.approx(0.99, abs=1e-4)
    assert ema_decay(48, 480, 0) == 0


def test_a_half_life_halves():
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    ema = EMA(network, half_life_images=100)
    torch.nn.init.ones_(network.weight)
    for _ in range(10):
        ema.update(network, batch_size=10, images_seen=10**6)
    assert ema.model.weight.item() == pytest.approx(0.5)


def test_it_is_a_float32_copy_without_gradient():
    network = torch.nn.Linear(3, 3).bfloat16()
    ema = EMA(network, half_life_images=10**6)
    assert {p.dtype for p in ema.model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in ema.model.parameters())
    with torch.no_grad():
        network.weight += 1
    start = ema.model.weight.clone()
    decay = ema.update(network, batch_size=1, images_seen=10**9)
    moved = (ema.model.weight - start) / (network.weight.float() - start)
    assert torch.allclose(moved, torch.full_like(moved, 1 - decay), rtol=0.05)
    assert network.weight.dtype == torch.bfloat16 and network.weight.requires_grad


def test_no_average_is_the_network_itself():
    network = torch.nn.Linear(3, 3)
    ema = EMA(network, half_life_images=0)
    with torch.no_grad():
        network.weight += 1
    ema.update(network, batch_size=4, images_seen=4)
    assert torch.equal(ema.model.weight, network.weight)
