# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Every teacher from its own call to a student that stock diffusers loads: contract, replay, training, export."""

import copy
import inspect
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    ConfigMixin,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.utils.torch_utils import randn_tensor
from teacher_cases import TEACHERS, learned, learned_in_bfloat16

from hf_flowdistill.flow import guide
from hf_flowdistill.flow.rollout import Sampler, rollout
from hf_flowdistill.hub.export import export_student
from hf_flowdistill.hub.settings import read_settings
from hf_flowdistill.hub.student import few_step_pipeline
from hf_flowdistill.methods.sid import SiDBatch, SiDConfig, fake_score_turn, generator_turn
from hf_flowdistill.networks.roles import Networks
from hf_flowdistill.teachers import decode, encode_prompts, learn_contract
from hf_flowdistill.teachers.inference import as_batch, relative_error


PROMPTS = ["a red ball", 'two cats on a long table under a sign that says "cats"']
NEGATIVE = "a bad ball"  # as long as the first prompt
SCALE = 3.0


@pytest.fixture(scope="module", params=TEACHERS)
def case(request):
    return learned(request.param)


@pytest.fixture(scope="module", params=TEACHERS)
def low_case(request):
    return learned_in_bfloat16(request.param)


def record(case, prompt, **call):
    """[(latents, velocity, sigma, transformer outputs)] at each step of the pipeline's own call, with plain hooks."""
    pipeline, outputs, steps = case.pipeline, [], []
    scheduler = pipeline.scheduler = copy.deepcopy(case.own_scheduler)
    step, signature = scheduler.step, inspect.signature(scheduler.step)

    def recorded(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        result = step(*args, **kwargs)
        sigma = scheduler.sigmas[scheduler.step_index - 1]
        steps.append((given["sample"].clone(), given["model_output"].clone(), sigma, outputs.copy()))
        outputs.clear()
        return result

    scheduler.step = recorded
    recorded.__signature__ = signature
    hook = pipeline.transformer.register_forward_hook(
        lambda _, args, output: outputs.append(as_batch(output if isinstance(output, list) else output[0]))
    )
    size = {"height": case.teacher.size, "width": case.teacher.size}
    generator = torch.Generator().manual_seed(7)
    try:
        call = {key: copy.copy(value) for key, value in call.items()}  # one pipeline writes its template into the list
        call = {**case.teacher.kwargs, "output_type": "latent", "num_inference_steps": 3, **size, **call}
        pipeline(prompt=[prompt], generator=generator, **call)
    finally:
        hook.remove()
        pipeline.scheduler = case.original_scheduler
    return steps


@pytest.fixture(autouse=True)
def schedulers(request):
    """SANA is published with a solver that rounds the network's time; the flow's own Euler sampler does not."""
    from hf_flowdistill.teachers.watch import own_scheduler

    for name in {"case", "low_case"} & set(request.fixturenames):
        case = request.getfixturevalue(name)
        case.original_scheduler = case.pipeline.scheduler
        case.own_scheduler = own_scheduler(case.pipeline)
    yield


def test_replays_the_pipelines_own_call(case):
    off = case.contract.guidance.arguments(on=False)
    with guiders_set(case.pipeline, enabled=False):
        steps = [step for prompt in PROMPTS for step in record(case, prompt, **off)]
    conditional, _ = encode_prompts(case.pipeline, case.contract, PROMPTS)
    x_t, expected = (torch.cat(parts) for parts in list(zip(*steps))[:2])
    with torch.no_grad():
        replayed = case.contract.velocity(
            case.pipeline.transformer, x_t, torch.stack([step[2] for step in steps]), conditional[[0] * 3 + [1] * 3]
        )
    assert expected.std() > 0.01
    assert relative_error(replayed, expected) <= 1e-4


def test_replays_the_pipelines_own_guided_call(case):
    contract, guidance = case.contract, case.contract.guidance
    if guidance.kind == "none":
        pytest.skip("the pipeline has no classifier-free guidance")
    prompts = PROMPTS[:1] if pads_one_half(case) else PROMPTS
    takes_negative = "negative_prompt" in inspect.signature(type(case.pipeline).__call__).parameters
    negative = NEGATIVE if takes_negative else ""
    call = {"negative_prompt": [negative]} if takes_negative else {}
    if guidance.argument is not None:
        call[guidance.argument] = SCALE - 1 + guidance.off
    with guiders_set(case.pipeline, enabled=True):
        steps = [step for prompt in prompts for step in record(case, prompt, **call)]
    conditional, unconditional = encode_prompts(case.pipeline, contract, prompts, negative_prompt=negative)
    conditional, sigma = (
        conditional[[row for row in range(len(prompts)) for _ in range(3)]],
        torch.stack([step[2] for step in steps]),
    )
    x_t, expected = (torch.cat(parts) for parts in list(zip(*steps))[:2])
    with torch.no_grad():
        arguments = case.pipeline.transformer, x_t, sigma, conditional
        replayed = contract.guided_velocity(*arguments, unconditional, SCALE)
        unguided = contract.velocity(*arguments)
    if not guidance.plain and not any(isinstance(c, BaseGuidance) for c in case.pipeline.components.values()):
        assert relative_error(replayed, expected) > 1e-3  # the pipeline rescales; its two halves must fit all the same
        expected = torch.cat([guide(*halves(contract, step[3]), SCALE) for step in steps])
    assert relative_error(replayed, unguided) > 2e-4
    assert relative_error(replayed, expected) <= 1e-4


def pads_one_half(case):
    """Whether the pipeline pads the shorter half of guidance to the longer one, which training does not."""
    ragged = [slot for slot in case.contract.slots.values() if slot.ragged is not None and slot.kind == "tensor"]
    return case.contract.guidance.kind == "doubled" and bool(ragged)


def halves(contract, outputs):
    if contract.guidance.kind == "doubled":
        outputs = outputs[0].chunk(2)
    outputs = [
        contract.output_sign * (output.narrow(*contract.output_part) if contract.output_part else output)
        for output in outputs
    ]
    outputs = [output.reshape(-1, *contract.latent_shape) for output in outputs]
    return outputs[::-1] if contract.guidance.conditional_first else outputs


def test_as_many_calls_as_rows_where_lengths_may_differ(case):
    """Equal texts too, if the contract says so, and nothing else changes."""
    contract, calls = replace(case.contract, row_by_row=True), []
    conditional, _ = encode_prompts(case.pipeline, contract, [*PROMPTS, PROMPTS[0]])
    rows = conditional[[0, 0, 1]]
    x_t = torch.randn(3, *contract.latent_shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.3, 0.5, 0.9])
    hook = case.pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found, expected = (
            one.velocity(case.pipeline.transformer, x_t, sigma, rows) for one in (contract, case.contract)
        )
    hook.remove()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    depends = any(
        slot.kind == "shared" or (slot.kind == "tensor" and slot.ragged is not None)
        for slot in contract.slots.values()
    )
    assert len(calls) == (3 + 2 if depends else 1 + 1)


