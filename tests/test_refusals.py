# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What cannot be a teacher is refused with one reason, and a wrong inference never passes the replay."""

import pytest
import tiny_pipelines
import tiny_qwen3_vl_teachers
import tiny_teachers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PRXPixelPipeline, SanaSprintPipeline, SCMScheduler
from tiny_pipelines import HEIGHT, WIDTH
from toy_pipeline import toy

from hf_flowdistill.errors import UserError
from hf_flowdistill.teachers import contract as contract_module
from hf_flowdistill.teachers import encode_prompts, inference, learn_contract


SD3 = {"max_sequence_length": 16}


class CurvedTime(FlowMatchEulerDiscreteScheduler):
    """Timesteps that are not a line in sigma, and another curve for every number of steps."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.timesteps = 1000 * self.sigmas[:-1] ** (2 + 1 / len(self.timesteps))


def refusal(pipeline, size=(HEIGHT, WIDTH), **pipeline_kwargs):
    height, width = size
    with pytest.raises(UserError) as error:
        learn_contract(pipeline, height=height, width=width, pipeline_kwargs=pipeline_kwargs)
    return str(error.value)


@pytest.mark.parametrize("build", [tiny_pipelines.stable_diffusion, tiny_pipelines.pixart])
def test_noise_prediction(build):
    assert "is not a flow-matching pipeline: its scheduler, DDIMScheduler, takes a network that predicts epsilon" in (
        refusal(build())
    )


def test_inverted_sigmas():
    pipeline = tiny_pipelines.stable_diffusion_3()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    assert "invert_sigmas=True" in refusal(pipeline, **SD3)


def test_curved_time():
    pipeline = tiny_pipelines.stable_diffusion_3()
    pipeline.scheduler = CurvedTime(shift=3.0)
    assert "timestep is not a function of sigma alone" in refusal(pipeline, **SD3)


@pytest.mark.parametrize("component", ["transformer", "scheduler"])
def test_missing_component(component):
    pipeline = tiny_pipelines.stable_diffusion_3()
    setattr(pipeline, component, None)
    assert f"StableDiffusion3Pipeline has no {component}" in refusal(pipeline, **SD3)


def test_untrained_transformer():
    pipeline = tiny_pipelines.stable_diffusion_3()
    torch.nn.init.zeros_(pipeline.transformer.proj_out.weight)
    torch.nn.init.zeros_(pipeline.transformer.proj_out.bias)
    assert "returns only zeros" in refusal(pipeline, **SD3)


@pytest.mark.parametrize(
    "build, size, kwargs, reason",
    [
        (
            tiny_pipelines.stable_diffusion_3,
            (36, 32),
            SD3,
            "`height` and `width` have to be divisible by 8 but are 36 and 32",
        ),
        (tiny_pipelines.sana, (48, 32), {"use_resolution_binning": False}, "have to be divisible by 32"),
        (tiny_pipelines.flux, (32, 36), SD3, "makes height 32, width 32 when asked for height 32, width 36"),
        (tiny_pipelines.stable_diffusion_3, (512, 512), SD3, "height 512, width 512"),
    ],
)
def test_impossible_size(build, size, kwargs, reason):
    assert reason in refusal(build(), size, **kwargs)


@pytest.mark.parametrize(
    "name, reason", [("max_length", "is no argument of StableDiffusion3Pipeline"), ("height", "is set by the library")]
)
def test_wrong_pipeline_kwargs(name, reason):
    assert reason in refusal(tiny_pipelines.stable_diffusion_3(), **{name: 16})


@pytest.mark.parametrize(
    "variant, reason",
    [
        ("scaled input", "no argument of its transformer is the sampler's latent"),
        ("predicts x0", "not plus or minus the output of its transformer"),
        ("two clocks", "['clock', 'second_clock']"),
        ("weak noise", "noise of standard deviation 0.48"),
        ("three calls", "calls its transformer 3 times"),
        ("deaf", "nothing that its transformer is given depends on the prompt"),
    ],
)
def test_pipelines_of_another_kind(variant, reason):
    assert reason in refusal(toy(variant), (8, 8))


def test_a_pipeline_class_of_ones_own():
    pipeline = toy()
    contract = learn_contract(pipeline, height=8, width=8)
    learned = contract.as_dict()
    assert learned["latent"] == "picture [8, 8, 3]"
    assert learned["time"] == "clock = 1 - sigma"
    assert learned["velocity"] == "-output"
    assert learned["guidance"] == "doubled, conditional first"
    conditional, unconditional = encode_prompts(pipeline, contract, ["a", "b"])
    x_t, sigma = torch.randn(2, 8, 8, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.3])
    guided = contract.guided_velocity(pipeline.transformer, x_t, sigma, conditional, unconditional, 3.0)
    words, negative = pipeline.encode(["a", "b"]), pipeline.encode(["", ""])
    for row in range(2):
        rows = slice(row, row + 1)
        expected = pipeline.velocity(x_t[rows], sigma[rows], words[rows], negative[rows], 3.0)
        torch.testing.assert_close(guided[rows], expected)


def test_a_few_step_model():
    parts = tiny_pipelines.sana().components
    sprint = SanaSprintPipeline(**{**parts, "scheduler": SCMScheduler()})
    assert "SanaSprintPipeline cannot be a teacher: it is itself a student of few steps" in refusal(sprint)
    distilled = tiny_teachers.flux2_klein()
    distilled.register_to_config(is_distilled=True)
    assert "it is itself a student of few steps" in refusal(distilled)


def test_a_network_that_predicts_the_image():
    parts = tiny_teachers.prx().components
    names = ("transformer", "scheduler", "text_encoder", "tokenizer")
    pipeline = PRXPixelPipeline(**{name: parts[name] for name in names})
    assert "does not predict a flow velocity" in refusal(pipeline, use_resolution_binning=False)


def test_arguments_that_a_pipeline_needs():
    """As docs/teachers.md says: without them, other steps depend on the first, and the size is another one."""
    qwen = tiny_qwen3_vl_teachers.qwen_image_2_1()
    assert "should follow the time, but ['timestep', 'kv_cache_mode'] do" in refusal(qwen)
    qwen.register_to_config(sample_sigmas=[1.0, 0.9, 0.6, 0.3])
    assert "it takes 4 sampler steps when asked for 3" in refusal(qwen, use_kv_cache=False)
    kontext = tiny_teachers.flux_kontext()
    assert "makes height 64, width 64 when asked for height 32, width 32" in refusal(kontext, **SD3, max_area=64 * 64)


def test_guidance_that_is_not_plain_is_said():
    contract = learn_contract(toy("rescaled guidance"), height=8, width=8)
    assert contract.as_dict()["guidance"].endswith("combined here without the pipeline's rescaling")


WRONG = {
    "sign": (inference, "find_output_map", lambda result: (-result[0], result[1]), "the output at sigma"),
    "time scale": (
        inference,
        "find_time_map",
        lambda result: (result[0] * 0.9, result[1]),
        "timestep is not what the pipeline feeds at sigma",
    ),
    "time offset": (
        inference,
        "find_time_map",
        lambda result: (result[0], result[1] + 0.1 * result[0]),
        "timestep is not what the pipeline feeds at sigma",
    ),
    "halves": (contract_module.Contract, "halves", lambda result: result[::-1], "not the two halves of guidance"),
    "rows": (
        contract_module.Contract,
        "_conditioning_arguments",
        lambda result: {k: v.flip(0) for k, v in result.items()},
        "each sample fits alone, but not beside others",
    ),
    "values": (
        contract_module.Contract,
        "_conditioning_arguments",
        lambda result: {k: 1.1 * v if k == "encoder_hidden_states" else v for k, v in result.items()},
        "encoder_hidden_states is not what the pipeline feeds",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    "build, kwargs",
    [
        (tiny_pipelines.stable_diffusion_3, SD3),
        (tiny_pipelines.sana, {**SD3, "use_resolution_binning": False}),
        (tiny_pipelines.flux, SD3),
    ],
)
def test_a_wrong_inference_does_not_pass(build, kwargs, wrong, monkeypatch):
    holder, name, spoil, what = WRONG[wrong]
    original = getattr(holder, name)
    monkeypatch.setattr(holder, name, lambda *args: spoil(original(*args)))
    reason = refusal(build(), **kwargs)
    assert "replaying it does not give the outputs" in reason
    assert what in reason
