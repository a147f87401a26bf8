# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""FreeFlow through its real script: exact resume, several processes, and the student in the stock pipeline."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from score_distillation import train_freeflow
from teacher_cases import TEACHERS
from test_resume import same_bits, same_metrics
from training_helpers import (
    PIPELINE_KWARGS,
    SCRIPT,
    largest_difference,
    metrics,
    networks_in,
    quiet,
    reset_accelerate,
    run_command,
    saved_student,
    saved_teacher,
    script_arguments,
)

from hf_flowdistill.cli import main
from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.jumps import land
from hf_flowdistill.hub.settings import read_settings
from hf_flowdistill.networks import flow_map
from hf_flowdistill.networks.adapters import SharedBase
from hf_flowdistill.networks.flow_map import GUIDANCE, JUMP, attach
from hf_flowdistill.networks.time_layers import find_time_layers
from hf_flowdistill.teachers import encode_prompts, learn_contract


FREEFLOW = SCRIPT.with_name("train_freeflow.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", FREEFLOW)
BALANCED = {"correction_delay_images": 4, "correction_warmup_images": 0, "fake_score_learning_rate": 1e-3}


def freeflow(output_dir, *more, **named) -> list[str]:
    return script_arguments(output_dir, *more, **{**BALANCED, **named})


def run_here(arguments) -> None:
    reset_accelerate()
    try:
        with quiet():
            train_freeflow.main([str(argument) for argument in arguments])
    finally:
        reset_accelerate()


def in_one_jump(teacher, checkpoint, lora=None, guidance=2.0, kwargs=None, size=32):
    """(noise, what the averaged generator of a checkpoint makes of it) for one prompt, from its tensors."""
    with quiet():
        pipeline = DiffusionPipeline.from_pretrained(teacher)
    kwargs = kwargs or PIPELINE_KWARGS.get(teacher.name, {})
    contract = learn_contract(pipeline, height=size, width=size, pipeline_kwargs=kwargs)
    network, layers = pipeline.transformer, find_time_layers(pipeline, contract)
    if lora:
        weights = load_file(checkpoint / "ema.safetensors")
        targets = sorted({name.split(".lora_")[0] for name in weights if ".lora_" in name})
        network = SharedBase(network, targets, rank=lora, alpha=lora).add("student")
    conditional, _ = encode_prompts(pipeline, contract, ["red circle"])
    attach(network, layers, [JUMP, GUIDANCE])
    network.load_state_dict(load_file(checkpoint / "ema.safetensors"))
    z = torch.randn(1, *contract.latent_shape, generator=torch.Generator().manual_seed(0))
    ones, conditional = torch.ones(1), conditional.with_embedded_guidance(1.0)
    with torch.no_grad():
        told = {JUMP: ones, GUIDANCE: guidance * ones}
        return z, land(z, flow_map.velocity(network, contract, z, ones, conditional, **told), ones)


def by_the_stock_class(student, z):
    with quiet():
        pipeline = DiffusionPipeline.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)
    defaults = read_settings(student)["student"]["call_defaults"]
    assert defaults["num_inference_steps"] == 1
    return pipeline("red circle", latents=z, output_type="latent", **defaults).images