class guiders_set:
    """Plain guidance at SCALE, or none, in the place of a pipeline's own guiders."""

    def __init__(self, pipeline, enabled):
        self.pipeline, self.enabled = pipeline, enabled
        self.kept = {n: c for n, c in pipeline.components.items() if isinstance(c, BaseGuidance)}

    def __enter__(self):
        for name in self.kept:
            setattr(self.pipeline, name, ClassifierFreeGuidance(SCALE, enabled=self.enabled))

    def __exit__(self, *_):
        for name, component in self.kept.items():
            setattr(self.pipeline, name, component)


def test_trains_exports_and_reloads(case, tmp_path):
    networks = train_two_steps(case)
    stock, student = exported(case, tmp_path / "student", networks.generator)
    image, x0 = draw(case, student, "fresh")

    # The stock class alone: its noise comes from the global generator.
    torch.manual_seed(3)
    call = {"num_inference_steps": 4, **case.contract.student_arguments(4), **arguments(case)}
    np.testing.assert_array_equal(stock(prompt=["a cat"], output_type="np", return_dict=False, **call)[0], image)

    # What training calls the generator, decoded: the same image. The one pipeline with a table of times rounds them.
    tolerance = 1e-4 if case.contract.time_table is None else 2e-2
    assert image.std() > 1e-3
    np.testing.assert_allclose(decode(case.pipeline, case.contract, x0, "np"), image, rtol=0, atol=tolerance)


@pytest.mark.parametrize("noise_type", ["fixed", "ddim"])
@pytest.mark.parametrize("name", ["z image", "prx", "kandinsky5", "hidream", "ernie image"])
def test_draws_with_the_other_noise_types(name, noise_type, tmp_path):
    case = learned(name)
    _, student = exported(case, tmp_path / "student", case.pipeline.transformer, noise_type)
    image, x0 = draw(case, student, noise_type)
    np.testing.assert_allclose(decode(case.pipeline, case.contract, x0, "np"), image, rtol=0, atol=1e-4)


def arguments(case):
    return {**case.teacher.kwargs, "height": case.teacher.size, "width": case.teacher.size}


