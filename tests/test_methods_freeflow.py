# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""FreeFlow's two turns on tiny pipelines: the equations, who receives gradient, how many passes it takes."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from teacher_cases import learned

from hf_flowdistill import flow
from hf_flowdistill.cli import ArgumentParser
from hf_flowdistill.data.stream import PromptStream
from hf_flowdistill.errors import UserError
from hf_flowdistill.methods.freeflow import FreeFlow
from hf_flowdistill.methods.freeflow_arguments import add_freeflow_arguments, check_freeflow_arguments
from hf_flowdistill.methods.freeflow_turns import check_derivative, guided
from hf_flowdistill.methods.method import Samples, Size
from hf_flowdistill.networks import flow_map
from hf_flowdistill.networks.flow_map import GUIDANCE, JUMP
from hf_flowdistill.networks.roles import Networks
from hf_flowdistill.teachers import encode_prompts


PROMPTS = ["red circle", "blue square", "green"]
ROWS = 8


def method_of(*words, case="sd3", images=15_000, **more):
    parser = ArgumentParser(prog="x")
    add_freeflow_arguments(parser)
    args = parser.parse_args(list(words))
    values = {"max_train_images": images, "sharding": "none", "gradient_accumulation_steps": 1, "seed": 0, **more}
    for name, value in values.items():
        setattr(args, name, value)
    check_freeflow_arguments(args)
    method = FreeFlow(args)
    method.settle(learned(case).pipeline, learned(case).contract)
    return method


@functools.cache
def conditioning(case):
    return encode_prompts(learned(case).pipeline, learned(case).contract, PROMPTS)


def samples(case="sd3", indices=range(ROWS), number=0):
    conditional, unconditional = conditioning(case)
    size = Size(learned(case).contract, conditional, unconditional)
    prompts = PromptStream(PROMPTS, 0)
    return Samples(0, 3, 16, ROWS, indices, number, size, prompts, None, "cpu")


def networks_of(method, case="sd3", scale=0.05):
    """Networks that have learned something: other than the teacher, and told."""
    networks = Networks.from_teacher(copy.deepcopy(learned(case).pipeline.transformer), trains=method.trains)
    method.equip(networks)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for network in networks.trained().values():
            for parameter in network.parameters():
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return networks


def run(method, networks, config, indices=range(ROWS), case="sd3", number=0, turns=("generator", "fake_score")):
    """{turn: (loss, metrics, gradients by name)} of one micro-batch."""
    update, found = method.update(3, 16), {}
    for turn in turns:
        batch = update.draw(turn, samples(case, indices, number))
        with networks.training(turn) as network:
            loss, metrics = update.turns[turn](networks, learned(case).contract, batch, config)
            loss.backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        found[turn] = loss.detach(), metrics, gradients
        assert all(p.grad is None for p in networks.teacher.parameters())
        network.zero_grad()
    return found


@pytest.mark.parametrize("solver", ["euler", "heun"])
@torch.no_grad()
def test_the_generators_loss_is_equations_14_and_11(solver):
    """Written out in the paper's signs: u and F point from noise to data."""
    method = method_of("--solver", solver, "--prediction_decay=0.5", "--jump_zeros=0.3", "--guidance_interval=0.7")
    networks, config = networks_of(method), replace(method.config, balance=2.5, confident_level=0.4)
    contract, one = learned("sd3").contract, samples()
    with torch.enable_grad():
        loss, metrics, _ = run(method, networks, config)["generator"]
    batch = method.update(3, 16).draw("generator", one)
    early, late = batch.prediction, batch.correction
    assert (len(early.z), len(late.z)) == (6, 2)

    def shaped(values):
        return values.reshape(-1, 1, 1, 1)

    def F(part, jump):
        ones = torch.ones(len(part.z))
        told = {JUMP: jump, GUIDANCE: part.guidance}
        return -flow_map.velocity(networks.generator, contract, part.z, ones, part.conditional, **told)

    def u(part, x_t, t, gamma):
        conditional = contract.velocity(networks.teacher, x_t, t, part.conditional)
        unconditional = contract.velocity(networks.teacher, x_t, t, part.unconditional)
        return -(shaped(gamma) * conditional + (1 - shaped(gamma)) * unconditional)

    def asked(x_t, t):
        raised = shaped(t) < 0.4
        share = 0.6 / (1 - shaped(t).clamp(max=0.99))
        noised = share * x_t + (0.4**2 - share**2 * shaped(t) ** 2).clamp(min=0).sqrt() * early.noise
        return u(early, torch.where(raised, noised, x_t), t.clamp(min=0.4), early.guidance)

    start = 1 - early.sigma
    assert set((8 * start).tolist()) <= set(range(8)) and (1 <= early.guidance).all() and (early.guidance <= 2).all()
    before, after = F(early, start), F(early, start + 1 / 8)
    f, f_next = early.z + shaped(start) * before, early.z + shaped(start + 1 / 8) * after
    velocity = asked(f, 1 - start)
    if solver == "heun":
        velocity = (velocity + asked(f + velocity / 8, 1 - start - 1 / 8)) / 2
    gap = 8 * (f_next - f) - velocity
    squares = gap.square().mean((1, 2, 3))
    weighted = gap / shaped((squares + 1e-4) ** 0.5)

    x0 = late.z + F(late, torch.ones(2))
    x_r = flow.add_noise(x0, late.noise, late.sigma)
    told = {GUIDANCE: late.guidance}
    v_N = -flow_map.velocity(networks.fake_score, contract, x_r, late.sigma, late.conditional, **told)
    gamma = torch.where(late.sigma <= 0.7, late.guidance, 1.0)
    other = v_N - u(late, x_r, late.sigma, gamma)
    expected = (weighted.square().sum() + 2.5 * other.square().sum()) / 2 / ROWS
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert metrics["prediction_gap"].item() == pytest.approx(squares.sqrt().mean().item(), rel=1e-3)
    sizes = other.square().mean((1, 2, 3)).sqrt().mean()
    assert metrics["correction_gap"].item() == pytest.approx(sizes.item(), rel=1e-3)
    assert metrics["x0_mean"].item() == pytest.approx(x0.mean().item(), rel=1e-3)


