# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`flowdistill export` of several runs: the mean of their weights, what its card says, which runs it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import quiet, run_here, saved_student, script_arguments

from hf_flowdistill.cli import main
from hf_flowdistill.networks.adapters import LORA_FILE


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two trainings of 8 images each, with one seed and another."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        run_here(*script_arguments(folder / f"seed-{seed}", seed=seed))
    return folder


def export(output_dir, *words):
    with quiet():
        main(["export", *map(str, words), "--output_dir", str(output_dir), "--device=cpu"])
    return load_file(output_dir / WEIGHTS)


def test_the_weights_are_the_mean_of_those_of_the_averaged_generators(runs, tmp_path):
    """In float32, and rounded once where another type is asked for; a run counts with its last checkpoint."""
    paths = [runs / "seed-0", runs / "seed-1", runs / "seed-1" / "checkpoint-4"]
    files = [runs / "seed-0/checkpoint-8", runs / "seed-1/checkpoint-8", runs / "seed-1/checkpoint-4"]
    each = [load_file(file / "ema.safetensors") for file in files]
    mean = export(tmp_path / "mean", *paths)
    assert mean.keys() == each[0].keys()
    for name, tensor in mean.items():
        expected = torch.stack([one[name].double() for one in each]).mean(0)
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    assert max((each[0][name] - tensor).abs().max() for name, tensor in mean.items()) > 1e-4

    rounded = export(tmp_path / "bf16", *paths, "--dtype=bf16")
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in mean.items())


def test_the_card_says_what_is_averaged_and_what_all_of_it_cost(runs, tmp_path):
    """Two checkpoints of one run are one training."""
    export(tmp_path / "mean", runs / "seed-0", runs / "seed-1", runs / "seed-1" / "checkpoint-4")
    card = (tmp_path / "mean" / "README.md").read_text()
    assert "| mean of the weights of | 3 checkpoints |" in card and "| images seen | 16 |" in card
    assert "| `seed` | `[0, 1, 1]` |" in card and "| `learning_rate` | `0.001` |" in card
    settings = json.loads((tmp_path / "mean" / "training_args.json").read_text())
    alone = [json.loads((runs / f"seed-{i}/student/training_args.json").read_text())["student"] for i in (0, 1)]
    assert settings["training_args"]["images_seen"] == 16
    run = settings["student"].pop("run")
    for name in ("training_hours", "device_hours"):
        assert run[name] == pytest.approx(sum(one["run"][name] for one in alone))
    assert run["hardware"] == alone[0]["run"]["hardware"]
    same = ("pipeline_class", "num_steps", "noise_type", "call_defaults", "teacher", "dtype")
    assert {name: settings["student"][name] for name in same} == {name: alone[0][name] for name in same}


def test_adapters_are_merged_before_the_mean(tmp_path):
    flags = ("--networks=lora", "--rank=2")
    for seed in (0, 1):
        run_here(*script_arguments(tmp_path / f"seed-{seed}", *flags, seed=seed))
    each = [load_file(tmp_path / f"seed-{seed}" / "student" / WEIGHTS) for seed in (0, 1)]
    mean = export(tmp_path / "mean", tmp_path / "seed-0", tmp_path / "seed-1")
    assert mean.keys() == each[0].keys() and not (tmp_path / "mean" / LORA_FILE).exists()
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (each[0][name] + each[1][name]) / 2, rtol=0, atol=1e-6)
    assert any((each[0][name] - tensor).abs().max() > 1e-4 for name, tensor in mean.items())


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (
            {"num_steps": 2},
            "in num_steps (4 and 2): give runs of one teacher, with the same sampler and networks.",
        ),
        ("another teacher", "differ in teacher_weights ("),
        (None, "one checkpoint is given more than once: a mean takes each of them once."),
    ],
)
def test_runs_without_a_common_student_are_refused(other, sentence, runs, tmp_path, capsys):
    if other == "another teacher":  # made here, and not when tests are collected
        other = {"pretrained_model_name_or_path": saved_student()}
    if other:
        run_here(*script_arguments(tmp_path / "other", max_train_images=4, **other))
    words = [runs / "seed-0", tmp_path / "other" if other else runs / "seed-0" / "checkpoint-8"]
    with pytest.raises(SystemExit) as exit_info:
        main(["export", *map(str, words), f"--output_dir={tmp_path / 'mean'}"])
    assert exit_info.value.code == 2 and not (tmp_path / "mean").exists()
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
