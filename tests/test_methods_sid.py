# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The two turns on a tiny SD3: who receives gradient, who does not, and how many passes it takes."""

import copy
import functools

import pytest
import tiny_pipelines
import torch

from hf_flowdistill import flow
from hf_flowdistill.methods.sid import SiDBatch, SiDConfig, fake_score_turn, generate_x0, generator_turn
from hf_flowdistill.networks.roles import Networks
from hf_flowdistill.teachers import encode_prompts, learn_contract
from hf_flowdistill.training.optimizers import apply_update, build_optimizer


TURNS = {"fake_score": fake_score_turn, "generator": generator_turn}
BATCH = 3


@functools.cache
def teacher():
    pipeline = tiny_pipelines.stable_diffusion_3()
    contract = learn_contract(pipeline, height=tiny_pipelines.HEIGHT, width=tiny_pipelines.WIDTH)
    return pipeline, contract, encode_prompts(pipeline, contract, ["red circle", "blue square", "green"])


def fresh_networks(different_fake_score=True):
    networks = Networks.from_teacher(copy.deepcopy(teacher()[0].transformer))
    if different_fake_score:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in networks.fake_score.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return networks


def draw(*key, shape=None):
    generator = torch.Generator().manual_seed(hash(key) % 2**31)
    return torch.randn(BATCH, *(teacher()[1].latent_shape if shape is None else shape), generator=generator)


def batch(k, seed=0):
    conditional, unconditional = teacher()[2]
    return SiDBatch(
        conditional=conditional,
        unconditional=unconditional,
        k=k,
        noises=lambda i: draw(seed, i),
        sigma=torch.sigmoid(draw(seed, 100, shape=())),
        noise=draw(seed, 101),
    )


