# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The command `flowdistill`: what it prints, and how it refuses."""

import configparser
import importlib
import json

import pytest
from training_helpers import PIPELINE_KWARGS, ROOT, folder, run_command, saved_teacher

from hf_flowdistill.cli import main


def printed(capsys, *words):
    main([str(word) for word in words])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("teacher", "lines"),
    [
        (
            "stable_diffusion_3",
            [
                "pipeline: StableDiffusion3Pipeline",
                "time: timestep = 1000 * sigma",
                "velocity: output",
                "guidance: doubled, unconditional first",
                "embedded guidance: none",
                "sharding units: 2 JointTransformerBlock, with 79.9% of the parameters",
                "kept for each prompt: encoder_hidden_states [272, 32], pooled_projections [32]; 34,944 bytes",
            ],
        ),
        ("sana", ["latent: hidden_states [4, 8, 8]", "size: 32x32"]),
        ("flux", ["time: timestep = sigma", "guidance: two calls, conditional first", "embedded guidance: guidance"]),
    ],
)
def test_inspect_prints_the_contract(teacher, lines, capsys):
    kwargs = json.dumps(PIPELINE_KWARGS.get(teacher, {}))
    found = printed(capsys, "inspect", saved_teacher(teacher), "--resolution=32", f"--pipeline_kwargs={kwargs}")
    assert set(lines) <= set(found)
    (error,) = (float(line.split(": ")[1]) for line in found if line.startswith("replay error: "))
    assert error < 1e-4


def test_inspect_asks_for_the_pipelines_own_size(capsys):
    """SD3's 8 latents of 4 pixels each; what is not asked for may come from a file."""
    path = saved_teacher("stable_diffusion_3")
    assert "size: 32x32" in printed(capsys, "inspect", path)
    config = folder() / "inspect.yaml"
    config.write_text("width: 64\npipeline_kwargs: {max_sequence_length: 16}\n")
    found = printed(capsys, "inspect", path, "--config", config)
    assert "size: 32x64" in found
    assert found[-1].startswith("kept for each prompt: encoder_hidden_states [32, 32], ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["inspect"], "the following arguments are required: MODEL_OR_PATH (see flowdistill inspect --help)."),
        (["inspect", "./nowhere"], "nowhere does not exist: give a diffusers pipeline folder or a Hub id."),
        (["inspect", "pixart"], "takes a network that predicts epsilon"),
        (["inspect", "stable_diffusion"], "has a UNet instead of a flow-matching transformer."),
        (["inspect", "stable_diffusion_3", "--resolution=36"], "have to be divisible by 8 but are 36 and 36"),
        (["inspect", "stable_diffusion_3", "--height=0"], "--height is 0: it must be at least 1."),
        (["inspect", "stable_diffusion_3", "--device=abacus"], "--device abacus cannot be used: "),
        (["inspect", "stable_diffusion_3", "--speed=1"], "unrecognized arguments: --speed=1"),
        (["export", "--output_dir=out"], "what to export is missing or given twice"),
        (
            ["export", "./nowhere", "--output_dir=out"],
            "nowhere holds no checkpoint: give the --output_dir of a training.",
        ),
        (["export", "./nowhere", "--output_dir=out", "--num_steps=2"], "--num_steps belong to --from_repo"),
        (
            ["export", "--from_repo=a/b", "--output_dir=out", "--num_steps=0"],
            "--num_steps is 0: it must be at least 1",
        ),
        (["export", "--from_repo=./nowhere", "--output_dir=out"], "neither a folder nor an id on the Hub"),
        (["card", "./nowhere"], "nowhere holds no exported student"),
        (["push", "./nowhere", "--repo_id=me/student"], "nowhere holds no exported student"),
        (["push", "./nowhere"], "the following arguments are required: --repo_id"),
        (["verify", "me/student", "--local_dir=a", "--cache_dir=b"], "leave out --cache_dir"),
        (["verify", "a/b/c"], "'a/b/c' is no repository id"),
        (["expect"], "flowdistill has no command expect: choose one of inspect, export, card, push, verify."),
    ],
)
def test_refusals_are_one_sentence_and_exit_code_2(words, sentence, capsys):
    teachers = {name: str(saved_teacher(name)) for name in words if name.startswith(("pixart", "stable"))}
    with pytest.raises(SystemExit) as exit_info:
        main([teachers.get(word, word) for word in words])
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and sentence in captured.err and captured.err.count("\n") == 1


def test_help(capsys):
    for words in ([], ["--help"]):
        assert any(line.startswith("  inspect ") for line in printed(capsys, *words))
    with pytest.raises(SystemExit) as exit_info:
        main(["inspect", "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "MODEL_OR_PATH" in text and "None" not in text and max(map(len, text.splitlines())) <= 119


def test_the_console_script_is_this_command():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, target = setup["options.entry_points"]["console_scripts"].strip().split(" = ")
    module, function = target.split(":")
    assert name == "flowdistill" and getattr(importlib.import_module(module), function) is main
    done = run_command("-m", module, "inspect", saved_teacher("pixart"), check=False)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