@pytest.mark.parametrize("words", [[], ["--derivative=jvp"], ["--guidance_range", "1.5", "1.5"]])
def test_each_turn_reaches_its_own_network_and_all_of_it(words):
    method = method_of(*words)
    networks = networks_of(method)
    for turn, (loss, metrics, gradients) in run(method, networks, method.config).items():
        names = {name for name, _ in getattr(networks, turn).named_parameters()}
        assert gradients.keys() == names and loss.isfinite() and all(torch.isfinite(v) for v in metrics.values())
        assert any(gradients[name].any() for name in names if "flow_map" in name) or not any(
            "flow_map" in name for name in names
        )


def test_micro_batches_and_processes_make_no_difference():
    """Gradients and metrics of eight samples, and the means of those of two at a time, some of one objective alone."""
    method = method_of("--solver=euler")
    networks, config = networks_of(method), replace(method.config, balance=0.7)
    whole = run(method, networks, config)
    made, parts = [], {"generator": [], "fake_score": []}
    update = method.update(3, 16)
    for turn, found in parts.items():
        for number in range(4):
            batch = update.draw(turn, samples(indices=range(2 * number, 2 * number + 2), number=number))
            with networks.training(turn) as network:
                loss, metrics = update.turns[turn](networks, learned("sd3").contract, batch, config)
                loss.backward()
            found.append((loss.detach(), metrics))
        made.append({name: p.grad / 4 for name, p in network.named_parameters()})
        network.zero_grad()
    for (turn, (loss, metrics, gradients)), mine in zip(whole.items(), made):
        assert torch.stack([loss for loss, _ in parts[turn]]).mean().item() == pytest.approx(loss.item(), rel=1e-4)
        for name, value in metrics.items():
            mean = sum(found[name].item() for _, found in parts[turn]) / 4
            assert mean == pytest.approx(value.item(), rel=1e-3, abs=1e-5)
        size = max(gradient.abs().max() for gradient in gradients.values())
        assert all((mine[name] - gradient).abs().max() < 1e-4 * size for name, gradient in gradients.items())


def test_a_process_without_samples_of_an_objective_has_gradients_all_the_same():
    method = method_of()
    networks = networks_of(method)
    found = run(method, networks, method.config, indices=range(0, 2))
    _, _, gradients = found["fake_score"]
    assert gradients.keys() == {name for name, _ in networks.fake_score.named_parameters()}
    assert not any(gradient.any() for gradient in gradients.values())
    resting = run(method, networks, replace(method.config, corrects=False), indices=range(6, 8))
    assert not any(gradient.any() for gradient in resting["generator"][2].values())
    assert resting["generator"][2].keys() == {name for name, _ in networks.generator.named_parameters()}
    assert any(gradient.any() for gradient in resting["fake_score"][2].values())


PASSES = {  # an image of the batch; a backward pass is two, a jvp two
    "euler": (["--solver=euler"], 6.75),
    "heun": ([], 8.25),
    "jvp": (["--derivative=jvp"], 7.5),
    "prediction alone": (["--correction_share=0", "--solver=euler"], 6),
    "correction alone": (["--correction_share=1"], 9),
}