@pytest.mark.parametrize("kind", ["full", "lora_fake", "lora"])
def test_four_steps_are_two_and_two_more(kind, tmp_path):
    """Bit for bit, the size of the gaps that weighs the correction included."""
    lora = {"networks": kind, "rank": 4} if kind != "full" else {}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_here(freeflow(whole, max_train_images=16, confident_warmup_images=8, **lora))
    run_here(freeflow(parts, max_train_images=8, confident_warmup_images=8, **lora))
    more = {"max_train_images": 16, "resume_from_checkpoint": "latest"}
    run_here(freeflow(parts, confident_warmup_images=8, **more, **lora))
    same_bits(whole / "checkpoint-16", parts / "checkpoint-16")
    same_metrics(whole, parts)
    first, last = (networks_in(whole / f"checkpoint-{images}") for images in (4, 16))
    moved = {name.split(".")[0] for name in last if not torch.equal(first[name], last[name])}
    assert moved == {"ema", "fake_score", "generator"}
    # the embeddings train, are averaged and are saved; the last layers, and by now the first ones
    for network, names in {"generator": (JUMP, GUIDANCE), "ema": (JUMP, GUIDANCE), "fake_score": (GUIDANCE,)}.items():
        for name in names:
            for layer in (0, 2):
                key = f"{network}.flow_map.embedders.{name}.{layer}.weight"
                assert not torch.equal(first[key], last[key]) and last[key].any()
    records = metrics(whole)
    assert [record["confident_level"] for record in records] == [1, 0.5, 0, 0]
    assert [record["correction_balance"] > 0 for record in records] == [False, False, True, True]
    assert all(record["skipped_updates"] == 0 for record in records)
    z, expected = in_one_jump(
        saved_teacher("stable_diffusion_3"), whole / "checkpoint-16", lora=4 if kind == "lora" else None
    )
    found = by_the_stock_class(whole / "student", z)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("teacher", ["flux", "sana"])
def test_the_student_of_another_class(teacher, tmp_path):
    """One step with the stock class, equal to the training's own student; as published, it says what it is."""
    run_here(freeflow(tmp_path, teacher=teacher, student_guidance_scale=1.5))
    z, expected = in_one_jump(saved_teacher(teacher), tmp_path / "checkpoint-8", guidance=1.5)
    found = by_the_stock_class(tmp_path / "student", z)
    assert (found.reshape(expected.shape) - expected).abs().max() < 1e-5 * expected.abs().max()
    settings = read_settings(tmp_path / "student")
    assert settings["student"]["method"] == "freeflow" and settings["training_args"]["student_guidance_scale"] == 1.5
    card = (tmp_path / "student" / "README.md").read_text()
    assert "2511.19428" in card and "num_inference_steps=1" in card
    teachers = {*load_file(saved_teacher(teacher) / "transformer" / "diffusion_pytorch_model.safetensors")}
    assert {*load_file(tmp_path / "student" / "transformer" / "diffusion_pytorch_model.safetensors")} == teachers
    config, other = (
        json.loads((path / "transformer" / "config.json").read_text())
        for path in (tmp_path / "student", saved_teacher(teacher))
    )
    assert {**config, "_name_or_path": 0} == {**other, "_name_or_path": 0}


@pytest.mark.parametrize(
    "more",
    [
        ["--correction_share=0"],
        ["--correction_share=1"],
        ["--derivative=jvp", "--gradient_checkpointing"],
        ["--guidance_range", "1.5", "1.5", "--gradient_checkpointing", "--validation_prompts", "square"],
    ],
)
def test_other_ways_to_train(more, tmp_path):
    settings = {"correction_delay_images": None, "correction_warmup_images": None}
    run_here(freeflow(tmp_path, *more, **(settings if "share" in more[0] else {})))
    assert all(record["skipped_updates"] == 0 for record in metrics(tmp_path)) and (tmp_path / "student").is_dir()


