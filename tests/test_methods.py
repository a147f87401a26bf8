# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The seam for methods: one that is written here trains, resumes and exports through the same run as all others."""

import inspect
import json

import torch
from diffusers import DiffusionPipeline
from score_distillation.train_sid_dit import train
from test_resume import same_metrics
from training_helpers import metrics, quiet, reset_accelerate, script_arguments

from hf_flowdistill import flow
from hf_flowdistill.cli import ArgumentParser
from hf_flowdistill.data.arguments import add_prompt_arguments, check_prompt_arguments, read_training_prompts
from hf_flowdistill.flow.rollout import Sampler
from hf_flowdistill.methods.method import Method, Update, generate_x0
from hf_flowdistill.networks import arguments as networks
from hf_flowdistill.training import arguments as training
from hf_flowdistill.training.distributed import stop_signals
from hf_flowdistill.training.launch import identify, launch
from hf_flowdistill.training.run import finish, prepare


class Regression(Method):
    """The generator's velocity on samples that the teacher makes in two steps: no fake score."""

    trains = ("generator",)

    def sampler(self, images_seen):
        return Sampler(num_steps=2)

    def update(self, step, images_seen):
        return Update({"generator": self.turn}, self.draw, record={"half": images_seen >= 8})

    def draw(self, turn, samples):
        start, noise, sigma = samples.noise("start"), samples.noise("noise"), samples.numbers("sigma").sigmoid()
        return samples.conditional(turn), start, noise, sigma

    def turn(self, networks, contract, batch, config):
        conditional, start, noise, sigma = batch
        with torch.no_grad():
            x0 = generate_x0(networks.teacher, contract, conditional, lambda i: start, num_steps=2, noise_type="fixed")
        x_t = flow.add_noise(x0, noise, sigma)
        error = contract.velocity(networks.generator, x_t, sigma, conditional) - flow.velocity(x0, noise)
        return error.square().mean(), {"error": error.detach().abs().mean()}


def main(words):
    parser = ArgumentParser(prog="regression.py")
    for add in (training.add_teacher_arguments, add_prompt_arguments, networks.add_network_arguments):
        add(parser)
    training.add_optimization_arguments(parser)
    training.add_output_arguments(parser, name="regression")
    training.add_plan_arguments(parser)
    args = parser.parse_args(words)
    for check in (training.check_teacher_arguments, check_prompt_arguments, networks.check_network_arguments):
        check(args)
    training.check_optimization_arguments(args)
    training.check_output_arguments(args)
    method, accelerator = Regression(args), launch(args)
    prompts = read_training_prompts(args, of_images=False)
    run = prepare(args, method, accelerator, prompts, identify(args, method, accelerator, prompts))
    with stop_signals() as stopped:
        assert train(run, stopped)
    finish(run)


def run_regression(output_dir, *more, **named):
    reset_accelerate()
    with quiet():
        main([str(word) for word in script_arguments(output_dir, *more, **named)])
    reset_accelerate()


def test_a_method_of_one_file_trains_resumes_and_exports(tmp_path):
    sheets = ["--validation_prompts", "red circle", "--num_validation_images", 1, "--validation_images", 4]
    run_regression(tmp_path / "whole", *sheets, max_train_images=12)
    run_regression(tmp_path / "parts", *sheets, max_train_images=4)
    run_regression(tmp_path / "parts", *sheets, max_train_images=12, resume_from_checkpoint="latest")
    files = {path.name for path in (tmp_path / "whole" / "checkpoint-12").iterdir()}
    assert files == {
        *("ema.safetensors", "generator.safetensors", "generator_optimizer.pt", "state.json", "SHA256SUMS")
    }
    sums = [(tmp_path / name / "checkpoint-12" / "SHA256SUMS").read_text() for name in ("whole", "parts")]
    assert sums[0] == sums[1]
    same_metrics(tmp_path / "whole", tmp_path / "parts")
    lines = metrics(tmp_path / "whole")
    assert [line["half"] for line in lines] == [False, False, True]
    run_regression(tmp_path / "still", max_train_images=12, learning_rate=1e-12)  # the same samples, untrained
    assert lines[-1]["generator_loss"] < metrics(tmp_path / "still")[-1]["generator_loss"]
    assert (tmp_path / "whole" / "validation" / "images-12.png").is_file()

    student = tmp_path / "whole" / "student"
    settings = json.loads((student / "training_args.json").read_text())
    assert settings["student"]["num_steps"] == 2 and settings["training_args"]["images_seen"] == 12
    pipeline = DiffusionPipeline.from_pretrained(student, custom_pipeline=str(student), trust_remote_code=True)
    assert pipeline("red circle", generator=torch.Generator().manual_seed(0)).images[0].size == (32, 32)


def test_a_method_is_short():
    assert sum(len(inspect.getsource(part).splitlines()) for part in (Regression, main)) < 45
    assert len(inspect.getsource(Regression).splitlines()) < 40
