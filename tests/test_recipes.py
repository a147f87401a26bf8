# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The recipes hold the paper's numbers, the script reads them, and a dry run of them tells what they would do."""

import os
import subprocess
import sys

import pytest
import torch
import yaml
from published_teachers import published_teacher
from safetensors.torch import load_file
from score_distillation import train_sid_dit
from training_helpers import (
    ROOT,
    SCRIPT,
    metrics,
    networks_in,
    optimizers_in,
    prompt_file,
    reset_accelerate,
    run_here,
    saved_teacher,
    script_arguments,
)

from hf_flowdistill.errors import UserError, exit_on_user_error


RECIPES = {path.stem: path for path in SCRIPT.parent.joinpath("recipes").glob("*_*.yaml")}
CPU = SCRIPT.with_name("accelerate_configs") / "cpu.yaml"
PAPER = {  # SiD-DiT, Tables 3 and 4: teacher, resolution, batch size per GPU, accumulation rounds
    "sana_0.6b_512_amp": ("Sana_600M_512px_diffusers", 512, 16, 2),
    "sana_1.6b_512_amp": ("Sana_1600M_512px_diffusers", 512, 16, 2),
    "sana_sprint_0.6b_1024_amp": ("SANA_Sprint_0.6B_1024px_teacher_diffusers", 1024, 8, 4),
    "sana_sprint_1.6b_1024_amp": ("SANA_Sprint_1.6B_1024px_teacher_diffusers", 1024, 4, 8),
    "sd3_medium_amp": ("stable-diffusion-3-medium-diffusers", 1024, 2, 16),
    "sd3_medium_bf16": ("stable-diffusion-3-medium-diffusers", 1024, 4, 8),
    "sd3.5_medium_amp": ("stable-diffusion-3.5-medium", 1024, 2, 16),
    "sd3.5_medium_bf16": ("stable-diffusion-3.5-medium", 1024, 4, 8),
    "sd3.5_large_amp": ("stable-diffusion-3.5-large", 1024, 1, 32),
    "sd3.5_large_bf16": ("stable-diffusion-3.5-large", 1024, 1, 32),
    "flux.1_dev_512_bf16": ("FLUX.1-dev", 512, 1, 32),
    "flux.1_dev_1024_bf16": ("FLUX.1-dev", 1024, 2, 16),
}
LEARNING_RATE_AND_EPSILON = {"sana_amp": (5e-6, 1e-8), "amp": (1e-6, 1e-8), "bf16": (1e-5, 1e-4)}


def test_there_is_a_recipe_for_every_row():
    assert RECIPES.keys() == PAPER.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_the_script_reads_the_papers_numbers(name):
    teacher, resolution, batch_size, accumulation = PAPER[name]
    precision = name.split("_")[-1]
    rates = LEARNING_RATE_AND_EPSILON["sana_amp" if name.startswith("sana") else precision]
    args = train_sid_dit.parse_args([f"--config={RECIPES[name]}", "--prompt_file=x", "--report_to=none"])
    assert args.pretrained_model_name_or_path.split("/")[1].lower() == teacher.lower()
    assert (args.height, args.width) == (resolution, resolution)
    assert args.images_per_update == 8 * batch_size * accumulation == 256
    assert f"eight processes, {accumulation} x {batch_size} images each." in RECIPES[name].read_text()
    assert (args.learning_rate, args.adam_epsilon) == (args.fake_score_learning_rate, args.adam_epsilon) == rates
    assert (args.adam_beta1, args.adam_beta2, args.max_grad_norm) == (0, 0.999, None)
    precisions = {"amp": ("bf16", "float32", None), "bf16": (None, "bfloat16", "stochastic")}
    assert (args.mixed_precision, args.weight_dtype, args.bf16_rounding) == precisions[precision]
    assert args.networks == "full" and not args.use_8bit_adam
    assert (args.num_steps, args.alpha, args.loss_scale, args.weighting) == (4, 1, 100, "1-sigma")
    assert args.teacher_guidance_scale == args.fake_guidance_scale == args.fake_train_guidance_scale == 4.5


