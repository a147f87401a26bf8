# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The adversarial terms against closed forms, in float64."""

import math

import pytest
import torch

from hf_flowdistill.losses import adversarial_generator_loss, discriminator_loss


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_logits_of_zero_know_nothing():
    """BCE is ln 2 for either label, whatever there is to a sample."""
    for shape in ((2, 7), (3, 1, 5), (1, 2, 2, 2)):
        zeros = torch.zeros(shape, dtype=torch.float64)
        loss, metrics = discriminator_loss(zeros, zeros, elements=48)
        assert loss.item() == pytest.approx(48 * math.log(2), rel=1e-14)
        assert metrics["real_accuracy"] == metrics["fake_accuracy"] == 0
        generator = adversarial_generator_loss(zeros, torch.ones(shape[0]), elements=48)
        assert generator.item() == pytest.approx(48 * math.log(2), rel=1e-14)


def test_the_discriminator_loss_is_a_mean_of_logarithms():
    real, fake = logits(4, 6), logits(4, 6, seed=1)
    loss, metrics = discriminator_loss(real, fake, elements=10)
    expected = 10 * (-torch.sigmoid(real).log().mean() - (1 - torch.sigmoid(fake)).log().mean()) / 2
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert metrics["discriminator_loss"].item() == pytest.approx(loss.item() / 10, rel=1e-12)
    assert metrics["real_accuracy"].item() == (real > 0).double().mean().item()
    assert metrics["fake_accuracy"].item() == (fake < 0).double().mean().item()
    assert metrics["real_logit"].item() == real.mean().item() and metrics["fake_logit"].item() == fake.mean().item()
    assert not any(value.requires_grad for value in metrics.values())


def test_gradients_of_the_terms():
    """d/dz: (sigmoid(z) - 1) for label 1 and sigmoid(z) for label 0, each by its factor; nothing for the weight."""
    real, fake = logits(3, 5).requires_grad_(), logits(3, 5, seed=1).requires_grad_()
    discriminator_loss(real, fake, elements=30)[0].backward()
    torch.testing.assert_close(real.grad, (torch.sigmoid(real) - 1).detach() * 30 / 2 / 15)
    torch.testing.assert_close(fake.grad, torch.sigmoid(fake).detach() * 30 / 2 / 15)
    fake.grad, weight = None, torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    adversarial_generator_loss(fake, weight, elements=30).backward()
    torch.testing.assert_close(fake.grad, (weight[:, None] * (torch.sigmoid(fake) - 1)).detach() * 30 / 15)
    assert weight.grad is None


def test_logits_are_clamped():
    """Beyond 10 the loss stays as it is there, without gradient; the metric shows the logit itself."""
    real = torch.tensor([[25.0], [-25.0]], dtype=torch.float64, requires_grad=True)
    loss, metrics = discriminator_loss(real, torch.zeros_like(real), elements=1)
    ends = math.log1p(math.exp(-10)), 10 + math.log1p(math.exp(-10))
    assert loss.item() == pytest.approx((sum(ends) / 2 + math.log(2)) / 2, rel=1e-12)
    assert metrics["real_logit"] == 0 and metrics["real_accuracy"] == 0.5
    loss.backward()
    assert real.grad.abs().max() == 0


def test_precision_and_shapes():
    with torch.autocast("cpu", torch.bfloat16):
        low = logits(2, 3).bfloat16()
        assert discriminator_loss(low, low, elements=5)[0].dtype == torch.float32
        assert adversarial_generator_loss(low, torch.ones(2), elements=5).dtype == torch.float32
    with pytest.raises(ValueError, match="differ"):
        discriminator_loss(logits(2, 3), logits(2, 4), elements=1)
    with pytest.raises(ValueError, match="a weight for each of 2 samples"):
        adversarial_generator_loss(logits(2, 3), torch.ones(3), elements=1)