def state(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_each_turn_leaves_the_others_alone():
    """Three steps; neither parameters nor gradients of the network whose turn it is not are touched."""
    networks, contract = fresh_networks(), teacher()[1]
    start = {role: state(getattr(networks, role)) for role in ("teacher", "generator", "fake_score")}
    optimizers = {role: build_optimizer(network) for role, network in networks.trained().items()}
    for step in range(3):
        for turn, other in (("fake_score", "generator"), ("generator", "fake_score")):
            before = state(getattr(networks, other))
            marks = [torch.full_like(p, 7.0) for p in getattr(networks, other).parameters()]
            for parameter, mark in zip(getattr(networks, other).parameters(), marks):
                parameter.grad = mark.clone()
            with networks.training(turn):
                loss, _ = TURNS[turn](networks, contract, batch(k=step + 1, seed=step), SiDConfig())
                loss.backward()
            taken, norm = apply_update(optimizers[turn], loss=loss.item(), learning_rate=1e-3)
            assert taken and norm > 0
            assert same(before, state(getattr(networks, other)))
            assert all(torch.equal(p.grad, m) for p, m in zip(getattr(networks, other).parameters(), marks))
            getattr(networks, other).zero_grad()
    assert same(start["teacher"], state(networks.teacher))
    assert all(p.grad is None for p in networks.teacher.parameters())
    for role in ("generator", "fake_score"):
        assert not same(start[role], state(getattr(networks, role)))


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_the_generator_turn_is_equation_18(rescale):
    networks, contract, one = fresh_networks(), teacher()[1], batch(k=2)
    scales = {"teacher_guidance_scale": 2.0, "fake_guidance_scale": 1.5, "guidance_rescale": rescale}
    config = SiDConfig(loss_scale=3.0, **scales)
    loss, metrics = generator_turn(networks, contract, one, config)

    x0 = generate_x0(networks.generator, contract, one.conditional, one.noises, k=2)
    x_t = flow.add_noise(x0, one.noise, one.sigma)

    def prediction(network, scale):
        halves = [contract.velocity(network, x_t, one.sigma, c) for c in (one.unconditional, one.conditional)]
        return flow.x0_from_velocity(x_t, flow.guide(*halves, scale), one.sigma)

    x0_teacher, x0_fake = prediction(networks.teacher, 2.0), prediction(networks.fake_score, 1.5)
    unguided, dims = prediction(networks.teacher, 1.0), tuple(range(1, x0.ndim))
    x0_teacher *= 1 - rescale + rescale * unguided.std(dims, keepdim=True) / x0_teacher.std(dims, keepdim=True)
    inner = ((x0_teacher - x0_fake) * (x0_fake - x0)).flatten(1).sum(1)
    expected = 3.0 * ((1 - one.sigma) * inner).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["x0_gap"].item() == pytest.approx((x0_teacher - x0_fake).abs().mean().item(), rel=1e-4)
    assert metrics["x0_std"].item() == pytest.approx(x0.std(correction=0).item(), rel=1e-4)


def gradient(network):
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def generator_gradient(networks, k=2, checkpointing=False, autocast=False):
    if checkpointing:
        networks.enable_gradient_checkpointing()
    with networks.training("generator"):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = generator_turn(networks, teacher()[1], batch(k=k), SiDConfig())
        assert loss.dtype == torch.float32
        loss.backward()
    return gradient(networks.generator)


def test_gradient_passes_through_the_frozen_networks():
    """Were x_t detached, the gradient would be another one, which no finite difference confirms."""
    networks = fresh_networks()
    length = generator_gradient(networks, k=1).norm().item()
    losses = []
    for step in (1e-2, -1e-2):
        moved = copy.deepcopy(networks)
        with torch.no_grad():
            for parameter, start in zip(moved.generator.parameters(), networks.generator.parameters()):
                if start.grad is not None:
                    parameter += step / length * start.grad
            losses.append(generator_turn(moved, teacher()[1], batch(k=1), SiDConfig())[0].item())
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(length, rel=0.02)


def test_an_equal_fake_score_gives_no_gradient():
    assert generator_gradient(fresh_networks(different_fake_score=False)).abs().max() < 1e-3
    assert generator_gradient(fresh_networks()).abs().max() > 1


@pytest.mark.parametrize("k", [1, 4])
def test_gradient_checkpointing_changes_nothing(k):
    plain = generator_gradient(fresh_networks(), k)
    checkpointed = generator_gradient(fresh_networks(), k, checkpointing=True)
    assert torch.allclose(plain, checkpointed, rtol=1e-4, atol=1e-4 * plain.abs().max())


def test_autocast_keeps_every_gradient():
    """The steps before k run under no_grad; what autocast caches there must not cut off step k."""
    plain = generator_gradient(fresh_networks(), k=3)
    autocast = generator_gradient(fresh_networks(), k=3, autocast=True)
    assert autocast.shape == plain.shape and torch.isfinite(autocast).all()
    assert torch.cosine_similarity(plain, autocast, dim=0) > 0.9


def count_passes(networks):
    """[(network, batch size, whether a graph is built)] of every forward pass from here on."""
    passes = []
    for role in ("teacher", "generator", "fake_score"):
        getattr(networks, role).register_forward_pre_hook(
            lambda module, args, kwargs, role=role: passes.append(
                (role, len(kwargs["hidden_states"]), torch.is_grad_enabled())
            ),
            with_kwargs=True,
        )
    return passes


@pytest.mark.parametrize("k", [1, 3])
def test_no_pass_is_run_twice_and_no_graph_built_in_vain(k):
    networks, contract = fresh_networks(), teacher()[1]
    passes = count_passes(networks)
    fake_score_turn(networks, contract, batch(k), SiDConfig())
    assert passes == [("generator", BATCH, False)] * k + [("fake_score", 2 * BATCH, True)]
    passes.clear()
    generator_turn(networks, contract, batch(k), SiDConfig())
    prefix = [("generator", BATCH, False)] * (k - 1)
    assert passes == [
        *prefix,
        ("generator", BATCH, True),
        ("teacher", 2 * BATCH, True),
        ("fake_score", 2 * BATCH, True),
    ]


def test_one_rollout_serves_both_turns():
    """What the generator's turn leaves is what the fake score's turn would make, which then runs no generator."""
    networks, contract, one = fresh_networks(), teacher()[1], batch(3)
    alone, _ = fake_score_turn(networks, contract, batch(3), SiDConfig())
    generator_turn(networks, contract, one, SiDConfig())
    assert not one.x0.requires_grad
    passes = count_passes(networks)
    shared, _ = fake_score_turn(networks, contract, one, SiDConfig())
    assert passes == [("fake_score", 2 * BATCH, True)]
    assert torch.equal(shared, alone)


def test_guidance_that_is_off_costs_nothing():
    networks, contract = fresh_networks(), teacher()[1]
    passes = count_passes(networks)
    config = SiDConfig(teacher_guidance_scale=1.0, fake_guidance_scale=1.0, fake_train_guidance_scale=1.0)
    fake_score_turn(networks, contract, batch(1), config)
    generator_turn(networks, contract, batch(1), config)
    assert {size for _, size, _ in passes} == {BATCH}


def test_every_network_is_guided_in_its_own_mode():
    """What FLUX is given in the two turns: the embedded scale, and how many samples (two halves or one)."""
    pipeline = tiny_pipelines.flux()
    contract = learn_contract(pipeline, height=tiny_pipelines.HEIGHT, width=tiny_pipelines.WIDTH)
    conditional, unconditional = encode_prompts(pipeline, contract, ["red circle", "blue square", "green"])
    networks = Networks.from_teacher(pipeline.transformer)
    calls = {role: [] for role in ("teacher", "generator", "fake_score")}
    for role, seen in calls.items():
        getattr(networks, role).register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(
                (*kwargs["guidance"].unique().tolist(), len(kwargs["hidden_states"]))
            ),
            with_kwargs=True,
        )
    noise = torch.randn(BATCH, *contract.latent_shape, generator=torch.Generator().manual_seed(0))
    one = SiDBatch(conditional, unconditional, 2, lambda i: noise, torch.full((BATCH,), 0.5), noise)
    scales = {"teacher_guidance_scale": 2.0, "fake_guidance_scale": 3.0, "fake_train_guidance_scale": 1.5}
    config = SiDConfig(**scales, guidance_mode="both", fake_guidance_mode="embedded")
    generator_turn(networks, contract, one, config)
    student = [(1.0, BATCH)] * 2
    assert calls == {"teacher": [(2.0, 2 * BATCH)], "generator": student, "fake_score": [(3.0, BATCH)]}
    fake_score_turn(networks, contract, one, config)
    assert calls["fake_score"][1:] == [(1.5, BATCH)] and len(calls["teacher"]) == 1
