# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Guidance that a teacher does not have in all of its steps, or not at all, is told by name."""

import json

import diffusers
import pytest
import tiny_pipelines
import tiny_teachers
import torch
from score_distillation import train_sid_dit
from toy_pipeline import toy
from training_helpers import script_arguments

from hf_flowdistill.errors import UserError
from hf_flowdistill.methods.sid import SiD
from hf_flowdistill.teachers import learn_contract


SD3 = {"max_sequence_length": 16}
KLEIN = {"max_sequence_length": 64, "text_encoder_out_layers": [1, 2, 3]}


def refusal(pipeline, size=32, **pipeline_kwargs):
    with pytest.raises(UserError) as error:
        learn_contract(pipeline, height=size, width=size, pipeline_kwargs=pipeline_kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("build", "size", "kwargs", "argument"),
    [
        (tiny_teachers.lumina2, 64, {"cfg_trunc_ratio": 0.25}, "cfg_trunc_ratio"),
        (tiny_teachers.z_image, 32, {"max_sequence_length": 128, "cfg_truncation": 0.5}, "cfg_truncation"),
        (tiny_pipelines.stable_diffusion_3, 32, {**SD3, "skip_guidance_layers": [0]}, "skip_guidance_layers"),
    ],
)
def test_an_argument_that_guides_in_some_steps_only_is_named(build, size, kwargs, argument):
    said = refusal(build(), size, **kwargs)
    assert f"of 100 steps, which comes of {argument}" in said
    assert f"leave {argument} out of --pipeline_kwargs" in said


def test_so_is_one_that_changes_the_scale_alone():
    """A fifth of the way, of which the three steps that are watched see nothing."""
    said = refusal(toy(), 8, guidance_stop=0.8)
    assert "guides at another scale under guidance in 20 of 100 steps, which comes of guidance_stop" in said
    assert learn_contract(toy(), height=8, width=8, pipeline_kwargs={"guidance_stop": 1.0}).guidance.plain


@pytest.mark.parametrize("name", ["guidance_scale"])
def test_a_scale_among_the_pipelines_arguments_would_be_ignored(name):
    with pytest.raises(
        UserError, match=f"pipeline_kwargs has '{name}'.*give the scale of the teacher as --teacher_gui"
    ):
        train_sid_dit.parse_args(script_arguments("run", pipeline_kwargs=json.dumps({name: 3.0})))


def test_a_teacher_without_guidance_is_not_guided():
    pipeline = diffusers.Flux2KleinKVPipeline(**tiny_teachers.flux2_klein().components)
    contract = learn_contract(pipeline, height=32, width=32, pipeline_kwargs=KLEIN)
    assert contract.guidance_modes == ()

    def settle(*words):
        SiD(train_sid_dit.parse_args([*script_arguments("run"), *words])).settle(pipeline, contract)

    with pytest.raises(UserError, match="KVPipeline has no guidance.* is 4.5: give --teacher_guidance_scale 1.$"):
        settle()
    with pytest.raises(UserError, match="--fake_guidance_scale is 2: give --fake_guidance_scale 1.$"):
        settle("--teacher_guidance_scale=1", "--fake_guidance_scale=2")
    with pytest.raises(
        UserError, match="--guidance_mode is of guidance, which is off where its scales are 1: leave it out.$"
    ):
        settle("--teacher_guidance_scale=1", "--guidance_mode=cfg")
    settle("--teacher_guidance_scale=1")


def test_whatever_a_pipelines_own_call_raises_is_one_sentence(monkeypatch):
    pipeline = tiny_pipelines.stable_diffusion_3()
    encode = pipeline.encode_prompt

    def raising(error, guided_only):
        def encode_prompt(*args, **kwargs):
            if kwargs["do_classifier_free_guidance"] or not guided_only:
                raise error
            return encode(*args, **kwargs)

        monkeypatch.setattr(pipeline, "encode_prompt", encode_prompt)

    raising(AttributeError("no image\nat all"), guided_only=False)
    assert "fails when called with height 32, width 32" in (said := refusal(pipeline, **SD3))
    assert "AttributeError: no image" in said
    raising(ZeroDivisionError("division by zero"), guided_only=True)
    assert "its own call cannot be followed (ZeroDivisionError: division by zero)" in refusal(pipeline, **SD3)


def test_a_sampler_of_students_is_no_teachers():
    pipeline = tiny_pipelines.stable_diffusion_3()
    pipeline.scheduler = diffusers.FlowMatchLCMScheduler(shift=3.0)
    assert "FlowMatchLCMScheduler, is a sampler of students of few steps" in refusal(pipeline, **SD3)


@pytest.mark.parametrize(
    ("component", "parameter"),
    [
        ("transformer", "proj_out.bias"),
        ("text encoders", "text_encoder.text_model.final_layer_norm.bias"),
        ("vae", "decoder.conv_out.bias"),
    ],
)
def test_nan_is_told_where_it_arises(component, parameter):
    pipeline = tiny_pipelines.stable_diffusion_3()
    owner = pipeline.components.get(component, pipeline)
    name, _, last = parameter.rpartition(".")
    for part in name.split("."):
        owner = getattr(owner, part)
    torch.nn.init.constant_(getattr(owner, last), float("nan"))
    said = refusal(pipeline, **SD3)
    assert f"not finite in its {component}, whose weight " in said and f"{parameter} is not finite" in said
