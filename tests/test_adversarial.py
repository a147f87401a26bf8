# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The adversarial stage: its features on every teacher, and whom each of its terms moves."""

import copy
import functools

import pytest
import torch
from teacher_cases import TEACHERS, learned
from toy_pipeline import ToyTransformer, toy

from hf_flowdistill import flow
from hf_flowdistill.errors import UserError
from hf_flowdistill.methods import sid
from hf_flowdistill.methods.sid_adversarial import (
    AdversarialBatch,
    AdversarialConfig,
    adversarial_turns,
    fake_score_turn,
    generator_turn,
)
from hf_flowdistill.networks.features import find_projection, guided_velocity_and_features, velocity_and_features
from hf_flowdistill.networks.roles import Networks, RoleSettings
from hf_flowdistill.teachers import encode_prompts, learn_contract


PROMPTS = ["red circle", 'a blue square beside a sign that says "green"', "red circle"]
BATCH = len(PROMPTS)


@functools.cache
def words(name):
    case = learned(name)
    return encode_prompts(case.pipeline, case.contract, PROMPTS)


def noise(name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, *learned(name).contract.latent_shape, generator=generator)


def batch(name, k=2, **more):
    return AdversarialBatch(
        *words(name),
        k=k,
        noises=lambda i: noise(name, i),
        sigma=torch.tensor([0.3, 0.6, 0.9]),
        noise=noise(name, 100),
        real=noise(name, 101),
        **more,
    )


def config_of(name, **settings):
    case = learned(name)
    mode = (case.contract.guidance_modes or ("cfg",))[0]
    modes = {"guidance_mode": mode, "fake_guidance_mode": mode}
    return AdversarialConfig(
        **modes | {"discriminator_features": find_projection(case.pipeline, case.contract)} | settings
    )


def networks_of(name, kind="full", **settings):
    """With a fake score of its own."""
    roles = RoleSettings(kind, rank=4, **settings)
    networks = Networks.from_teacher(copy.deepcopy(learned(name).pipeline.transformer), roles=roles)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in networks.fake_score.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return networks


def moved(network):
    return {name for name, parameter in network.named_parameters() if parameter.grad is not None}


# ------------------------------------------------------------------------------------------------------------ features


def by_hand_sd3(network, contract, x_t, sigma, conditioning):
    arguments = contract.transformer_arguments(x_t, sigma, conditioning, torch.float32)
    hidden = network.pos_embed(arguments["hidden_states"])
    time = network.time_text_embed(arguments["timestep"], arguments["pooled_projections"])
    text = network.context_embedder(arguments["encoder_hidden_states"])
    for block in network.transformer_blocks:
        text, hidden = block(hidden_states=hidden, encoder_hidden_states=text, temb=time)
    scale, shift = network.norm_out.linear(torch.nn.functional.silu(time)).chunk(2, dim=1)
    return torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=1e-6) * (1 + scale)[:, None] + shift[:, None]


def by_hand_sana(network, contract, x_t, sigma, conditioning):
    arguments = contract.transformer_arguments(x_t, sigma, conditioning, torch.float32)
    mask = (1 - arguments["encoder_attention_mask"].float())[:, None] * -10000.0
    hidden = network.patch_embed(arguments["hidden_states"])
    time, embedded = network.time_embed(arguments["timestep"], batch_size=BATCH, hidden_dtype=hidden.dtype)
    text = network.caption_norm(network.caption_projection(arguments["encoder_hidden_states"]))
    side = x_t.shape[-1] // network.config.patch_size
    for block in network.transformer_blocks:
        hidden = block(hidden, None, text, mask, time, side, side)
    shift, scale = (network.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
    return torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=1e-6) * (1 + scale) + shift


def by_hand_flux(network, contract, x_t, sigma, conditioning):
    arguments = contract.transformer_arguments(x_t, sigma, conditioning, torch.float32)
    hidden, text = (
        network.x_embedder(arguments["hidden_states"]),
        network.context_embedder(arguments["encoder_hidden_states"]),
    )
    time = network.time_text_embed(
        1000 * arguments["timestep"], 1000 * arguments["guidance"], arguments["pooled_projections"]
    )
    places = network.pos_embed(torch.cat([arguments["txt_ids"], arguments["img_ids"]]))
    for block in [*network.transformer_blocks, *network.single_transformer_blocks]:
        text, hidden = block(hidden_states=hidden, encoder_hidden_states=text, temb=time, image_rotary_emb=places)
    scale, shift = network.norm_out.linear(torch.nn.functional.silu(time)).chunk(2, dim=1)
    return torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=1e-6) * (1 + scale)[:, None] + shift[:, None]