def exported(case, folder, transformer, noise_type="fresh"):
    """The student's folder loaded by stock diffusers, as it is and with its own sampling."""
    export_student(
        case.pipeline,
        folder,
        Sampler(noise_type=noise_type),
        transformer=transformer,
        contract=case.contract,
        pipeline_kwargs=arguments(case),
    )
    given = {name: getattr(case.pipeline, name) for name in case.teacher.unsaved}
    stock = case.teacher.settled(DiffusionPipeline.from_pretrained(folder, dtype=case.contract.dtype, **given))
    stock.set_progress_bar_config(disable=True)
    assert type(stock) is type(case.pipeline)
    return stock, few_step_pipeline(stock, read_settings(folder))


def draw(case, student, noise_type):
    """The student's image from a seed, and the x0 that training's rollout gives from the same noise."""
    latents, contract = [], case.contract
    signature = inspect.signature(type(student.transformer).forward)
    hook = student.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: latents.append(
            as_batch(signature.bind(None, *args, **kwargs).arguments[contract.latent_argument]).clone()
        ),
        with_kwargs=True,
    )
    seeded = torch.Generator().manual_seed(3)
    image = student(prompt=["a cat"], generator=seeded, output_type="np", return_dict=False)[0]
    hook.remove()
    assert len(latents) == 4
    seeded = torch.Generator().manual_seed(3)
    noises = [torch.randn(1, *contract.latent_shape, generator=seeded) for _ in range(4)]
    noises[0] = latents[0].reshape(noises[0].shape)  # the same numbers, as the pipeline packs them
    conditioning = encode_prompts(case.pipeline, contract, ["a cat"])[0].with_embedded_guidance(1.0)
    with torch.no_grad():
        x0 = rollout(
            lambda x_t, sigma: contract.velocity(student.transformer, x_t, sigma, conditioning),
            noises.__getitem__,
            noise_type=noise_type,
        )
    return image, x0


def train_two_steps(case, dtype=torch.float32):
    contract, generator = case.contract, torch.Generator().manual_seed(0)
    networks = Networks.from_teacher(copy.deepcopy(case.pipeline.transformer), dtype)
    conditional, unconditional = encode_prompts(case.pipeline, contract, PROMPTS)
    config = SiDConfig(loss_scale=1.0)
    before = {name: copy.deepcopy(network.state_dict()) for name, network in vars(networks).items()}
    turns = {"fake_score": fake_score_turn, "generator": generator_turn}
    learning_rate = 1e-3 if dtype == torch.float32 else 1e-2  # a weight of 1 in bfloat16 has no neighbour within .003
    optimizers = {name: torch.optim.Adam(getattr(networks, name).parameters(), lr=learning_rate) for name in turns}
    for _ in range(2):
        for name, turn in turns.items():
            shape = (len(PROMPTS), *contract.latent_shape)
            batch = SiDBatch(
                conditional=conditional,
                unconditional=unconditional,
                k=2,
                noises=lambda i, shape=shape: torch.randn(shape, generator=generator),
                sigma=torch.tensor([0.7, 0.4]),
                noise=torch.randn(shape, generator=generator),
            )
            with networks.training(name):
                loss, metrics = turn(networks, contract, batch, config)
                loss.backward()
            assert loss.isfinite()
            optimizers[name].step()
            optimizers[name].zero_grad()
    for name, network in vars(networks).items():
        changed = [not torch.equal(value, before[name][key]) for key, value in network.state_dict().items()]
        assert any(changed) == (name in turns)
        assert name not in turns or sum(changed) > 0.7 * len(changed)
    return networks


def replay_error(case, prompt=PROMPTS[0]):
    """Of the pipeline's own unguided call in bfloat16, at the times that it fed."""
    times = []
    signature = inspect.signature(type(case.pipeline.transformer).forward)
    hook = case.pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: times.append(
            signature.bind(None, *args, **kwargs).arguments[case.contract.time_argument].flatten()[0].double()
        ),
        with_kwargs=True,
    )
    with guiders_set(case.pipeline, enabled=False):
        steps = record(case, prompt, **case.contract.guidance.arguments(on=False))
    hook.remove()
    x_t, expected = (torch.cat(parts) for parts in list(zip(*steps))[:2])
    sigmas = torch.stack([step[2] for step in steps]).double()
    order = sigmas.argsort()
    contract = replace(case.contract, time_table=(sigmas[order], torch.stack(times)[order]))
    conditional, _ = encode_prompts(case.pipeline, contract, [prompt])
    with torch.no_grad():
        replayed = contract.velocity(case.pipeline.transformer, x_t, sigmas.float(), conditional)
    assert expected.std() > 0.01
    return relative_error(replayed, expected)


