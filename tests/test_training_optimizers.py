# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
import math

import pytest
import torch

from hf_flowdistill.training.optimizers import apply_update, build_optimizer, learning_rate_factor


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