@pytest.mark.parametrize(("name", "by_hand"), [("sd3", by_hand_sd3), ("sana", by_hand_sana), ("flux", by_hand_flux)])
def test_features_are_those_of_a_forward_written_by_hand(name, by_hand):
    case, sigma = learned(name), torch.tensor([0.2, 0.5, 0.9])
    inputs = noise(name), sigma, words(name)[0]
    network = case.pipeline.transformer
    expected = by_hand(network, case.contract, *inputs).mean(1)
    velocity, features = velocity_and_features(network, case.contract, "proj_out", *inputs)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(velocity, case.contract.velocity(network, *inputs))
    assert features.std() > 0.01 and len(features) == BATCH


@pytest.mark.parametrize("name", TEACHERS)
def test_every_teacher_runs_an_adversarial_step(name):
    """Features that are a mean over as many tokens as the image has, of the sample's own; then both turns."""
    case, config = learned(name), config_of(name)
    module, transformer = config.discriminator_features, case.pipeline.transformer
    seen = []
    hook = transformer.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x_t = noise(name).requires_grad_()
    _, features = velocity_and_features(
        transformer, case.contract, module, x_t, torch.tensor([0.2, 0.5, 0.9]), words(name)[0]
    )
    hook.remove()
    assert features.shape == (BATCH, transformer.get_submodule(module).in_features)
    tokens = x_t[0].numel() // (transformer.get_submodule(module).out_features // (2 if name == "lumina" else 1))
    gradients = torch.autograd.grad(features[1].sum(), seen, retain_graph=True, allow_unused=True)
    shares = torch.cat([g.flatten(0, -2) for g in gradients if g is not None])
    assert (shares != 0).all(1).sum() == tokens and torch.allclose(shares[shares != 0], torch.tensor(1 / tokens))
    (gradient,) = torch.autograd.grad(features[1].square().sum(), x_t)
    assert [bool(of_sample.any()) for of_sample in gradient] == [False, True, False]

    networks = networks_of(name)
    for turn, loss_of in (("fake_score", fake_score_turn), ("generator", generator_turn)):
        with networks.training(turn):
            loss, metrics = loss_of(networks, case.contract, batch(name), config)
            loss.backward()
        assert loss.isfinite() and moved(getattr(networks, turn))
        assert all(value.isfinite() for value in metrics.values())
    assert not moved(networks.teacher)


def last_text(name, output):
    """The text tokens in what the last block returns, as a view."""
    if name == "flux":
        return output[0]
    lengths = words(name)[0].tensors
    if name == "lumina2":
        return output[:, : int(lengths["encoder_attention_mask"].sum(1).min())]
    return output[learned(name).contract.latent_input_shape[1] * learned(name).contract.latent_input_shape[2] :]


@pytest.mark.parametrize(
    ("name", "blocks"), [("flux", "single_transformer_blocks"), ("lumina2", "layers"), ("ernie image", "layers")]
)
def test_text_tokens_are_not_among_the_features(name, blocks):
    """Other text tokens behind the last attention change nothing; other image tokens do."""
    case, module = learned(name), config_of(name).discriminator_features
    inputs = noise(name), torch.full((BATCH,), 0.5), words(name)[0]
    block = getattr(case.pipeline.transformer, blocks)[-1]

    def features(change):
        hook = block.register_forward_hook(lambda _, args, output: change(output))
        try:
            return velocity_and_features(case.pipeline.transformer, case.contract, module, *inputs)[1].detach()
        finally:
            hook.remove()

    def other_text(output):
        with torch.no_grad():
            last_text(name, output).add_(torch.randn_like(last_text(name, output)))

    def other_image(output):
        with torch.no_grad():
            whole = output if isinstance(output, torch.Tensor) else output[1]
            whole.add_(torch.randn_like(whole))

    plain = features(lambda output: None)
    assert torch.equal(features(other_text), plain)
    assert not torch.allclose(features(other_image), plain)