def test_what_the_paper_is_silent_about_is_left_to_the_script():
    known = set(
        """pretrained_model_name_or_path resolution num_steps alpha loss_scale teacher_guidance_scale mixed_precision
        weight_dtype learning_rate adam_beta1 adam_beta2 adam_epsilon images_per_update""".split()
    )
    for name, path in RECIPES.items():
        allowed = known | {"guidance_mode"} if name.startswith("flux") else known
        assert yaml.safe_load(path.read_text()).keys() <= allowed


def dry_run(capsys, recipe, teacher, *more):
    reset_accelerate()
    more = (f"--pretrained_model_name_or_path={teacher}", f"--prompt_file={prompt_file()}", *more)
    train_sid_dit.main([f"--config={RECIPES[recipe]}", "--report_to=none", "--dry_run=8", *more])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("recipe", "teacher", "lines"),
    [
        (
            "sana_1.6b_512_amp",
            "sana-1.6b-512",
            [
                "parameters: 1,604,462,752",
                "sharding units: 20 SanaTransformerBlock, with 97.1% of the parameters",
                "precision: float32 weights, bf16 autocast",
                "text: 300 tokens",
            ],
        ),
        (
            "sana_sprint_0.6b_1024_amp",
            "sana-sprint-0.6b-1024-teacher",
            ["parameters: 591,876,896", "image: 1024x1024, hidden_states [32, 32, 32], 1,024 tokens"],
        ),
        (
            "sd3.5_medium_bf16",
            "sd3.5-medium",
            [
                "parameters: 2,243,171,520, and 226,492,416 values that are not trained",
                "sharding units: 24 JointTransformerBlock, with 99.1% of the parameters",
                "text: 333 tokens",
            ],
        ),
        (
            "flux.1_dev_512_bf16",
            "flux.1-dev",
            [
                "image: 512x512, hidden_states [1024, 64], 1,024 tokens",
                "precision: bfloat16 weights, rounded stochastically, no autocast",
            ],
        ),
    ],
)
def test_a_dry_run_tells_what_would_run(recipe, teacher, lines, capsys):
    """Eight processes: 1,000,000 images are 3,906.25 updates; 500 seconds for 1,000 of them are two per second."""
    printed = dry_run(capsys, recipe, published_teacher(teacher), "--images_per_second=2")
    assert set(lines) <= set(printed)
    assert any(line.startswith("images per update: 256 = 8 processes x ") for line in printed)
    assert printed[-2:] == [
        "images: 1,000,192 in 3,907 updates of each trained network",
        "time: 138.9 hours at 2 images per second",
    ]


LARGE = {  # teacher -> recipe, and what its dry run says of the transformer
    "sd3.5-large": (
        "sd3.5_large_bf16",
        "parameters: 8,056,627,520, and 89,653,248 values that are not trained",
        "sharding units: 38 JointTransformerBlock, with 99.5% of the parameters",
    ),
    "flux.1-dev": (
        "flux.1_dev_1024_bf16",
        "parameters: 11,901,408,320",
        "sharding units: 19 FluxTransformerBlock + 38 FluxSingleTransformerBlock, with 99.5% of the parameters",
    ),
}


