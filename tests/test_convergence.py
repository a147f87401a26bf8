# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The reference that SiD's convergence is compared with: its gradient, and the passes that both are said to take."""

import runpy
from pathlib import Path

import pytest
import test_methods_sid as tiny
import torch
from teacher_cases import learned

from hf_flowdistill import flow
from hf_flowdistill.methods.sid import SiDBatch, SiDConfig, fake_score_turn, generate, generator_turn
from hf_flowdistill.networks.roles import Networks
from hf_flowdistill.teachers import encode_prompts


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
BENCHMARK = runpy.run_path(str(BENCHMARKS / "convergence.py"))
count = runpy.run_path(str(BENCHMARKS / "work.py"))["count_flops"]
TURNS = {"sid": generator_turn, "dmd": BENCHMARK["dmd_generator_turn"]}
CONFIGS = {
    "sid": SiDConfig(),
    "dmd": SiDConfig(fake_guidance_scale=1.0, fake_train_guidance_scale=1.0, guidance_rescale=0.7),
}


def test_dmds_gradient_at_x0_is_the_normalised_gap(monkeypatch):
    networks, contract, batch, config = tiny.fresh_networks(), tiny.teacher()[1], tiny.batch(k=2), CONFIGS["dmd"]
    x0 = generate(networks, contract, batch, config).detach().requires_grad_()
    monkeypatch.setitem(TURNS["dmd"].__globals__, "generate", lambda *_: x0)
    with networks.training("generator"):
        TURNS["dmd"](networks, contract, batch, config)[0].backward()

    x_t = flow.add_noise(x0.detach(), batch.noise, batch.sigma)
    predicted = {}
    words = batch.conditional, batch.unconditional
    for name, guidance in (("teacher", (config.teacher_guidance_scale, "cfg", 0.7)), ("fake_score", (1.0, "cfg"))):
        with torch.no_grad():
            velocity = contract.guided_velocity(getattr(networks, name), x_t, batch.sigma, *words, *guidance)
        predicted[name] = flow.x0_from_velocity(x_t, velocity, batch.sigma)
    size = (x0 - predicted["teacher"]).detach().abs().mean((1, 2, 3), keepdim=True)
    expected = config.loss_scale * (predicted["fake_score"] - predicted["teacher"]) / size / tiny.BATCH
    torch.testing.assert_close(x0.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", TURNS)
def test_an_update_takes_the_passes_it_is_said_to_take(loss):
    """The matrix products of both turns over those of a forward pass, deep enough for the blocks to be nearly all."""
    teacher = learned("sd3")
    transformer, contract = teacher.pipeline.transformer, teacher.contract
    networks = Networks.from_teacher(type(transformer).from_config(dict(transformer.config) | {"num_layers": 12}))
    conditional, unconditional = encode_prompts(teacher.pipeline, contract, ["a cat", "two dogs"])
    noise, sigma = torch.randn(2, *contract.latent_shape), torch.full((2,), 0.5)

    def train(turn, loss_of, k):
        with networks.training(turn):
            batch = SiDBatch(conditional, unconditional, k, lambda i: noise, sigma, noise)
            loss_of(networks, contract, batch, CONFIGS[loss])[0].backward()

    with torch.no_grad():
        forward = count(lambda: contract.velocity(networks.teacher, noise, sigma, conditional))
    for k in (1, 4):
        work = count(lambda k=k: (train("fake_score", fake_score_turn, k), train("generator", TURNS[loss], k)))
        assert work / forward == pytest.approx(BENCHMARK["LOSSES"][loss][1](k), rel=0.03)