def test_in_bfloat16_from_its_own_call_to_a_student(low_case, tmp_path):
    """Contract, replay within the stated tolerance, two steps, export, and reload: all in bfloat16."""
    case = low_case
    assert case.contract.dtype == torch.bfloat16 and case.contract.replay_error <= 0.05
    assert replay_error(case) <= case.teacher.bfloat16
    networks = train_two_steps(case, torch.bfloat16)
    stock, student = exported(case, tmp_path / "student", networks.generator)
    seeded = torch.Generator().manual_seed(3)
    image = student(prompt=["a cat"], generator=seeded, output_type="np", return_dict=False)[0]
    torch.manual_seed(3)
    call = {"num_inference_steps": 4, **case.contract.student_arguments(4), **arguments(case)}
    np.testing.assert_array_equal(stock(prompt=["a cat"], output_type="np", return_dict=False, **call)[0], image)
    assert np.isfinite(image).all() and image.std() > 1e-3


class Denoiser(ModelMixin, ConfigMixin):
    """Tokens in, tokens out; an angle for a time, and words in a list inside a dictionary."""

    @register_to_config
    def __init__(self, channels: int = 8, width: int = 16):
        super().__init__()
        self.read, self.write = torch.nn.Linear(channels, width), torch.nn.Linear(width, 2 * channels)
        self.text = torch.nn.Linear(3, width)

    def forward(self, tokens, angle, prompt, grid):
        words = torch.stack([self.text(row).tanh().sum(0) for row in prompt["words"]]) + self.text(prompt["style"])
        hidden = self.read(tokens) + (words * torch.cos(angle)[:, None])[:, None] + grid.sum(-1)[None, :, None]
        return (self.write(torch.tanh(hidden)),)


class HomeMadePipeline(DiffusionPipeline):
    """No argument is named as diffusers names it, the time is an angle, the latents are packed into tokens of 2x2."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def words(self, prompts):
        return [torch.tensor([[ord(letter) % 5 / 4, len(text) / 9, 1.0] for letter in text + "."]) for text in prompts]

    def velocity(self, tokens, sigma, prompts, grid):
        angle = torch.atan2(sigma, 1 - sigma).expand(len(tokens))
        style = torch.tensor([[len(text) / 30, 0.5, -0.5] for text in prompts])
        (output,) = self.transformer(tokens, angle, prompt={"words": self.words(prompts), "style": style}, grid=grid)
        return -output[..., output.shape[-1] // 2 :]

    @torch.no_grad()
    def __call__(
        self,
        prompt,
        height=16,
        width=16,
        num_inference_steps=4,
        guidance_scale=2.0,
        negative_prompt=None,
        generator=None,
        output_type="np",
    ):
        image = randn_tensor((len(prompt), 2, height // 4, width // 4), generator=generator)
        tokens = image.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        grid = torch.cartesian_prod(torch.arange(height // 8), torch.arange(width // 8)) / 4
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            velocity = self.velocity(tokens, t / 1000, prompt, grid)
            if guidance_scale > 0:
                without = self.velocity(tokens, t / 1000, negative_prompt or [""] * len(prompt), grid)
                velocity = velocity + guidance_scale * (velocity - without)
            tokens = self.scheduler.step(velocity, t, tokens).prev_sample
        return (tokens if output_type == "latent" else tokens.numpy(),)


def test_a_pipeline_class_written_after_the_fact():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = HomeMadePipeline(Denoiser(), FlowMatchEulerDiscreteScheduler(shift=2.0))
    contract = learn_contract(pipeline, height=16, width=16)
    told = contract.as_dict()
    assert told["latent"] == "tokens [4, 8]"
    assert told["time"].startswith("angle = table of sigma")
    assert told["velocity"] == "-last 8 along dimension 2"
    assert told["conditioning"] == ["prompt.style", "prompt.words"]
    assert told["varying_length"] == ["prompt.words"]
    assert (told["guidance"], told["guidance_argument"]) == (
        "two calls, conditional first",
        "guidance_scale (off at 0)",
    )

    conditional, unconditional = encode_prompts(pipeline, contract, PROMPTS, negative_prompt=NEGATIVE)
    x_t = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    sigma, grid = torch.tensor([0.93, 0.12]), torch.cartesian_prod(torch.arange(2), torch.arange(2)) / 4
    guided = contract.guided_velocity(pipeline.transformer, x_t, sigma, conditional, unconditional, SCALE)
    for row, prompt in enumerate(PROMPTS):
        with_prompt, without = (
            pipeline.velocity(x_t[row : row + 1], sigma[row], [text], grid) for text in (prompt, NEGATIVE)
        )
        assert relative_error(guided[row : row + 1], guide(without, with_prompt, SCALE)) <= 1e-4
    train_two_steps(SimpleNamespace(pipeline=pipeline, contract=contract))