@pytest.mark.parametrize("kind", PASSES)
def test_how_many_passes_an_update_takes(kind):
    words, expected = PASSES[kind]
    method = method_of(*words)
    networks, counted = networks_of(method), []

    def count(network, args, kwargs, output):
        output = output[0]
        dual = torch.autograd.forward_ad.unpack_dual(output).tangent is not None if kind == "jvp" else False
        counted.append(len(output) * (1 + 2 * output.requires_grad + dual))

    for network in (networks.teacher, *networks.trained().values()):
        network.register_forward_hook(count, with_kwargs=True)
    run(method, networks, method.config, turns=("generator", "fake_score")[: len(method.trains)])
    assert sum(counted) / ROWS == expected


def test_lambda_is_that_of_the_update_before():
    method = method_of("--correction_weight=0.6")  # 15,000 images: 100 without, 100 of warm-up
    metrics = {"prediction_weighted_gap": 3.0, "correction_gap": 2.0, "x0_mean": 1.0, "x0_square": 5.0}
    assert not method.config_at(0).corrects and method.config_at(99).balance == 0
    assert method.config_at(100).corrects and method.config_at(100).balance == 0
    assert method.summarize("generator", dict(metrics))["x0_std"] == 2.0
    assert method.config_at(150).balance == pytest.approx(0.3 * 3 / 2)
    assert method.config_at(5000).balance == pytest.approx(0.6 * 3 / 2)
    method.summarize("generator", metrics | {"correction_gap": float("nan")})
    assert method.config_at(5000).balance == pytest.approx(0.6 * 3 / 2)
    assert [method.config_at(images).confident_level for images in (0, 25, 100)] == [1, 0.75, 0]
    alone = method_of("--correction_share=1")
    assert alone.config_at(0).corrects and alone.config_at(0).balance == 1


@pytest.mark.parametrize("case", ["flux", "qwen image"])
def test_every_sample_has_its_own_guidance(case):
    """Embedded, and in two passes; for prompts of any length."""
    method = method_of("--solver=euler", case=case)
    networks, contract = networks_of(method, case), learned(case).contract
    batch = method.update(3, 16).draw("generator", samples(case))
    part = batch.prediction
    with torch.no_grad():
        found = guided(networks.teacher, contract, part, part.z, part.sigma, part.guidance, method.config)
        for i in range(len(part.z)):
            alone = contract.guided_velocity(
                networks.teacher,
                part.z[[i]],
                part.sigma[[i]],
                part.conditional[[i]],
                part.unconditional,
                part.guidance[i].item(),
                method.config.guidance_mode,
            )
            assert (found[[i]] - alone).abs().max() < 1e-4 * alone.abs().max()
    assert method.config.guidance_mode == {"flux": "embedded", "qwen image": "cfg"}[case]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--guidance_range", "2", "1"], "two numbers, the lower one first"),
        (["--guidance_range", "2"], "two numbers, the lower one first"),
        (["--student_guidance_scale=3"], "outside of --guidance_range 1 2"),
        (["--derivative=jvp", "--num_jumps=4"], "--num_jumps is of the differences between jumps"),
        (["--correction_share=0", "--correction_weight=1"], "balances prediction and correction"),
        (["--correction_share=0", "--guidance_interval=1"], "is of the correction"),
        (["--correction_share=1", "--jump_mean=1"], "is of the prediction"),
        (["--correction_share=1", "--derivative=jvp"], "is of the prediction"),
    ],
)
def test_what_cannot_be_meant_is_refused(words, sentence):
    with pytest.raises(UserError, match=sentence):
        method_of(*words)


def test_shards_need_whole_micro_batches():
    with pytest.raises(UserError, match="must be a whole number"):
        method_of(sharding="full", gradient_accumulation_steps=2)
    assert method_of(sharding="full", gradient_accumulation_steps=4).args.method == "freeflow"


class Constant(torch.autograd.Function):
    """The identity, whose forward derivative is said to be zero."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def jvp(ctx, tangent):
        return torch.zeros_like(tangent)


class Backwards(torch.autograd.Function):
    """The identity, which has no forward derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()


@pytest.mark.parametrize(("layer", "sentence"), [(Constant, "relative difference 1.0"), (Backwards, "jvp")])
def test_a_wrong_forward_derivative_is_refused(layer, sentence):
    case, one = learned("sd3"), samples(indices=range(1))
    network = copy.deepcopy(case.pipeline.transformer)
    check_derivative(network, case.contract, one.noise("x"), one.conditional("x"))
    network.pos_embed.register_forward_hook(lambda module, args, output: layer.apply(output))
    with pytest.raises(UserError, match=f"{sentence}.*choose --derivative difference"):
        check_derivative(network, case.contract, one.noise("x"), one.conditional("x"))
