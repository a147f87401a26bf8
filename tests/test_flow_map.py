# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Jump and guidance on every transformer: where they are put, what they do, and that they can be folded away."""

import copy
import functools

import pytest
import torch
from diffusers import DiTTransformer2DModel
from teacher_cases import TEACHERS, learned
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointError

from hf_flowdistill.errors import UserError
from hf_flowdistill.networks import flow_map
from hf_flowdistill.networks.adapters import merged, save_lora
from hf_flowdistill.networks.flow_map import GUIDANCE, JUMP, attach, folded
from hf_flowdistill.networks.roles import Networks, RoleSettings, check_gradient_checkpointing, plain_copy
from hf_flowdistill.networks.time_layers import find_time_layers, time_layers
from hf_flowdistill.teachers.conditioning import encode_batch
from hf_flowdistill.training.ema import EMA


LINEAR = "timestep_embedder.linear_2"
LAYERS = {  # by transformer class; the refiner of HunyuanImage's text has a time of its own
    "SD3Transformer2DModel": [f"time_text_embed.{LINEAR}"],
    "SanaTransformer2DModel": [f"time_embed.emb.{LINEAR}"],
    "FluxTransformer2DModel": [f"time_text_embed.{LINEAR}"],
    "Flux2Transformer2DModel": [f"time_guidance_embed.{LINEAR}"],
    "QwenImageTransformer2DModel": [f"time_text_embed.{LINEAR}"],
    "QwenImage21Transformer2DModel": [f"time_text_embed.{LINEAR}"],
    "ZImageTransformer2DModel": ["t_embedder.mlp.2"],
    "Lumina2Transformer2DModel": [f"time_caption_embed.{LINEAR}"],
    "LuminaNextDiT2DModel": [f"time_caption_embed.{LINEAR}"],
    "AuraFlowTransformer2DModel": ["time_step_proj.linear_2"],
    "ChromaTransformer2DModel": ["distilled_guidance_layer.out_proj"],
    "CogView4Transformer2DModel": [f"time_condition_embed.{LINEAR}"],
    "HiDreamImageTransformer2DModel": [f"t_embedder.{LINEAR}"],
    "HunyuanImageTransformer2DModel": [
        f"context_embedder.time_text_embed.{LINEAR}",
        f"time_guidance_embed.{LINEAR}",
    ],
    "PRXTransformer2DModel": ["time_in.out_layer"],
    "BriaTransformer2DModel": [f"time_embed.{LINEAR}"],
    "BriaFiboTransformer2DModel": [f"time_embed.{LINEAR}"],
    "BriaFibo2Transformer2DModel": ["t_embedder.mlp.2"],
    "Kandinsky5Transformer3DModel": ["time_embeddings.out_layer"],
    "Krea2Transformer2DModel": ["time_embed.linear_2"],
    "OvisImageTransformer2DModel": [LINEAR],
    "LongCatImageTransformer2DModel": [f"time_embed.{LINEAR}"],
    "ErnieImageTransformer2DModel": ["time_embedding.linear_2"],
}
PROMPTS = ["a red circle", "blue", "two green squares above a large yellow ring"]
SIGMA = torch.ones(3)


@functools.cache
def inputs(name):
    """(contract, latents, conditioning) of three samples."""
    case = learned(name)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, *case.contract.latent_shape, generator=generator)
    return case.contract, latents, encode_batch(case.pipeline, case.contract, PROMPTS)


def predict(network, name, rows=slice(None), sigma=SIGMA, **numbers):
    contract, latents, conditioning = inputs(name)
    return flow_map.velocity(network, contract, latents[rows], sigma[rows], conditioning[rows], **numbers)


def told(jump=(0.2, 1.0, 0.7), guidance=(1.5, 1.0, 2.0)):
    return {JUMP: torch.tensor(jump), GUIDANCE: torch.tensor(guidance)}