def test_guided_features_are_the_conditional_halfs():
    """For prompts of different lengths, which go to the network in calls of their own."""
    case, (conditional, unconditional) = learned("qwen image"), words("qwen image")
    inputs = noise("qwen image"), torch.tensor([0.2, 0.5, 0.9])
    network = case.pipeline.transformer
    velocity, features = guided_velocity_and_features(
        network, case.contract, "proj_out", *inputs, conditional, unconditional, 3.0, "cfg"
    )
    for row in range(BATCH):
        alone = velocity_and_features(
            network, case.contract, "proj_out", *(part[[row]] for part in (*inputs, conditional))
        )[1]
        torch.testing.assert_close(features[[row]], alone, rtol=1e-4, atol=1e-5)
    guided = case.contract.guided_velocity(network, *inputs, conditional, unconditional, 3.0, "cfg")
    assert torch.equal(velocity, guided)
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradient mode on"):
        velocity_and_features(network, case.contract, "proj_out", *inputs, conditional)


@pytest.mark.parametrize("autocast", [False, True])
def test_features_in_bfloat16(autocast):
    """Tokens are told apart as in float32: text of different lengths stands before the image."""
    case, inputs = learned("lumina2"), (noise("lumina2"), torch.tensor([0.2, 0.5, 0.9]), words("lumina2")[0])
    network, module = case.pipeline.transformer, "norm_out.linear_2"
    expected = velocity_and_features(network, case.contract, module, *inputs)[1]
    low = network if autocast else copy.deepcopy(network).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        features = velocity_and_features(low, case.contract, module, *inputs)[1]
    assert features.dtype == torch.float32
    assert 0 < (features - expected).norm() / expected.norm() < 0.05


class Scaled(ToyTransformer):
    """Twice what the projection gives: no reshaping. One layer never runs."""

    def __init__(self):
        super().__init__()
        self.spare = torch.nn.Linear(8, 3)

    def forward(self, picture, clock, words):
        return (2 * super().forward(picture, clock, words)[0],)


def test_what_cannot_be_found_is_refused_or_named():
    pipeline = toy()
    pipeline.transformer = Scaled()
    contract = learn_contract(pipeline, height=8, width=8)
    with pytest.raises(UserError, match="becomes its output by reshaping alone; name .* --discriminator_features"):
        find_projection(pipeline, contract)
    assert find_projection(pipeline, contract, "write") == "write"
    with pytest.raises(UserError, match="final is no module of Scaled: its last linear layers are write, text, spare"):
        find_projection(pipeline, contract, "final")
    with pytest.raises(UserError, match="spare does not hold them"):
        find_projection(pipeline, contract, "spare")
    assert all(parameter.requires_grad for parameter in pipeline.transformer.parameters())
    assert not pipeline.transformer.write._forward_hooks and not pipeline.transformer._forward_hooks


@pytest.mark.parametrize(
    "module", ["norm_out.linear", "transformer_blocks.1", "transformer_blocks.1.norm1", "pos_embed"]
)
def test_a_module_that_sees_no_image_tokens_is_refused(module):
    """Among them the modulation of the last norm, whose input is the time and the text, for all latents the same."""
    case = learned("sd3")
    with pytest.raises(UserError, match=f"--discriminator_features {module} does not hold them"):
        find_projection(case.pipeline, case.contract, module)
    assert find_projection(case.pipeline, case.contract, "proj_out") == "proj_out"


# --------------------------------------------------------------------------------------------------------------- turns


@pytest.mark.parametrize(
    ("kind", "layers"),
    [("full", None), ("lora_fake", None), ("lora", None), ("lora", "to_q,to_out.0,norm_out.linear,proj_out")],
)
def test_each_term_moves_one_network(kind, layers):
    """The discriminator's term alone, and the generator's: SiD is taken away, not trained."""
    networks, contract, config = (
        networks_of("sd3", kind, lora_layers=layers),
        learned("sd3").contract,
        config_of("sd3"),
    )
    for turn, loss_of, without in (
        ("fake_score", fake_score_turn, sid.fake_score_turn),
        ("generator", generator_turn, sid.generator_turn),
    ):
        share = 0.5 if turn == "generator" else 1.0
        with networks.training(turn):
            loss = loss_of(networks, contract, batch("sd3"), config)[0]
            loss = loss - share * without(networks, contract, batch("sd3"), config)[0]
            loss.backward()
        roles = {"teacher": networks.teacher, "generator": networks.generator, "fake_score": networks.fake_score}
        assert {name for name, network in roles.items() if moved(network)} == {turn}
        length = sum(p.grad.square().sum() for p in roles[turn].parameters() if p.grad is not None).sqrt()
        assert length > 1e-3
        roles[turn].zero_grad()


