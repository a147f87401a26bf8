# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""One base in several roles: each is the network that it stands for, and nothing else is touched."""

import copy
import functools

import pytest
import tiny_pipelines
import torch
from diffusers import StableDiffusion3Pipeline
from teacher_cases import TEACHERS, learned
from training_helpers import quiet, saved_teacher

from hf_flowdistill.errors import UserError
from hf_flowdistill.methods.sid import SiDBatch, SiDConfig, fake_score_turn, generator_turn
from hf_flowdistill.networks.adapters import LORA_FILE, Role, merged, save_lora
from hf_flowdistill.networks.blocks import linear_layers
from hf_flowdistill.networks.roles import Networks, RoleSettings
from hf_flowdistill.teachers import encode_prompts
from hf_flowdistill.training.ema import EMA


PROMPTS = ["red circle", "blue square"]
TURNS = {"fake_score": fake_score_turn, "generator": generator_turn}
ROLES = {name: RoleSettings(name, rank=4, lora_alpha=8) for name in ("lora_fake", "lora")}


def roles_of(case, roles, **more):
    return Networks.from_teacher(copy.deepcopy(learned(case).pipeline.transformer), roles=roles, **more)


@functools.cache
def conditioning(case):
    return encode_prompts(learned(case).pipeline, learned(case).contract, PROMPTS)


def batch(case, seed=0, k=2):
    generator, shape = torch.Generator().manual_seed(seed), (len(PROMPTS), *learned(case).contract.latent_shape)
    noises = [torch.randn(shape, generator=generator) for _ in range(5)]
    conditional, unconditional = conditioning(case)
    return SiDBatch(conditional, unconditional, k, noises.__getitem__, torch.tensor([0.7, 0.4]), noises[4])


def turn(networks, case, name, **random):
    """One turn's gradients; returns the loss."""
    with networks.training(name):
        loss = TURNS[name](networks, learned(case).contract, batch(case, **random), SiDConfig(loss_scale=1.0))[0]
        loss.backward()
    return loss.detach()


def train(networks, case, steps=2):
    optimizers = {
        name: torch.optim.Adam(network.parameters(), lr=1e-2) for name, network in networks.trained().items()
    }
    for step in range(steps):
        for name, optimizer in optimizers.items():
            turn(networks, case, name, seed=step)
            optimizer.step()
            optimizer.zero_grad()