def stir(network, scale=0.3):
    """Other values for the last layers, which begin as zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for embedder in network.flow_map.embedders.values():
            for parameter in embedder[-1].parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return network


def student_of(name, numbers=(JUMP, GUIDANCE)):
    case = learned(name)
    network = plain_copy(case.pipeline.transformer, torch.float32)
    attach(network, LAYERS[type(network).__name__], numbers)
    return network


@pytest.mark.parametrize("name", TEACHERS)
@torch.no_grad()
def test_every_verified_class_is_told_and_folded(name):
    case = learned(name)
    teacher = case.pipeline.transformer
    assert find_time_layers(case.pipeline, case.contract) == LAYERS[type(teacher).__name__]

    student, expected = student_of(name), predict(teacher, name)
    assert torch.equal(predict(student, name, **told()), expected)  # at the start, bit for bit

    stir(student)
    found = predict(student, name, **told())
    alone = torch.cat([predict(student, name, [i], **{k: v[[i]] for k, v in told().items()}) for i in range(3)])
    size = found.abs().max()
    assert (found - expected).abs().max() > 1e-3 * size and (found - alone).abs().max() < 1e-5 * size
    assert torch.equal(case.contract.velocity(student, *inputs(name)[1:2], SIGMA, inputs(name)[2]), expected)
    assert (predict(student, name, **told(jump=(0.3, 1.0, 0.7)))[0] != found[0]).any()
    assert (predict(student, name, **told(guidance=(1.4, 1.0, 2.0)))[0] != found[0]).any()

    constant = {JUMP: torch.ones(3), GUIDANCE: torch.full((3,), 1.75)}
    stock = folded(student, student, lambda network: predict(network, name, [0]), jump=1.0, guidance=1.75)
    assert type(stock) is type(teacher)
    shapes = {key: value.shape for key, value in teacher.state_dict().items()}
    assert {key: value.shape for key, value in stock.state_dict().items()} == shapes
    error = case.contract.velocity(stock, inputs(name)[1], SIGMA, inputs(name)[2]) - predict(student, name, **constant)
    assert error.abs().max() < 1e-5 * size
    assert torch.equal(predict(student, name, **told()), found)  # which is left as it was


class Timeless(torch.nn.Module):
    """Time passes by its layers."""

    def __init__(self):
        super().__init__()
        self.time, self.out = torch.nn.Linear(1, 4), torch.nn.Linear(4, 4)

    def forward(self, latents, sigma):
        return self.out(latents + self.time(sigma)) * sigma


def test_where_time_passes_by_it_is_refused():
    latents = torch.randn(2, 1, 4)
    with pytest.raises(UserError, match="Timeless cannot be told how far to jump"):
        time_layers(Timeless(), lambda network, call: network(latents[call.latents], torch.tensor([[call.sigma]])))


@pytest.mark.parametrize("name", ["sd3", "qwen image"])
def test_copies_and_averages_have_their_own(name):
    student = stir(student_of(name))
    average = EMA(student, half_life_images=10)
    found = predict(student, name, **told())
    assert torch.equal(predict(average.model, name, **told()), found)
    with torch.no_grad():
        for parameter in student.flow_map.parameters():
            parameter.mul_(2)
    moved = predict(student, name, **told())
    assert not torch.equal(moved, found) and torch.equal(predict(average.model, name, **told()), found)
    average.update(student, batch_size=5, images_seen=1000)
    assert not torch.equal(predict(average.model, name, **told()), found)
    another = student_of(name)
    another.load_state_dict(student.state_dict())
    assert torch.equal(predict(another, name, **told()), moved)


def dit():
    torch.manual_seed(0)
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
    }
    network = DiTTransformer2DModel(**settings, sample_size=8, patch_size=2, num_embeds_ada_norm=10).eval()
    latents = torch.randn(2, 1, 4, 8, 8)

    def call(network, call):
        sigma, label = torch.tensor([call.sigma]), torch.tensor([call.conditioning])
        return network(latents[call.latents], timestep=sigma, class_labels=label).sample

    return network, time_layers(network, call)


def gradient_of_two_calls(network, checkpointing, remember=True):
    """With another call, of another jump, between the forward pass and the backward pass."""
    if checkpointing:
        network.enable_gradient_checkpointing()
        if remember:
            flow_map.remember_in_checkpoints(network)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def run(jump):
        with network.flow_map.told([{JUMP: torch.tensor(jump)}]):
            labels = torch.tensor([1, 2])
            return network(latents, timestep=torch.ones(2), class_labels=labels).sample.square().sum()

    first = run([0.1, 0.9])
    run([0.5, 0.6])
    first.backward()
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])


def test_a_recomputed_block_is_told_what_it_was_told_before():
    """DiT embeds its time inside of every block; so does a copy, which is told by its own flow map."""
    network, layers = dit()
    assert layers == [f"transformer_blocks.{i}.norm1.emb.{LINEAR}" for i in range(2)]
    attach(network, layers, [JUMP])
    stir(network)
    expected = gradient_of_two_calls(copy.deepcopy(network), checkpointing=False)
    found = gradient_of_two_calls(copy.deepcopy(network), checkpointing=True)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    network.enable_gradient_checkpointing()
    flow_map.remember_in_checkpoints(network)
    twin = copy.deepcopy(network)
    assert twin.transformer_blocks is not network.transformer_blocks
    assert twin._gradient_checkpointing_func.flow_maps == [twin.flow_map]
    with pytest.raises(CheckpointError):  # which would be told nothing otherwise
        gradient_of_two_calls(copy.deepcopy(network), checkpointing=True, remember=False)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_roles_on_one_base_are_told_apart(checkpointing, tmp_path):
    name = "sd3"
    case = learned(name)
    teacher = plain_copy(case.pipeline.transformer, torch.float32)
    wanted = "linear_2,to_q,to_k"  # one of them is the time's last layer
    networks = Networks.from_teacher(teacher, roles=RoleSettings("lora", rank=2, lora_layers=wanted))
    layers = LAYERS[type(teacher).__name__]
    attach(networks.generator, layers, [JUMP, GUIDANCE])
    attach(networks.fake_score, layers, [GUIDANCE], seed=1)
    if checkpointing:
        networks.enable_gradient_checkpointing()
    expected = predict(case.pipeline.transformer, name).detach()
    for network in (networks.teacher, networks.generator, networks.fake_score):
        assert torch.equal(predict(network, name, **told()).detach(), expected)
    stir(networks.generator)
    with torch.no_grad():
        for parameter in networks.generator.parameters():
            parameter.add_(0.05)
    assert torch.equal(predict(networks.teacher, name, **told()).detach(), expected)
    assert torch.equal(predict(networks.fake_score, name, **told()).detach(), expected)
    found = predict(networks.generator, name, **told())
    assert not torch.equal(found.detach(), expected)

    found.square().sum().backward()
    assert all(p.grad is not None for p in networks.generator.parameters())
    assert all(p.grad is None for p in networks.fake_score.parameters())

    average = EMA(networks.generator)
    assert torch.equal(predict(average.model, name, **told()), found.detach())
    assert {key.split(".")[0] for key in average.model.state_dict()} >= {"flow_map", "transformer_blocks"}
    whole = merged(average.model)
    stock = folded(average.model, whole, lambda network: None, jump=1.0, guidance=1.5)
    constant = {JUMP: torch.ones(3), GUIDANCE: torch.full((3,), 1.5)}
    error = predict(stock, name) - predict(average.model, name, **constant)
    assert error.abs().max() < 1e-5 * found.abs().max()
    assert stock.state_dict().keys() == case.pipeline.transformer.state_dict().keys()
    assert save_lora(case.pipeline, average.model, tmp_path) is None and not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["sd3", "flux", "sana", "qwen image", "krea2"])
def test_the_derivative_in_the_jump(name):
    student = stir(student_of(name), scale=2.0).double()
    jump = torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64)
    contract, latents, conditioning = inputs(name)

    def at(jump):
        numbers = {JUMP: jump, GUIDANCE: torch.ones(3, dtype=torch.float64)}
        return flow_map.velocity(student, contract, latents.double(), SIGMA, conditioning, **numbers)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(at(forward_ad.make_dual(jump, torch.ones_like(jump)))).tangent.clone()
    with torch.no_grad():
        difference = (at(jump + 2e-3) - at(jump - 2e-3)) / 4e-3  # SANA has kinks, and float32 inside
    assert tangent.abs().max() > 1e-4
    assert (tangent - difference).norm() < 2e-3 * difference.norm()


def test_gradient_checkpointing_of_a_student_predicts_the_same():
    student = stir(student_of("flux"))
    check_gradient_checkpointing(student, lambda network: predict(network, "flux", **told()))