def test_the_turns_are_their_formulas():
    """Same noise and sigma for real and fake; the conditional half; weights and scale."""
    networks, contract, one = networks_of("flux"), learned("flux").contract, batch("flux", measured=True)
    config = config_of("flux", adversarial_weight=0.25, guidance_mode="both", fake_guidance_mode="both")
    conditional, elements = one.conditional.with_embedded_guidance(4.5), noise("flux")[0].numel()
    x0 = sid.generate(networks, contract, one, config)

    def logits(latents):
        x_t = flow.add_noise(latents, one.noise, one.sigma)
        return by_hand_flux(networks.fake_score, contract, x_t, one.sigma, conditional).mean(1)

    loss, metrics = fake_score_turn(networks, contract, batch("flux"), config)
    plain, _ = sid.fake_score_turn(networks, contract, batch("flux"), config)
    softplus = torch.nn.functional.softplus
    expected = elements * (softplus(-logits(one.real)).mean() + softplus(logits(x0)).mean()) / 2
    assert (loss - plain).item() == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["x0_std"].item() == pytest.approx(x0.std(correction=0).item(), rel=1e-5)

    loss, metrics = generator_turn(networks, contract, one, config)
    plain, _ = sid.generator_turn(networks, contract, batch("flux"), config)
    expected = elements * ((1 - one.sigma) * softplus(-logits(x0)).mean(1)).mean()
    assert loss.item() == pytest.approx((0.75 * plain + 0.25 * expected).item(), rel=1e-4)
    assert metrics["adversarial_loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert 0 < metrics["adversarial_share"] < 1
    assert torch.equal(one.x0, x0.detach())


def test_the_share_is_of_the_gradients_at_x0():
    """All of it without SiD, none of it without the adversarial term."""
    networks, contract = networks_of("sd3"), learned("sd3").contract
    for weight in (0.0, 1.0):
        config = config_of("sd3", adversarial_weight=weight)
        assert (
            generator_turn(networks, contract, batch("sd3", measured=True), config)[1]["adversarial_share"] == weight
        )
    assert "adversarial_share" not in generator_turn(networks, contract, batch("sd3"), config)[1]


def test_real_images_have_their_own_captions():
    """What the fake score is given: twice the samples for its own loss, then the real ones with their prompts."""
    networks, contract, one = networks_of("sd3"), learned("sd3").contract, batch("sd3")
    calls = []
    networks.fake_score.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    fake_score_turn(networks, contract, one, config_of("sd3"))
    assert [len(call["hidden_states"]) for call in calls] == [2 * BATCH, BATCH]
    for argument in ("encoder_hidden_states", "pooled_projections"):
        assert torch.equal(calls[1][argument], one.conditional.tensors[argument])
        assert torch.equal(calls[1][argument], calls[0][argument][BATCH:])
    assert torch.equal(calls[1]["hidden_states"], flow.add_noise(one.real, one.noise, one.sigma))
    assert torch.equal(calls[1]["timestep"], calls[0]["timestep"][BATCH:])


def gradient_of(networks, turn, loss_of):
    with networks.training(turn):
        loss_of(networks, learned("sd3").contract, batch("sd3", measured=True), config_of("sd3"))[0].backward()
    return torch.cat([p.grad.flatten() for p in getattr(networks, turn).parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(("turn", "loss_of"), [("fake_score", fake_score_turn), ("generator", generator_turn)])
def test_gradient_checkpointing_changes_nothing(kind, turn, loss_of):
    plain, checkpointed = networks_of("sd3", kind), networks_of("sd3", kind)
    checkpointed.enable_gradient_checkpointing()
    first, second = (gradient_of(networks, turn, loss_of) for networks in (plain, checkpointed))
    assert first.abs().max() > 0 and torch.allclose(first, second, rtol=1e-4, atol=1e-4 * first.abs().max())


def test_the_gate_is_in_images():
    config = AdversarialConfig()
    assert adversarial_turns(config, 19_999) == {"fake_score": fake_score_turn}
    for seen in (20_000, 39_999):
        assert adversarial_turns(config, seen) == {"fake_score": fake_score_turn, "generator": sid.generator_turn}
    assert adversarial_turns(config, 40_000) == {"fake_score": fake_score_turn, "generator": generator_turn}