def test_it_goes_on_from_a_student(tmp_path):
    run_here(freeflow(tmp_path, student_model_name_or_path=saved_student(), learning_rate=1e-12))
    student = load_file(saved_student() / "transformer" / "diffusion_pytorch_model.safetensors")
    found = load_file(tmp_path / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert largest_difference(student, found) < 1e-6


def test_a_run_of_other_settings_is_not_gone_on_with(tmp_path):
    run_here(freeflow(tmp_path))
    with pytest.raises(UserError, match=r"guidance_range \(was \[1.0, 2.0\], now \[1.0, 3.0\]\)"):
        run_here(
            freeflow(tmp_path, "--guidance_range", "1", "3", resume_from_checkpoint="latest", max_train_images=16)
        )


SPLITS = {
    "two processes": ["--train_batch_size=1"],  # one of them has no sample of the correction in a micro-batch
    "shards": ["--train_batch_size=1", "--gradient_accumulation_steps=4", "--sharding=full"],
}


@pytest.mark.parametrize("name", SPLITS)
def test_two_processes_compute_what_one_does(name, tmp_path):
    settings = {"max_train_images": 24, "checkpointing_images": 24, "learning_rate": 3e-4}
    size = {"two processes": 4, "shards": 8}[name]
    settings |= {"correction_delay_images": size}
    run_here(freeflow(tmp_path / "one", **settings, train_batch_size=size, gradient_accumulation_steps=1))
    run_command(*TORCHRUN, *freeflow(tmp_path / "two", *SPLITS[name], **settings))
    ones, twos = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(ones) == len(twos) == 24 // size
    for one, two in zip(ones, twos):
        for key in ("prediction_gap", "x0_std", "fake_score_error", "correction_balance"):
            assert two[key] == pytest.approx(one[key], rel=1e-3)
    one, two = (
        load_file(tmp_path / run / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
        for run in ("one", "two")
    )
    start = load_file(saved_teacher("stable_diffusion_3") / "transformer" / "diffusion_pytorch_model.safetensors")
    assert largest_difference(one, two) < 0.02 * largest_difference(one, start)


@pytest.mark.parametrize("networks", ["full", "lora"])
def test_a_checkpoint_is_exported_as_the_run_was(networks, tmp_path):
    """Alone the same weights; of two checkpoints their mean, folded."""
    lora = {"networks": networks, "rank": 4} if networks == "lora" else {}
    run_here(freeflow(tmp_path / "run", **lora))

    def exported(name, *words):
        with quiet():
            main(["export", *map(str, words), "--output_dir", str(tmp_path / name), "--device=cpu"])
        return load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")

    own = load_file(tmp_path / "run" / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    alone = exported("alone", tmp_path / "run")
    assert largest_difference(own, alone) < 1e-7
    assert read_settings(tmp_path / "alone")["student"]["method"] == "freeflow"
    first = exported("first", tmp_path / "run" / "checkpoint-4")
    mean = exported("mean", tmp_path / "run", tmp_path / "run" / "checkpoint-4")
    assert largest_difference(mean, {name: (alone[name] + first[name]) / 2 for name in alone}) < 1e-6
    assert largest_difference(alone, first) > 1e-4


@pytest.mark.parametrize("name", ["flux2 klein", "qwen image", "z image", "lumina2"])
def test_students_of_more_classes(name, tmp_path):
    """Of the run and of `flowdistill export`, both equal to the training's own student; FLUX.2's layer has no bias, so
    it is folded into its weights."""
    case, teacher = TEACHERS[name], tmp_path / "teacher"
    with quiet():
        case.build().save_pretrained(teacher)
    settings = {"pretrained_model_name_or_path": teacher, "pipeline_kwargs": json.dumps(case.kwargs)}
    run_here(freeflow(tmp_path / "run", **settings, resolution=case.size))
    with quiet():
        main(["export", str(tmp_path / "run"), "--output_dir", str(tmp_path / "again"), "--device=cpu"])
    z, expected = in_one_jump(teacher, tmp_path / "run" / "checkpoint-8", kwargs=case.kwargs, size=case.size)
    for student in (tmp_path / "run" / "student", tmp_path / "again"):
        with quiet():
            pipeline = DiffusionPipeline.from_pretrained(student)
            contract = learn_contract(pipeline, height=case.size, width=case.size, pipeline_kwargs=case.kwargs)
        conditional, _ = encode_prompts(pipeline, contract, ["red circle"])
        with torch.no_grad():
            found = z - contract.velocity(pipeline.transformer, z, torch.ones(1), conditional)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
