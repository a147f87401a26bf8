# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The contract against the pipelines' own calls, recorded here with plain hooks."""

import copy
import functools
import inspect
from types import SimpleNamespace

import pytest
import tiny_pipelines
import torch
from accelerate import cpu_offload
from diffusers import FlowMatchEulerDiscreteScheduler
from support_table import BEGIN, END, PAGE, support_table, without_errors
from tiny_pipelines import HEIGHT, WIDTH

from hf_flowdistill.flow import guide, rescale_guidance
from hf_flowdistill.teachers import encode_prompts, learn_contract


SANA = {"use_resolution_binning": False, "max_sequence_length": 16}
# name: builder, arguments of every call, arguments that switch guidance off and on, what must be learned
CASES = {
    "sd3": (
        tiny_pipelines.stable_diffusion_3,
        {"max_sequence_length": 16},
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0},
        {"time": "timestep = 1000 * sigma", "latent": "hidden_states [4, 8, 8]", "velocity": "output"},
    ),
    "sd3 without T5": (
        functools.partial(tiny_pipelines.stable_diffusion_3, with_t5=False),
        {"max_sequence_length": 0},
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0},
        {"guidance": "doubled, unconditional first", "guidance_argument": "guidance_scale"},
    ),
    "sana": (
        functools.partial(tiny_pipelines.sana, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)),
        SANA,
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0},
        {"time": "timestep = 1000 * sigma", "conditioning": ["encoder_attention_mask", "encoder_hidden_states"]},
    ),
    "sana with learned variance": (
        functools.partial(
            tiny_pipelines.sana, True, timestep_scale=0.001, scheduler=FlowMatchEulerDiscreteScheduler()
        ),
        {**SANA, "complex_human_instruction": None},
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0},
        {"time": "timestep = sigma", "velocity": "first half of the channels"},
    ),
    "flux": (
        tiny_pipelines.flux,
        {"max_sequence_length": 16, "guidance_scale": 3.5},
        {"true_cfg_scale": 1.0},
        {"true_cfg_scale": 3.0},
        {
            "time": "timestep = sigma",
            "latent": "hidden_states [16, 16]",
            "guidance": "two calls, conditional first",
            "guidance_argument": "true_cfg_scale",
            "embedded_guidance": "guidance",
        },
    ),
    "flux without embedded guidance": (
        functools.partial(tiny_pipelines.flux, guidance_embeds=False),
        {"max_sequence_length": 16},
        {"true_cfg_scale": 1.0},
        {"true_cfg_scale": 3.0},
        {"embedded_guidance": None, "constant": ["img_ids", "joint_attention_kwargs", "return_dict", "txt_ids"]},
    ),
}
PROMPTS = ["a red ball", "two cats", "x"]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return build(request.param)


@functools.cache
def build(name):
    builder, kwargs, off, on, expected = CASES[name]
    pipeline = builder()
    contract = learn_contract(pipeline, height=HEIGHT, width=WIDTH, pipeline_kwargs=kwargs)
    return SimpleNamespace(
        build=builder,
        pipeline=pipeline,
        transformer=pipeline.transformer,
        contract=contract,
        kwargs=kwargs,
        off=off,
        on=on,
        expected=expected,
    )