@pytest.mark.parametrize("teacher", LARGE)
def test_a_dry_run_of_a_large_teacher_needs_little(teacher, tmp_path):
    """By the real launcher: under a minute of one core and 4 GB, nothing written."""
    recipe, *lines = LARGE[teacher]
    values = {
        "config": RECIPES[recipe],
        "pretrained_model_name_or_path": published_teacher(teacher),
        "prompt_file": prompt_file(),
        "output_dir": tmp_path / "run",
    }
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "-q", "--config_file", CPU, SCRIPT]
    words = [*launch, "--dry_run", *(f"--{name}={value}" for name, value in values.items())]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "printed", "w") as out:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)], env=environment, stdout=out, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)  # of the launcher and of what it has launched
    assert os.waitstatus_to_exitcode(status) == 0
    assert usage.ru_utime + usage.ru_stime < 60  # not on the clock: what else runs on the machine slows it down
    assert usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) < 4e9
    printed = (tmp_path / "printed").read_text().splitlines()
    assert set(lines) <= set(printed) and "hours for the paper" in printed[-1]
    assert any(line.startswith("images per update: 256 = 1 processes x ") for line in printed)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_goes_on_where_the_sizes_are_not_known(capsys, monkeypatch):
    def no_values(*args, **kwargs):
        raise NotImplementedError("no values on the meta device")

    for place in ("dry_run", "cases"):
        monkeypatch.setattr(f"hf_flowdistill.planning.{place}.measure_shapes", no_values)
    printed = dry_run(capsys, "sd3_medium_amp", saved_teacher("stable_diffusion_3"))
    assert "image and text: their sizes are not known without the weights (no values on the meta device)" in printed
    assert "the peak is not known without the weights (no values on the meta device)" in printed
    assert printed[-1].startswith("images: ")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"resolution": 36}, "have to be divisible by 8 but are 36 and 36"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "nowhere does not exist"),
        ({"prompt_file": "nowhere.txt"}, "prompt file nowhere.txt does not exist"),
        ({"dry_run": -1}, "--dry_run is -1: it must be at least 0"),
        ({"images_per_second": 0}, "--images_per_second is 0.0: it must be a number above 0"),
        ({"dry_run": None, "images_per_second": 2}, "--images_per_second tells the time of a --dry_run"),
        ({"mixed_precision": "bf16"}, "--weight_dtype bfloat16 goes without autocast"),
    ],
)
def test_a_dry_run_of_bad_input_is_one_sentence_and_exit_code_2(changes, sentence, tmp_path, capsys):
    reset_accelerate()
    values = {"dry_run": 8, "weight_dtype": "bfloat16", **changes}
    with pytest.raises(SystemExit) as exit_info:
        exit_on_user_error(train_sid_dit.main)(script_arguments(tmp_path / "run", **values))
    reset_accelerate()
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and sentence in captured.err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_run_in_bfloat16(rounding, tmp_path):
    """Weights are bfloat16, the average is not, moments are what the rounding needs; resumed, it is the same run."""
    settings = {"weight_dtype": "bfloat16", "learning_rate": 1e-2, "adam_epsilon": 1e-4, "max_train_images": 12}
    settings["bf16_rounding"] = rounding if rounding == "nearest" else None  # stochastic is the default
    run_here(*script_arguments(tmp_path / "whole", **settings))
    assert all(line["skipped_updates"] == 0 for line in metrics(tmp_path / "whole"))
    before, after = (networks_in(tmp_path / "whole" / f"checkpoint-{images}") for images in (4, 12))
    for name, tensor in after.items():
        assert tensor.dtype == (torch.float32 if name.startswith("ema.") else torch.bfloat16), name
    moved = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"ema", "fake_score", "generator"}
    moments = torch.bfloat16 if rounding == "nearest" else torch.float32
    for optimizer in optimizers_in(tmp_path / "whole" / "checkpoint-12").values():
        assert {state["exp_avg_sq"].dtype for state in optimizer["state"].values()} == {moments}
    student = load_file(tmp_path / "whole" / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(student[name], after[f"ema.{name}"]) for name in student)

    run_here(*script_arguments(tmp_path / "parts", **{**settings, "max_train_images": 8}))
    run_here(*script_arguments(tmp_path / "parts", resume_from_checkpoint="latest", **settings))
    resumed = networks_in(tmp_path / "parts" / "checkpoint-12")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in after.items())
    settings |= {"weight_dtype": "float32", "bf16_rounding": None}
    with pytest.raises(UserError, match="weight_dtype .was 'bfloat16', now 'float32'"):
        run_here(*script_arguments(tmp_path / "parts", resume_from_checkpoint="latest", **settings))
