# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""examples/score_distillation/generate.py, run as users run it."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers.schedulers import scheduling_flow_match_euler_discrete
from PIL import Image

from hf_flowdistill.data.image_dataset import open_dataset
from hf_flowdistill.errors import exit_on_user_error
from hf_flowdistill.flow.rollout import Sampler
from hf_flowdistill.hub.export import export_student
from hf_flowdistill.hub.settings import read_settings
from hf_flowdistill.hub.student import few_step_pipeline
from hf_flowdistill.networks.loading import load_pipeline


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "score_distillation" / "generate.py"
KWARGS = '{"guidance_scale": 1, "height": 64, "width": 64}'


def generate(*arguments, cwd):
    paths = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    kwargs = {"max_sequence_length": 8}
    return export_student(tiny_pipelines.stable_diffusion_3(), folder, Sampler(), pipeline_kwargs=kwargs)


def test_a_black_image_is_not_written(tmp_path):
    pipeline = tiny_pipelines.stable_diffusion_3()
    torch.nn.init.constant_(pipeline.vae.decoder.conv_in.weight, 3e4)  # more than float16 can hold, after a sum
    export_student(pipeline, tmp_path / "student", Sampler(), pipeline_kwargs={"max_sequence_length": 8})
    words = ["--pretrained_model_name_or_path", tmp_path / "student", "--prompts", "a cat", "--dtype", "float16"]
    done = generate(*words, "--output_dir", "out", cwd=tmp_path)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "makes numbers that are not finite in its vae, in float16: use bfloat16 or float32." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_student_draws_with_its_own_defaults_whatever_the_batch(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\ntwo dogs\n")
    paths = ["--pretrained_model_name_or_path", str(folder), "--prompt_file", "prompts.txt", "--output_dir", "out"]
    done = generate(*paths, "--prompts", "a fox", "--seed", "5", "--batch_size", "2", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3 images in out\n"

    names = ["00000.png", "00001.png", "00002.png"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "grid.png", "metadata.jsonl"}
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == names
    assert [(row["text"], row["seed"]) for row in rows] == [("a fox", 5), ("a cat", 6), ("two dogs", 7)]
    assert Image.open(tmp_path / "out" / "grid.png").size == (64, 64)
    # the folder is a text-image set as it is, the grid aside
    assert list(open_dataset(str(tmp_path / "out")).captions()) == ["a fox", "a cat", "two dogs"]

    student = few_step_pipeline(load_pipeline(folder), read_settings(folder))
    for row in rows:
        expected = student(row["text"], generator=torch.Generator().manual_seed(row["seed"])).images[0]
        drawn = np.asarray(Image.open(tmp_path / "out" / row["file_name"]), dtype=int)
        assert abs(drawn - np.asarray(expected, dtype=int)).max() <= 1  # of 255: a batch rounds differently
        assert drawn.std() > 1


def test_any_other_pipeline_draws_with_what_the_command_line_says(tmp_path):
    tiny_pipelines.stable_diffusion_3(with_t5=False).save_pretrained(tmp_path / "teacher")
    arguments = "--pretrained_model_name_or_path teacher --num_images_per_prompt 2 --num_inference_steps 3".split()
    arguments += ["--guidance_scale", "2", "--resolution", "16", "--pipeline_kwargs", '{"max_sequence_length": 0}']
    done = generate(*arguments, "--prompts", "a cat", "a dog", "a fox", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "samples" / "00005.png").size == (16, 16)
    assert Image.open(tmp_path / "samples" / "grid.png").size == (32, 48)


@pytest.mark.parametrize("seed", [5, 2**31 + 5, 2**32 - 1, -1])
def test_a_stock_sampler_does_not_repeat_the_noise_that_images_start_from(seed, tmp_path, monkeypatch):
    """One that draws from the global generator in every step, on a CPU."""
    pipeline = tiny_pipelines.stable_diffusion_3(with_t5=False)
    pipeline.register_modules(scheduler=type(pipeline.scheduler).from_config({"stochastic_sampling": True}))
    pipeline.save_pretrained(tmp_path / "stochastic")
    drawn, randn_tensor = [], scheduling_flow_match_euler_discrete.randn_tensor

    def recorded(*args, **kwargs):
        drawn.append(randn_tensor(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(scheduling_flow_match_euler_discrete, "randn_tensor", recorded)
    words = f"--pretrained_model_name_or_path {tmp_path / 'stochastic'} --seed={seed} --batch_size 2 --resolution 16"
    words += f" --num_inference_steps 2 --output_dir {tmp_path / 'out'} --device cpu --prompts a b c"
    call = ["--pipeline_kwargs", '{"max_sequence_length": 0}']
    runpy.run_path(str(SCRIPT))["main"]([*words.split(), *call])
    shape = drawn[0].shape[1:]
    starts = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(3)]
    assert [len(noise) for noise in drawn] == [2, 2, 1, 1]  # a batch of two and one of one, of two steps each
    rows = [row for noise in drawn for row in noise]
    assert not any(torch.isclose(row, start).all() for row in rows for start in starts)
    assert not any(torch.isclose(row, other).all() for n, row in enumerate(rows) for other in rows[:n])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompts", "a"], "--pretrained_model_name_or_path is missing"),
        (["--pretrained_model_name_or_path", "nowhere", "--prompts", "a"], "nowhere does not exist"),
        (["--pretrained_model_name_or_path", "FOLDER"], "there is nothing to draw"),
        (["--pretrained_model_name_or_path", "FOLDER", "--prompt_file", "empty.txt"], "holds no prompt"),
        (["--pretrained_model_name_or_path", "FOLDER", "--prompts", "a", "--resolution", "30"], "divisible by 8"),
        (
            ["--pretrained_model_name_or_path", "FOLDER", "--prompts", "a", "--pipeline_kwargs", '{"x": 1}'],
            "takes no x",
        ),
        (
            [*"--pretrained_model_name_or_path x --prompts a --resolution 64 --height 64 --width 32".split()],
            "--resolution is height and width of square images",
        ),
        (
            ["--pretrained_model_name_or_path", "FOLDER", "--prompts", "a", "--revision", "main"],
            "--revision is of a repository on the Hub, and the pipeline is a folder",
        ),
        (
            [*"--pretrained_model_name_or_path x --prompts a --guidance_scale 2 --pipeline_kwargs".split(), KWARGS],
            "--guidance_scale is in --pipeline_kwargs too",
        ),
        (
            [*"--pretrained_model_name_or_path x --prompts a --resolution 64 --pipeline_kwargs".split(), KWARGS],
            "--resolution is in --pipeline_kwargs too, as height and width",
        ),
    ],
)
def test_mistakes_are_told_in_one_sentence(folder, tmp_path, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    script = runpy.run_path(str(SCRIPT))
    with pytest.raises(SystemExit) as exit:
        exit_on_user_error(script["main"])([argument.replace("FOLDER", str(folder)) for argument in arguments])
    assert exit.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]
    assert not (tmp_path / "samples").exists()


def test_the_script_exits_with_two_and_without_a_traceback(tmp_path):
    done = generate("--pretrained_model_name_or_path", "nowhere", "--prompts", "a cat", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "error: nowhere does not exist" in done.stderr