def state(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def velocity(network, case="sd3"):
    with torch.no_grad():
        x_t, sigma = batch(case).noise, torch.tensor([0.7, 0.4])
        return learned(case).contract.velocity(network, x_t, sigma, conditioning(case)[0])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("roles", ROLES)
def test_each_turn_touches_its_own_adapter(roles, checkpointing):
    """The teacher's output and weights are the same bits; a turn's gradient is in what it trains, and only there."""
    networks = roles_of("sd3", ROLES[roles])
    if checkpointing:
        networks.enable_gradient_checkpointing()
    teacher = learned("sd3").pipeline.transformer
    before = velocity(teacher)
    assert all(torch.equal(velocity(network), before) for network in (networks.teacher, *networks.trained().values()))
    for name, other in (("generator", "fake_score"), ("fake_score", "generator")):
        train(networks, "sd3", steps=1)
        for network in networks.trained().values():
            network.zero_grad()
        turn(networks, "sd3", name)
        gradients = [parameter.grad for parameter in networks.trained()[name].parameters()]
        assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients) > 0.9 * len(gradients)
        assert all(parameter.grad is None for parameter in networks.trained()[other].parameters())
    shared = networks.teacher.shared
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in shared.transformer.state_dict().items()}
    assert equal({name: tensor for name, tensor in kept.items() if ".lora_" not in name}, teacher.state_dict())
    assert torch.equal(velocity(networks.teacher), before) and shared.active is None
    assert not any(torch.equal(velocity(network), before) for network in networks.trained().values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", TURNS)
def test_roles_on_one_base_are_networks_of_their_own(name, checkpointing):
    """The gradient of an adapter is that of merged networks, carried back through W = base + scale * B A."""
    networks = roles_of("sd3", ROLES["lora"])
    train(networks, "sd3")
    if checkpointing:
        networks.enable_gradient_checkpointing()
    alone = Networks(*(merged(network).requires_grad_(True) for network in vars(networks).values()))
    alone.teacher.requires_grad_(False)
    alone = copy.deepcopy(alone)  # merged networks share with the base what has no adapter
    loss, expected = (turn(them, "sd3", name, seed=7) for them in (networks, alone))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    trained, plain = networks.trained()[name], dict(alone.trained()[name].named_parameters())
    for target in trained.shared.targets:
        down, up = (trained.get_submodule(f"{target}.{part}").weight for part in ("lora_A", "lora_B"))
        gradient = plain[f"{target}.weight"].grad
        torch.testing.assert_close(up.grad, 2 * gradient @ down.T, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(down.grad, 2 * up.T @ gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("roles", ["full", *ROLES])
def test_a_backward_pass_in_the_wrong_turn_is_an_error(roles, checkpointing):
    networks = roles_of("sd3", ROLES.get(roles, RoleSettings()))
    if checkpointing:
        networks.enable_gradient_checkpointing()

    def loss_of(name):
        with networks.training(name):
            return TURNS[name](networks, learned("sd3").contract, batch("sd3"), SiDConfig())[0]

    for name, other in (("generator", "fake_score"), ("fake_score", "generator")):
        loss = loss_of(name)
        with pytest.raises(RuntimeError, match=f"through the turn of the {name} after its end: keep loss.backward"):
            with networks.training(other):
                loss.backward()
        with pytest.raises(RuntimeError, match=f"keep loss.backward\\(\\) inside `with networks.training\\('{name}'"):
            loss_of(name).backward()


def test_a_backward_pass_while_another_role_is_on():
    """Checkpointed blocks are recomputed in the role of their forward pass, and what is on stays on."""
    networks = roles_of("sd3", ROLES["lora"])
    train(networks, "sd3")
    expected = []
    for checkpointing in (False, True):
        if checkpointing:
            networks.enable_gradient_checkpointing()
        networks.generator.zero_grad()
        with networks.training("generator"):
            loss = generator_turn(networks, learned("sd3").contract, batch("sd3"), SiDConfig())[0]
            with networks.teacher.shared.role("fake_score"):
                loss.backward()
                assert networks.teacher.shared.active == "fake_score"
        expected.append([parameter.grad.clone() for parameter in networks.generator.parameters()])
    assert sum(bool(gradient.any()) for gradient in expected[0]) > 0.9 * len(expected[0])
    torch.testing.assert_close(*expected)


def test_the_average_is_one_more_adapter():
    networks = roles_of("sd3", ROLES["lora"])
    ema = EMA(networks.generator, half_life_images=10**6)
    parameters = sum(p.numel() for p in networks.generator.parameters())
    assert isinstance(ema.model, Role) and sum(p.numel() for p in ema.model.parameters()) == parameters
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert all(p.requires_grad for p in networks.generator.parameters())
    start = state(ema.model)
    train(networks, "sd3")
    assert equal(state(ema.model), start)
    decay = ema.update(networks.generator, batch_size=1, images_seen=10)
    for name, tensor in networks.generator.state_dict().items():
        torch.testing.assert_close(ema.model.state_dict()[name], torch.lerp(start[name], tensor, 1 - decay))
    ema.half_life_images = 0
    ema.update(networks.generator, batch_size=1, images_seen=10)
    assert torch.equal(velocity(ema.model), velocity(networks.generator))


def test_a_seed_makes_the_adapters():
    first, second, other = (roles_of("sd3", ROLES["lora"], seed=seed) for seed in (1, 1, 2))
    assert equal(state(first.generator), state(second.generator))
    for one, another in ((first.generator, first.fake_score), (first.generator, other.generator)):
        pairs = zip(state(one).items(), state(another).values())
        assert not any(torch.equal(tensor, there) for (name, tensor), there in pairs if "lora_A" in name)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    roles_of("sd3", ROLES["lora"])
    assert torch.equal(torch.rand(1), expected)


def test_which_layers_have_an_adapter():
    transformer = learned("sd3").pipeline.transformer
    every = linear_layers(transformer)
    assert "transformer_blocks.0.attn.to_q" in every and "transformer_blocks.0.norm1.linear" in every
    assert all(name.startswith("transformer_blocks.") for name in every)
    chosen = linear_layers(transformer, "to_q, ff.net.2,proj_out")
    assert {name.split(".", 2)[-1] for name in chosen} >= {"attn.to_q", "ff.net.2", "proj_out"}
    assert not any(name.endswith("add_q_proj") or name.endswith("to_k") for name in chosen)
    settings = RoleSettings("lora", rank=2, lora_layers="to_q,proj_out")
    assert roles_of("sd3", settings).generator.shared.targets == linear_layers(transformer, "to_q,proj_out")
    with pytest.raises(UserError, match="--lora_layers has 'q', which is the end of no linear layer's name in SD3Tr"):
        linear_layers(transformer, "to_q,q")


def test_half_precision_base_and_float32_adapters():
    networks = Networks.from_teacher(
        copy.deepcopy(learned("sd3").pipeline.transformer), torch.bfloat16, ROLES["lora_fake"]
    )
    assert {p.dtype for p in networks.fake_score.parameters()} == {torch.float32}
    assert {p.dtype for p in networks.generator.parameters()} == {torch.bfloat16}
    assert torch.equal(velocity(networks.fake_score), velocity(networks.generator))
    before = state(networks.fake_score)
    train(networks, "sd3", steps=1)
    changed = [not torch.equal(before[name], tensor) for name, tensor in state(networks.fake_score).items()]
    assert sum(changed) > 0.45 * len(changed)  # the first matrices follow when the second ones are not zero any more


@pytest.mark.parametrize(("kind", "error"), [("8bit", 0.02), ("nf4", 0.3)])
def test_a_quantized_base(kind, error):
    pytest.importorskip("bitsandbytes")
    settings = RoleSettings("lora", rank=4, base_quantization=kind)
    networks = roles_of("sd3", settings)
    networks.enable_gradient_checkpointing()
    own, quantized = velocity(learned("sd3").pipeline.transformer), velocity(networks.teacher)
    assert 0 < (own - quantized).abs().max() < error * own.abs().max()
    assert torch.equal(velocity(networks.generator), quantized)
    train(networks, "sd3")
    assert torch.equal(velocity(networks.teacher), quantized)
    student = merged(networks.generator)
    assert type(student) is type(learned("sd3").pipeline.transformer) and student.dtype == torch.float32
    assert student.state_dict().keys() == learned("sd3").pipeline.transformer.state_dict().keys()
    trained = velocity(networks.generator)
    change = (trained - quantized).abs().max()
    assert change > 0 and (velocity(student) - trained).abs().max() < 0.2 * change


def test_merging():
    networks = roles_of("sd3", ROLES["lora_fake"])
    assert merged(networks.generator) is networks.generator
    assert equal(merged(networks.teacher).state_dict(), learned("sd3").pipeline.transformer.state_dict())
    networks = roles_of("sd3", ROLES["lora"])
    networks.enable_gradient_checkpointing()
    train(networks, "sd3")
    expected = velocity(networks.generator)
    student = merged(networks.generator)
    torch.testing.assert_close(velocity(student), expected, rtol=1e-4, atol=1e-5)
    assert not student.is_gradient_checkpointing and torch.equal(velocity(networks.generator), expected)
    assert not torch.allclose(velocity(networks.teacher), expected)


@pytest.mark.parametrize("case", TEACHERS)
def test_every_teacher_trains_as_a_lora(case, tmp_path):
    """Two steps; on the stock pipeline the LoRA file is the merged student, where the class loads LoRA files."""
    teacher = learned(case)
    networks = roles_of(case, ROLES["lora"])
    before = state(networks.teacher.shared.transformer)
    train(networks, case)
    after = networks.teacher.shared.transformer.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapters = {name for name in before if ".lora_B.generator" in name or ".lora_B.fake_score" in name}
    assert {name for name in changed if ".lora_" not in name} == set()
    assert len(changed & adapters) > 0.6 * len(adapters)  # of HiDream, in eval mode, no expert gets gradient

    pipeline, student = copy.copy(teacher.pipeline), merged(networks.generator)
    pipeline.register_modules(transformer=copy.deepcopy(teacher.pipeline.transformer))
    expected = velocity(student, case)
    file = save_lora(pipeline, networks.generator, tmp_path)
    if file is None:
        assert not hasattr(pipeline, "load_lora_weights") or case == "prx"  # whose loader is that of UNets
        return
    with quiet():
        pipeline.load_lora_weights(tmp_path)
    assert file == tmp_path / LORA_FILE
    started, loaded = velocity(teacher.pipeline.transformer, case), velocity(pipeline.transformer, case)
    assert (loaded - expected).abs().max() < 1e-3 * (expected - started).abs().max()


def test_the_lora_file_draws_the_merged_students_image(tmp_path):
    networks = roles_of("sd3", ROLES["lora"])
    train(networks, "sd3")
    with quiet():
        stock, student = (StableDiffusion3Pipeline.from_pretrained(saved_teacher("stable_diffusion_3")) for _ in "ab")
    save_lora(stock, networks.generator, tmp_path)
    arguments = {"num_inference_steps": 4, "height": tiny_pipelines.HEIGHT, "width": tiny_pipelines.WIDTH}

    def image(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipeline("red circle", generator=generator, output_type="pt", **arguments).images

    teachers = image(stock)
    stock.load_lora_weights(tmp_path)
    student.register_modules(transformer=merged(networks.generator))
    drawn = image(student)
    assert (image(stock) - drawn).abs().max() < 1e-4 < 1e-2 < (teachers - drawn).abs().max()
    assert save_lora(stock, networks.teacher, tmp_path / "none") is None and not (tmp_path / "none").exists()