def record(pipeline, **call):
    """(latents, velocity, sigma) that the pipeline's scheduler was given at each step of a real call."""
    scheduler = pipeline.scheduler
    step, signature, steps = scheduler.step, inspect.signature(scheduler.step), []

    def recorded(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        result = step(*args, **kwargs)
        sigma = scheduler.sigmas[scheduler.step_index - 1]
        steps.append((given["sample"].clone(), given["model_output"].clone(), sigma))
        return result

    recorded.__signature__ = signature
    scheduler.step = recorded
    try:
        generator = torch.Generator().manual_seed(7)
        pipeline(height=HEIGHT, width=WIDTH, generator=generator, output_type="latent", **call)
    finally:
        del scheduler.step
    return steps


def inputs(case, n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(n, *case.contract.latent_shape, generator=generator)
    conditional, unconditional = encode_prompts(case.pipeline, case.contract, PROMPTS[:n])
    return x_t, torch.tensor([0.95, 0.5, 0.1])[:n], conditional, unconditional


def test_learns_what_the_pipeline_does(case):
    learned = case.contract.as_dict()
    assert {key: learned[key] for key in case.expected} == case.expected
    assert case.contract.replay_error < 1e-4
    assert "replay error" in case.contract.describe()


def test_replays_the_unguided_call(case):
    steps = record(case.pipeline, prompt=PROMPTS, num_inference_steps=5, **case.kwargs, **case.off)
    conditional, _ = encode_prompts(case.pipeline, case.contract, PROMPTS)
    for sample, velocity, sigma in (steps[0], steps[2], steps[4]):
        with torch.no_grad():
            replayed = case.contract.velocity(case.transformer, sample, sigma.expand(3), conditional)
        assert velocity.std() > 0.05
        torch.testing.assert_close(replayed, velocity, atol=1e-4, rtol=0)


def test_replays_the_guided_call(case):
    call = {"prompt": PROMPTS, "negative_prompt": ["bad"] * 3, "num_inference_steps": 5, **case.kwargs}
    steps = record(case.pipeline, **call, **case.on)
    conditional, unconditional = encode_prompts(case.pipeline, case.contract, PROMPTS, negative_prompt="bad")
    for sample, velocity, sigma in (steps[0], steps[2], steps[4]):
        arguments = case.transformer, sample, sigma.expand(3), conditional
        with torch.no_grad():
            replayed = case.contract.guided_velocity(*arguments, unconditional, 3.0)
            unguided = case.contract.velocity(*arguments)
        assert (unguided - velocity).abs().max() > 1e-2
        torch.testing.assert_close(replayed, velocity, atol=1e-4, rtol=0)


def test_guided_call_is_two_calls_in_one(case):
    x_t, sigma, conditional, unconditional = inputs(case)
    batches = []
    hook = case.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    guided = case.contract.guided_velocity(case.transformer, x_t, sigma, conditional, unconditional, 4.5)
    unguided = case.contract.guided_velocity(case.transformer, x_t, sigma, conditional, None, 1.0)
    hook.remove()
    assert batches == [6, 3]
    halves = (case.contract.velocity(case.transformer, x_t, sigma, c) for c in (unconditional, conditional))
    torch.testing.assert_close(guided, guide(*halves, 4.5), atol=1e-5, rtol=0)
    assert torch.equal(unguided, case.contract.velocity(case.transformer, x_t, sigma, conditional))


def test_rows_do_not_see_each_other(case):
    x_t, sigma, conditional, _ = inputs(case)
    together = case.contract.velocity(case.transformer, x_t, sigma, conditional)
    for i in range(3):
        alone = case.contract.velocity(case.transformer, x_t[i : i + 1], sigma[i : i + 1], conditional[i])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


def test_gradient_reaches_the_latents_and_every_parameter(case):
    x_t, sigma, conditional, unconditional = inputs(case)
    student = copy.deepcopy(case.transformer)

    def gradients(checkpointing):
        (student.enable_gradient_checkpointing if checkpointing else student.disable_gradient_checkpointing)()
        student.zero_grad()
        leaf = x_t.clone().requires_grad_()
        velocity = case.contract.guided_velocity(student, leaf, sigma, conditional, unconditional, 2.0)
        velocity.square().sum().backward()
        return {"x_t": leaf.grad, **{name: parameter.grad.clone() for name, parameter in student.named_parameters()}}

    plain = gradients(checkpointing=False)
    unused = [name for name, gradient in plain.items() if not gradient.abs().max() > 0]
    # The last block of SD3 computes text queries and drops what comes of them: that network never uses these two.
    last_queries = ["transformer_blocks.1.attn.add_q_proj.weight", "transformer_blocks.1.attn.add_q_proj.bias"]
    assert unused == (last_queries if case.contract.transformer_class == "SD3Transformer2DModel" else [])
    torch.testing.assert_close(gradients(checkpointing=True), plain)
    assert all(parameter.grad is None for parameter in case.transformer.parameters())


def test_any_transformer_of_the_class_fits(case):
    class Wrapped(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    x_t, sigma, conditional, _ = inputs(case)
    own = case.contract.velocity(case.transformer, x_t, sigma, conditional)
    assert torch.equal(case.contract.velocity(Wrapped(copy.deepcopy(case.transformer)), x_t, sigma, conditional), own)
    half = case.contract.velocity(copy.deepcopy(case.transformer).bfloat16(), x_t, sigma, conditional)
    assert half.dtype == torch.float32
    assert (half - own).abs().max() < 0.05 * own.abs().max()


def test_leaves_the_pipeline_as_it_was(case):
    untouched, pipeline = case.build(), case.build()
    for text_encoder in (untouched.text_encoder, pipeline.text_encoder):
        text_encoder.train()  # must neither make the learning random nor be changed by it
    attributes, transformer_attributes = dict(vars(pipeline)), set(vars(pipeline.transformer))
    scheduler, state = dict(vars(pipeline.scheduler)), torch.get_rng_state()
    contract = learn_contract(pipeline, height=HEIGHT, width=WIDTH, pipeline_kwargs=case.kwargs)
    encode_prompts(pipeline, contract, PROMPTS)
    assert torch.equal(torch.get_rng_state(), state)
    assert pipeline.text_encoder.training and not pipeline.transformer.training
    assert vars(pipeline).keys() == attributes.keys()
    assert all(vars(pipeline)[key] is value for key, value in attributes.items())
    assert all(vars(pipeline.scheduler)[key] is value for key, value in scheduler.items())
    assert set(vars(pipeline.transformer)) == transformer_attributes
    assert all(
        torch.equal(a, b) for a, b in zip(pipeline.transformer.parameters(), untouched.transformer.parameters())
    )
    images = []
    for each in (untouched, pipeline):
        each.text_encoder.eval()
        call = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 3, "output_type": "np", **case.kwargs}
        images.append(each("a cat", generator=torch.Generator().manual_seed(1), **call).images)
    assert (images[0] == images[1]).all()


def test_learning_is_cheap(case):
    batches = []
    hook = case.transformer.proj_out.register_forward_hook(lambda _, inputs, output: batches.append(len(output)))
    learn_contract(case.pipeline, height=HEIGHT, width=WIDTH, pipeline_kwargs=case.kwargs)
    hook.remove()
    guided = [1] * 6 if case.contract.guidance.kind == "two calls" else [2] * 3
    assert batches == [1] * 6 + guided + [6, 6]


def test_a_transformer_with_offloading_hooks():
    pipeline = tiny_pipelines.flux()
    pipeline.transformer = cpu_offload(pipeline.transformer, execution_device=torch.device("cpu"))
    forward = pipeline.transformer.forward
    kwargs = build("flux").kwargs
    contract = learn_contract(pipeline, height=HEIGHT, width=WIDTH, pipeline_kwargs=kwargs)
    assert pipeline.transformer.forward is forward
    assert contract.as_dict() == build("flux").contract.as_dict()


def test_does_not_depend_on_the_global_random_state():
    case = build("sana")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        again = learn_contract(case.pipeline, height=HEIGHT, width=WIDTH, pipeline_kwargs=case.kwargs)
    assert again.as_dict() == case.contract.as_dict()


def test_embedded_guidance_can_be_replaced():
    case = build("flux")
    conditional, unconditional = encode_prompts(case.pipeline, case.contract, PROMPTS)
    assert conditional.tensors["embedded_guidance"].tolist() == [3.5] * 3
    assert unconditional.tensors["embedded_guidance"].tolist() == [3.5]
    call = {**case.kwargs, **case.off, "guidance_scale": 1.0}
    sample, velocity, sigma = record(case.pipeline, prompt=PROMPTS, num_inference_steps=3, **call)[1]
    arguments = case.transformer, sample, sigma.expand(3)
    with torch.no_grad():
        replaced = case.contract.velocity(*arguments, conditional.with_embedded_guidance(1.0))
        kept = case.contract.velocity(*arguments, conditional)
    torch.testing.assert_close(replaced, velocity, atol=1e-4, rtol=0)
    assert (kept - velocity).abs().max() > 1e-3


@pytest.mark.parametrize("mode, embedded", [("cfg", 1.0), ("embedded", 3.0), ("both", 3.0), (None, 3.5)])
def test_modes_of_guidance(mode, embedded):
    """Passes, and the scale that the network is given: 1 without guidance, and where contrast is measured."""
    case = build("flux")
    halves = encode_prompts(case.pipeline, case.contract, PROMPTS)
    x_t = torch.randn(3, *case.contract.latent_shape, generator=torch.Generator().manual_seed(4))
    sigma = torch.tensor([0.2, 0.5, 0.9])
    assert case.contract.guidance_modes == ("embedded", "cfg", "both")
    with torch.no_grad():
        alone = {
            scale: [
                case.contract.velocity(case.transformer, x_t, sigma, h.with_embedded_guidance(scale)) for h in halves
            ]
            for scale in (1.0, embedded)
        }
        wanted = alone[embedded][0] if mode == "embedded" else guide(*alone[embedded][::-1], 3.0)
        found = case.contract.guided_velocity(case.transformer, x_t, sigma, *halves, 3.0, mode)
        off = case.contract.guided_velocity(case.transformer, x_t, sigma, *halves, 1.0, mode, 0.7)
        rescaled = case.contract.guided_velocity(case.transformer, x_t, sigma, *halves, 3.0, mode, 0.7)
    unguided = alone[embedded if mode is None else 1.0][0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(off, unguided, atol=1e-5, rtol=0)
    torch.testing.assert_close(rescaled, rescale_guidance(wanted, unguided, x_t, sigma, 0.7), atol=1e-4, rtol=0)
    assert (rescaled - found).abs().max() > 1e-3


def test_half_precision_pipeline():
    pipeline = tiny_pipelines.flux(dtype=torch.bfloat16)
    contract = learn_contract(pipeline, height=HEIGHT, width=WIDTH, pipeline_kwargs={"max_sequence_length": 16})
    assert (contract.time_scale, contract.time_offset) == (1.0, 0.0)


def test_time_is_learned_exactly_where_the_scheduler_rounds_it():
    pipeline = tiny_pipelines.sana()  # with the DPM solver that SANA is published with
    contract = learn_contract(pipeline, height=HEIGHT, width=WIDTH, pipeline_kwargs=SANA)
    assert (contract.time_scale, contract.time_offset) == (1000.0, 0.0)


def test_wrong_shapes_are_errors():
    case = build("sd3")
    x_t, sigma, conditional, _ = inputs(case)
    for bad in ((x_t[:, :2], sigma, conditional), (x_t, sigma[0], conditional), (x_t, sigma, conditional[:2])):
        with pytest.raises(ValueError, match="expected|expanded"):
            case.contract.velocity(case.transformer, *bad)


def test_the_support_table_is_current():
    table = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    assert without_errors(table) == without_errors(support_table())
    errors = [float(line.split("|")[-2]) for line in table.splitlines()[2:]]
    assert len(errors) >= 18 and max(errors) <= 1e-4
