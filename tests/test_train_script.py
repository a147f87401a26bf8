# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The training script on tiny pipelines: what it writes, what it refuses, what does not change its result."""

import contextlib
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import tiny_teachers
import torch
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file, save_file
from score_distillation import train_sid_dit
from training_helpers import (
    ROOT,
    SCRIPT,
    folder,
    largest_difference,
    metrics,
    networks_in,
    prompt_file,
    run_command,
    run_here,
    saved_teacher,
    script_arguments,
)

from hf_flowdistill.cli import main as flowdistill
from hf_flowdistill.errors import UserError, exit_on_user_error
from hf_flowdistill.hub.settings import read_settings
from hf_flowdistill.methods import sid
from hf_flowdistill.methods.method import Size
from hf_flowdistill.networks.arguments import LORA_LEARNING_RATE
from hf_flowdistill.networks.roles import Networks
from hf_flowdistill.teachers import encode_prompts
from hf_flowdistill.training import run as run_module
from hf_flowdistill.training import texts
from hf_flowdistill.training.fit_arguments import images_of_update


@pytest.mark.parametrize("teacher", ["stable_diffusion_3", "sana", "flux"])
def test_two_steps_of_every_teacher(teacher, tmp_path):
    """One run each; nothing in the script knows which class it is."""
    sheets = ["--validation_prompts", "red circle", "blue square", "--num_validation_images=3"]
    arguments = script_arguments(
        tmp_path / "run", *sheets, teacher=teacher, validation_images=4, report_to="tensorboard"
    )
    run_here(*arguments, "--checkpoints_total_limit=1", "--gradient_checkpointing")

    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written == {"checkpoint-8", "conditioning", "logs", "metrics.jsonl", "run.json", "student", "validation"}
    assert {path.name for path in (tmp_path / "run" / "validation").iterdir()} == {
        *("images-0.png", "images-4.png", "images-8.png", "teacher.png")
    }
    lines = metrics(tmp_path / "run")
    assert [line["images_seen"] for line in lines] == [4, 8]
    numbers = [value for line in lines for value in line.values()]
    assert all(math.isfinite(number) for number in numbers)
    for name in ("x0_gap", "generator_grad_norm", "fake_score_grad_norm", "x0_std", "teacher_latent_std"):
        assert all(line[name] > 0 for line in lines), name
    assert any((tmp_path / "run" / "logs").rglob("events.out.tfevents*"))

    average = load_file(tmp_path / "run" / "checkpoint-8" / "ema.safetensors")
    student = load_file(tmp_path / "run" / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    start = load_file(saved_teacher(teacher) / "transformer" / "diffusion_pytorch_model.safetensors")
    assert largest_difference(student, {name: average[name] for name in student}) == 0
    trained = [name for name in start if name.endswith("to_q.weight")]
    assert trained and not any(torch.equal(student[name], start[name]) for name in trained)


def test_a_run_that_drifts_says_so(tmp_path):
    """At a hundred times a sane rate, the average of 25 updates leaves its range; each monitor is told once."""
    schedule = {"num_steps": 1, "gradient_accumulation_steps": 1, "max_train_images": 60, "checkpointing_images": 60}
    done = run_command(SCRIPT, *script_arguments(tmp_path / "run", **schedule, learning_rate=0.03))
    told = re.findall(r"(\d+) images: (\w+) of sampler step 1 is ([\d.]+), normally", done.stderr)
    assert told and len({name for _, name, _ in told}) == len(told)
    lines = metrics(tmp_path / "run")
    for seen, name, mean in told:
        assert int(seen) >= 50 and float(mean) >= 1.4
        if int(seen) == 50:
            assert math.isclose(float(mean), sum(line[name] for line in lines[:25]) / 25, abs_tol=0.006)


def test_accumulation_changes_nothing(tmp_path):
    """Three steps of one image x 4 micro-batches, and of four images x 1, draw the same for the same samples."""
    shapes = {"many": (1, 4), "one": (4, 1)}
    for name, (batch, accumulation) in shapes.items():
        run_here(
            *script_arguments(
                tmp_path / name,
                train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                max_train_images=12,
                checkpointing_images=12,
            )
        )
    many, one = (networks_in(tmp_path / name / "checkpoint-12") for name in shapes)
    assert largest_difference(many, one) < 2e-6
    for first, second in zip(metrics(tmp_path / "many"), metrics(tmp_path / "one")):
        for name in first.keys() - {"images_per_second"}:
            assert math.isclose(first[name], second[name], rel_tol=1e-3, abs_tol=1e-6), name


def test_sample_sheets_change_nothing(tmp_path):
    """Validation prompts, a longer one among them, leave no trace in the networks: bit for bit."""
    sheets = ("--validation_prompts", "red circle", "a red circle left of a blue square on a green ring")
    run_here(*script_arguments(tmp_path / "without"))
    run_here(*script_arguments(tmp_path / "with", *sheets, validation_images=4, num_validation_images=1))
    assert (tmp_path / "with" / "validation" / "images-4.png").exists()
    without, with_sheets = (networks_in(tmp_path / name / "checkpoint-8") for name in ("without", "with"))
    assert largest_difference(without, with_sheets) == 0


def test_the_sampler_steps_are_at_the_sigmas_asked_for(tmp_path):
    """The even ones, spelled out, are the default's bit for bit; others are not, and the student keeps them.

    Those that start after the last image leave the training and its student as they are, and those that start before
    it do not.
    """
    runs = {"default": [], "even": ["--sigmas", 1, 0.5], "other": ["--sigmas", 1, 0.9]}
    runs |= {f"from {start}": [*runs["other"], "--sigmas_start_images", start] for start in (4, 8)}
    for name, sigmas in runs.items():
        run_here(*script_arguments(tmp_path / name, "--step_shares", 0, 1, *sigmas, num_steps=2))
    default, even, other, late, never = (networks_in(tmp_path / name / "checkpoint-8") for name in runs)
    assert largest_difference(default, even) == largest_difference(default, never) == 0
    for one, another in ((default, other), (default, late), (other, late)):
        assert largest_difference(one, another) > 1e-6
    for name in ("other", "from 4"):
        assert read_settings(tmp_path / name / "student")["student"]["call_defaults"]["sigmas"] == [1, 0.9]
    assert "sigmas" not in read_settings(tmp_path / "from 8" / "student")["student"]["call_defaults"]


def test_updates_that_are_not_finite_are_skipped(tmp_path, monkeypatch):
    """A NaN leaves both networks where they were, is counted, and ends the run when it keeps coming."""
    generator_turn = sid.generator_turn

    def sometimes_nan(networks, contract, batch, config):
        loss, diagnostics = generator_turn(networks, contract, batch, config)
        return loss * (math.nan if next(calls) in failing else 1), diagnostics

    monkeypatch.setattr(sid, "generator_turn", sometimes_nan)
    calls, failing = iter(range(100)), {3}  # one micro-batch of the second step
    run_here(*script_arguments(tmp_path / "once", max_train_images=12))
    lines = metrics(tmp_path / "once")
    assert [line["skipped_updates"] for line in lines] == [0, 1, 1]
    assert lines[1]["generator_loss"] is None and lines[1]["generator_grad_norm"] is None
    before, after, later = (networks_in(tmp_path / "once" / f"checkpoint-{images}") for images in (4, 8, 12))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"ema", "fake_score"}
    assert any(not torch.equal(after[name], later[name]) for name in after if name.startswith("generator"))

    calls, failing = iter(range(100)), set(range(100))
    with pytest.raises(SystemExit, match="not finite in 5 steps in a row, up to 20 images: lower the learning rate"):
        run_here(*script_arguments(tmp_path / "always", max_train_images=40))


def test_the_cache_changes_nothing(tmp_path, monkeypatch):
    """Trained from the cache, from what another run left there, and from tensors in memory: bit for bit."""
    arguments = {"max_train_images": 12, "conditioning_cache_dir": tmp_path / "shared"}
    run_here(*script_arguments(tmp_path / "first", **arguments))
    encoded = sorted((tmp_path / "shared").glob("shard-*"))
    assert len(encoded) == 2  # the prompts, and the negative prompt

    with monkeypatch.context() as patch:
        patch.setattr(texts, "encode_batch", pytest.fail)
        patch.setattr(texts, "encode_unconditional", pytest.fail)
        run_here(*script_arguments(tmp_path / "second", **arguments))
    assert sorted((tmp_path / "shared").glob("shard-*")) == encoded

    def in_memory(self, contract, later):
        return Size(contract, *encode_prompts(self._teacher.pipeline, contract, self.prompts.distinct))

    monkeypatch.setattr(texts.Texts, "_encode", in_memory)
    run_here(*script_arguments(tmp_path / "memory", max_train_images=12))
    assert not (tmp_path / "memory" / "conditioning").exists()

    runs = [tmp_path / name for name in ("first", "second", "memory")]
    first, *others = ([{**line, "images_per_second": 0} for line in metrics(run)] for run in runs)
    assert len(first) == 3 and others == [first, first]
    for images in (4, 8, 12):
        expected, *others = (networks_in(run / f"checkpoint-{images}") for run in runs)
        assert [largest_difference(expected, other) for other in others] == [0, 0]


def test_prompts_of_other_kinds_train_the_same(tmp_path):
    """A text file, a .jsonl file and a dataset with the same prompts; each may go on where another stopped."""
    rows = [{"caption": line, "id": 1} for line in prompt_file().read_text().splitlines()]
    table = write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data").mkdir()
    shutil.copy(table, tmp_path / "data")
    common = {"conditioning_cache_dir": tmp_path / "cache", "max_train_images": 4}
    kinds = {
        "text": {},
        "jsonl": {"prompt_file": table, "caption_column": "caption"},
        "dataset": {"prompt_file": None, "dataset_name": tmp_path / "data", "caption_column": "caption"},
    }
    for name, kind in kinds.items():
        run_here(*script_arguments(tmp_path / name, **common, **kind))
    text, jsonl, dataset = (networks_in(tmp_path / name / "checkpoint-4") for name in kinds)
    assert largest_difference(text, jsonl) == largest_difference(text, dataset) == 0
    resumed = {**common, "max_train_images": 8, "resume_from_checkpoint": "latest"}
    run_here(*script_arguments(tmp_path / "text", **resumed, **kinds["dataset"]))
    assert [line["images_seen"] for line in metrics(tmp_path / "text")] == [4, 8]


def test_a_spoiled_or_foreign_cache_ends_the_run_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train_sid_dit, "train", lambda run, stopped: None)
    monkeypatch.setattr("hf_flowdistill.training.run.finish", lambda run: None)
    cache = {"conditioning_cache_dir": tmp_path / "cache"}
    run_here(*script_arguments(tmp_path / "first", **cache))
    monkeypatch.setattr(Networks, "from_teacher", pytest.fail)
    with pytest.raises(UserError, match="cache is from another encoder, which differs in pipeline_kwargs, fed: give"):
        run_here(*script_arguments(tmp_path / "longer", **cache, max_sequence_length=8))
    with pytest.raises(UserError, match="cache is from another encoder, which differs in pipeline, "):
        run_here(*script_arguments(tmp_path / "other", **cache, teacher="flux"))
    shard = max((tmp_path / "cache").glob("shard-*"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=f"the shard {shard} is corrupt"):
        run_here(*script_arguments(tmp_path / "spoiled", **cache))


def write(name, text):
    path = folder() / name
    path.write_text(text)
    return path


def broken_teacher(name, *removed):
    path = folder() / f"broken-{name}"
    shutil.copytree(saved_teacher(name), path, dirs_exist_ok=True)
    for file in removed:
        (path / file).unlink()
    return path


REFUSED = {
    "no such teacher": (lambda: {"pretrained_model_name_or_path": "./nowhere"}, "nowhere does not exist: give"),
    "no teacher": (lambda: {"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path is missing"),
    "not a pipeline": (lambda: {"pretrained_model_name_or_path": folder()}, "is not a diffusers pipeline, it has no"),
    "a component": (
        lambda: {"pretrained_model_name_or_path": saved_teacher("stable_diffusion_3") / "transformer"},
        "is not a diffusers pipeline, it has no readable model_index.json",
    ),
    "weights missing": (
        lambda: {"pretrained_model_name_or_path": broken_teacher("flux", "vae/diffusion_pytorch_model.safetensors")},
        "does not load as a diffusers pipeline: Error no file named diffusion_pytorch_model",
    ),
    "a UNet": (
        lambda: {"pretrained_model_name_or_path": saved_teacher("stable_diffusion")},
        "StableDiffusionPipeline has a UNet instead of a flow-matching transformer",
    ),
    "not flow matching": (
        lambda: {"pretrained_model_name_or_path": saved_teacher("pixart")},
        "PixArtAlphaPipeline is not a flow-matching pipeline: its scheduler, DDIMScheduler, takes a network that",
    ),
    "resolution": (lambda: {"resolution": 30}, r"height.*30"),
    "a negative size": (lambda: {"height": -32}, "--height is -32: it must be at least 1"),
    "a negative norm": (lambda: {"max_grad_norm": -1}, "--max_grad_norm is -1.0: it must be a number above 0"),
    "a decay of 1.5": (lambda: {"adam_beta2": 1.5}, "--adam_beta2 is 1.5: it must be at least 0 and below 1"),
    "not its guidance": (
        lambda: {"fake_guidance_mode": "both"},
        "StableDiffusion3Pipeline cannot be guided by both: the mode must be cfg",
    ),
    "more than all of it": (lambda: {"guidance_rescale": 1.5}, "--guidance_rescale is 1.5: it must be from 0 to 1"),
    "one sigma of four": (lambda: {"sigmas": "1"}, r"--sigmas must be 4 numbers \(--num_steps\) that start at 1"),
    "sigmas that rise": (
        lambda: {"config": write("rise.yaml", "sigmas: [1, 0.5, 0.75, 0.25]")},
        "--sigmas must be 4 numbers .* fall towards 0",
    ),
    "a sigma of nothing": (
        lambda: {"config": write("nothing.yaml", "sigmas: [1, 0.5, 0.25, 0]")},
        "--sigmas must be 4 numbers .* fall towards 0",
    ),
    "levels that start but are not given": (
        lambda: {"sigmas_start_images": "8"},
        "--sigmas_start_images is when training at --sigmas starts: give both or neither",
    ),
    "one share of four": (lambda: {"step_shares": "0.5"}, "--step_shares must be 4 numbers"),
    "no such guidance": (lambda: {"teacher_guidance_scale": "nan"}, "--teacher_guidance_scale is nan: it must be a"),
    "no such prompts": (lambda: {"prompt_file": "nowhere.txt"}, "prompt file nowhere.txt does not exist"),
    "empty prompts": (lambda: {"prompt_file": write("empty.txt", " \n\n")}, "empty.txt holds no prompt: write one"),
    "a table without captions": (
        lambda: {"prompt_file": write("table.jsonl", '{"url": "x"}\n')},
        "row 1 of the prompt file .*table.jsonl has no column text: choose --caption_column among url",
    ),
    "no such dataset": (
        lambda: {"prompt_file": None, "dataset_name": "./nowhere"},
        "the dataset ./nowhere cannot be read: ",
    ),
    "prompts twice": (lambda: {"dataset_name": "x"}, "given twice: use either --prompt_file or --dataset_name"),
    "a configuration of nothing": (lambda: {"dataset_config_name": "x"}, "give --dataset_name too, or leave it out"),
    "a cache that cannot be": (
        lambda: {"conditioning_cache_dir": prompt_file()},
        "--conditioning_cache_dir .*prompts.txt cannot be a folder, since .* is a file",
    ),
    "weighting": (lambda: {"weighting": "2-sigma"}, "unknown weighting '2-sigma': choose one of '1-sigma'"),
    "noise type": (lambda: {"noise_type": "stale"}, "argument --noise_type: invalid choice: 'stale'"),
    "not a number": (lambda: {"alpha": "big"}, "argument --alpha: invalid float value: 'big'"),
    "unknown argument": (lambda: {"learning_speed": 1}, "unrecognized arguments: --learning_speed=1"),
    "no object": (lambda: {"pipeline_kwargs": "[1]"}, "argument --pipeline_kwargs: must be a JSON object"),
    "unknown pipeline argument": (
        lambda: {"pipeline_kwargs": '{"colour": 1}'},
        "pipeline_kwargs has 'colour', which is no argument of StableDiffusion3Pipeline",
    ),
    "tracker": (lambda: {"report_to": "paper"}, "--report_to paper is not installed here: choose of all, none"),
    "trackers and none": (
        lambda: {"config": write("trackers.yaml", "report_to: [tensorboard, none]"), "report_to": None},
        "--report_to has none beside others",
    ),
    "several sizes and one": (
        lambda: {"aspect_ratio_buckets": "32,32;32,48"},
        "--resolution is one size: leave it out where there are --aspect_ratio_buckets",
    ),
    "a size three times": (lambda: {"height": 32, "width": 32}, "--resolution is height and width of square images"),
    "a revision of a folder": (lambda: {"revision": "main"}, "--revision is of a repository on the Hub, and the"),
    "a limit of no checkpoints": (
        lambda: {"checkpointing_images": 0, "checkpoints_total_limit": 2},
        "--checkpoints_total_limit is of checkpoints, and --checkpointing_images 0 writes none",
    ),
    "sheets of no prompts": (lambda: {"validation_images": 4}, "--validation_images is of sample sheets: give --val"),
    "samples of no prompts": (lambda: {"num_validation_images": 4}, "--num_validation_images is of sample sheets"),
    "the folder of no tracker": (lambda: {"logging_dir": "x"}, "--logging_dir is of a tracker, and --report_to is"),
    "a project of no tracker": (lambda: {"tracker_project_name": "x"}, "--tracker_project_name is of a tracker, and"),
    "a name that TensorBoard has none of": (
        lambda: {"tracker_run_name": "x", "report_to": "tensorboard"},
        "--tracker_run_name is of wandb, .* and --report_to names none of them",
    ),
    "a repository without a push": (lambda: {"hub_model_id": "a/b"}, "--hub_model_id is of a student that is uploade"),
    "a token without a push": (lambda: {"hub_token": "hf_x"}, "--hub_token is of a student that is uploaded: give"),
    "private without a push": (
        lambda: {"config": write("private.yaml", "hub_private_repo: true")},
        "--hub_private_repo is of a student that is uploaded: give --push_to_hub too",
    ),
    "a negative prompt without guidance": (
        lambda: {"negative_prompt": "blurry", "teacher_guidance_scale": 1},
        "--negative_prompt is half of classifier-free guidance, by which neither",
    ),
    "a negative prompt and an embedded scale": (
        lambda: {"negative_prompt": "blurry", "pretrained_model_name_or_path": saved_teacher("flux")},
        "--negative_prompt is half of classifier-free guidance, by which neither",
    ),
    "a rescale without guidance": (
        lambda: {"guidance_rescale": 0.5, "teacher_guidance_scale": 1},
        "--guidance_rescale is of guidance, which is off",
    ),
    "a mode without guidance": (
        lambda: {"guidance_mode": "cfg", "teacher_guidance_scale": 1},
        "--guidance_mode is of guidance, which is off where its scales are 1",
    ),
    "a mode of an unguided fake score": (
        lambda: {"fake_guidance_mode": "cfg", "fake_guidance_scale": 1, "fake_train_guidance_scale": 1},
        "--fake_guidance_mode is of guidance, which is off",
    ),
    "token and wandb": (
        lambda: {"report_to": "wandb", "hub_token": "hf_x", "config": write("push.yaml", "push_to_hub: true")},
        "--hub_token could be stored with the run by wandb",
    ),
    "no checkpoint": (
        lambda: {"resume_from_checkpoint": "checkpoint-3"},
        "there is no checkpoint checkpoint-3: .*none",
    ),
    "no config": (lambda: {"config": "nowhere.yaml"}, "config file nowhere.yaml cannot be read"),
    "a config of words": (lambda: {"config": write("words.yaml", "fast")}, "words.yaml must hold one 'name: value'"),
    "unknown argument in a config": (
        lambda: {"config": write("typo.yaml", "alpha: 1\nlearning_speed: 1\n")},
        "typo.yaml has unknown arguments: learning_speed ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_sentence_before_any_work(case, tmp_path, monkeypatch):
    changes, sentence = REFUSED[case]
    monkeypatch.setattr(Networks, "from_teacher", pytest.fail)
    with pytest.raises(UserError, match=sentence) as error:
        run_here(*script_arguments(tmp_path / "run", **changes()))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_sigmas_that_the_pipeline_cannot_be_given(tmp_path):
    tiny_teachers.bria().save_pretrained(tmp_path / "bria")
    words = script_arguments(tmp_path / "run", "--sigmas", 1, 0.8, 0.7, 0.4, max_sequence_length=8)
    with pytest.raises(UserError, match="BriaPipeline takes no sigmas .*: leave out --sigmas"):
        run_here(*words, "--pretrained_model_name_or_path", tmp_path / "bria")
    assert not (tmp_path / "run").exists()


def test_no_way_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UserError, match="the Hub does not let us in.*no network.*or leave out --push_to_hub"):
        run_here(*script_arguments(tmp_path / "run", "--push_to_hub", hub_model_id="someone/something"))


def test_an_output_folder_belongs_to_one_run(tmp_path):
    output_dir = tmp_path / "run"
    run_here(*script_arguments(output_dir, max_train_images=4))
    with pytest.raises(UserError, match="is not empty: choose another --output_dir, or go on with"):
        run_here(*script_arguments(output_dir))
    changed = {"seed": 1, "alpha": 1.2, "train_batch_size": 1, "lr_scheduler": "cosine", "prompt_file": None}
    changed["prompt_file"] = write("others.txt", "green ring\n")
    with pytest.raises(UserError, match="from a run with other settings, ") as error:
        run_here(*script_arguments(output_dir, resume_from_checkpoint="latest", **changed))
    parts = ["alpha (was 1.0, now 1.2)", "images_per_update (was 4, now 2)", "seed (was 0, now 1)", "prompts (was "]
    for part in [*parts, "lr_scheduler (was 'constant', now 'cosine')"]:
        assert part in str(error.value)
    (output_dir / "checkpoint-4" / "fake_score.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="checkpoint-4 cannot be read .*: resume from an earlier one"):
        run_here(*script_arguments(output_dir, resume_from_checkpoint="latest"))
    shutil.rmtree(output_dir / "checkpoint-4")
    run_here(*script_arguments(output_dir, resume_from_checkpoint="latest", max_train_images=4))
    assert [line["images_seen"] for line in metrics(output_dir)] == [4]


def test_what_was_used_is_recorded_and_not_what_was_asked(tmp_path):
    """Of a run and of its checkpoint: modes of guidance by default, the alpha of a LoRA, the precision as launched."""
    run_here(*script_arguments(tmp_path / "run", "--networks=lora", max_train_images=4, rank=2))
    with contextlib.redirect_stdout(io.StringIO()):
        flowdistill(["export", str(tmp_path / "run"), "--output_dir", str(tmp_path / "exported")])
    for student in (tmp_path / "run" / "student", tmp_path / "exported"):
        used = read_settings(student)["training_args"]
        assert (used["guidance_mode"], used["fake_guidance_mode"]) == ("cfg", "cfg")
        assert (used["lora_alpha"], used["mixed_precision"]) == (2, "no")


def test_a_training_whose_length_counts_cannot_be_made_longer(tmp_path):
    shares = ["--num_steps=2", "--step_shares", 0.5, 0.5]
    run_here(*script_arguments(tmp_path / "run", *shares, max_train_images=4))
    sentence = (
        r"max_train_images \(was 4, now 8\); a training with --lr_scheduler .* --step_shares, cannot be made longer"
    )
    with pytest.raises(UserError, match=sentence):
        run_here(*script_arguments(tmp_path / "run", *shares, "--resume_from_checkpoint=latest", max_train_images=8))


def test_what_is_no_run_of_ours_is_left_alone(tmp_path):
    """--resume_from_checkpoint latest starts anew where there is no checkpoint, but not in somebody's folder."""
    (tmp_path / "metrics.jsonl").write_text("years of work")
    with pytest.raises(UserError, match="is not empty, and without a readable run.json"):
        run_here(*script_arguments(tmp_path, resume_from_checkpoint="latest"))
    assert (tmp_path / "metrics.jsonl").read_text() == "years of work"


def test_an_output_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file: choose another"):
        run_here(*script_arguments(tmp_path / "file" / "run"))


def test_a_teacher_that_changed_in_place_is_another_run(tmp_path):
    shutil.copytree(saved_teacher("stable_diffusion_3"), tmp_path / "teacher")
    changed = {"pretrained_model_name_or_path": tmp_path / "teacher", "resume_from_checkpoint": "latest"}
    run_here(*script_arguments(tmp_path / "run", max_train_images=4, **changed))
    weights = tmp_path / "teacher" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.01 * tensor for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"other settings, teacher_weights \(was '[0-9a-f]{16}', now"):
        run_here(*script_arguments(tmp_path / "run", max_train_images=8, **changed))


def test_push_gets_the_token_and_nothing_else_does(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("hf_flowdistill.hub.push.check_push", lambda repo_id, token=None: f"me/{repo_id}")
    monkeypatch.setattr(run_module, "push_student", lambda *args, **kwargs: calls.append((args, kwargs)))
    token = "hf_" + "abcdefgh" * 4
    words = script_arguments(tmp_path / "run", max_train_images=4, hub_token=token, hub_model_id="small")
    run_here(*words, "--push_to_hub", "--hub_private_repo")
    assert calls == [((tmp_path / "run" / "student", "me/small"), {"token": token, "private": True})]
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert files and not [path for path in files if token.encode() in path.read_bytes()]


def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--pretrained_model_name_or_path", "a/b", "--prompt_file", "none.txt"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the prompt file none.txt does not exist")


def test_exit_code_and_stderr(capsys):
    with pytest.raises(SystemExit) as exit_info:
        exit_on_user_error(train_sid_dit.main)(["--weighting=1"])
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "error: --pretrained_model_name_or_path is missing.\n"


def test_help_reads_well(capsys):
    with pytest.raises(SystemExit) as exit_info:
        train_sid_dit.main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "teacher:",
        "prompts:",
        "method (",
        "optimization (",
        "output:",
        "(default: 1e-06, of a LoRA 0.0001)",
        "(default: 0.9",
    ):
        assert part in text
    assert "None" not in text and max(map(len, text.splitlines())) <= 119


def test_config_file_and_command_line():
    flags = "gradient_checkpointing: true\npush_to_hub: false\n"
    config = write("config.yaml", f"learning_rate: 3e-4\nalpha: 1.2\n{flags}")
    lists = "validation_prompts: [a red circle, 'a: b']\npipeline_kwargs: {clip_skip: 1}\nseed: null\n"
    lists = write("lists.yaml", lists)
    common = ["--pretrained_model_name_or_path=a/b", f"--prompt_file={prompt_file()}", "--report_to=none"]
    args = train_sid_dit.parse_args([*common, f"--config={config}", "--alpha=1.5", "--teacher_guidance_scale=2"])
    assert (args.learning_rate, args.fake_score_learning_rate, args.alpha) == (3e-4, 3e-4, 1.5)
    assert (args.fake_guidance_scale, args.fake_train_guidance_scale) == (2, 2)
    assert args.gradient_checkpointing and not args.push_to_hub
    args = train_sid_dit.parse_args([*common, "--config", str(lists), "--max_sequence_length=7"])
    assert args.validation_prompts == ["a red circle", "a: b"] and args.seed == 0
    assert args.pipeline_kwargs == {"clip_skip": 1, "max_sequence_length": 7}


def test_what_a_file_gives_can_be_overruled():
    """An argument of a file that one on the command line leaves without effect is no contradiction, as a recipe's size
    beside buckets; within the file it is."""
    common = ["--pretrained_model_name_or_path=a/b", f"--prompt_file={prompt_file()}"]
    recipe = write("recipe.yaml", "resolution: 512\nguidance_rescale: 0.5\nvalidation_images: 100\n")
    with pytest.raises(UserError, match="--validation_images is of sample sheets"):
        train_sid_dit.parse_args([*common, f"--config={recipe}"])
    recipe = write("recipe.yaml", "resolution: 512\nguidance_rescale: 0.5\n")
    overruled = ["--aspect_ratio_buckets=32,32;32,48", "--teacher_guidance_scale=1", "--report_to", "none"]
    args = train_sid_dit.parse_args([*common, f"--config={recipe}", *overruled])
    assert (args.height, args.width) == (32, 32) and args.report_to == ["none"]


@pytest.mark.parametrize(
    "words, rates",
    [
        (["--networks=lora"], (1e-4, 1e-4)),
        (["--networks=lora", "--learning_rate=5e-4"], (5e-4, 5e-4)),
        (["--networks=lora", "--fake_score_learning_rate=5e-4"], (1e-4, 5e-4)),
        (["--networks=lora_fake"], (1e-6, 1e-4)),
        (["--networks=lora_fake", "--learning_rate=2e-6"], (2e-6, 1e-4)),
        (["--learning_rate=2e-6"], (2e-6, 2e-6)),
    ],
)
def test_loras_have_a_learning_rate_of_their_own(words, rates):
    args = train_sid_dit.parse_args(["--pretrained_model_name_or_path=a/b", "--prompt_file=x", *words])
    assert (args.learning_rate, args.fake_score_learning_rate) == rates and LORA_LEARNING_RATE == 1e-4


def test_defaults_are_the_papers():
    """SiD-DiT, Table 4, SiD-DiT with AMP; Eq. 15; Eq. 18."""
    args = train_sid_dit.parse_args(["--pretrained_model_name_or_path=a/b", "--prompt_file=x", "--report_to=none"])
    assert (args.learning_rate, args.fake_score_learning_rate) == (1e-6, 1e-6)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.max_grad_norm) == (0, 0.999, 1e-8, None)
    assert (args.num_steps, args.noise_type, args.alpha) == (4, "fresh", 1)
    assert (args.weighting, args.loss_scale) == ("1-sigma", 100)
    assert args.teacher_guidance_scale == args.fake_guidance_scale == args.fake_train_guidance_scale == 4.5
    assert images_of_update(args, 8) == images_of_update(args, 1) == 256
    assert (args.resolution, args.lr_scheduler, args.lr_warmup_images) == (1024, "constant", 0)


def commands_in(readme):
    """The words of every command in the README's code blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / readme).read_text(), flags=re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_the_commands_of_the_readme_are_accepted(monkeypatch):
    """All but what has to be downloaded: files that they name exist, and arguments are arguments."""
    monkeypatch.chdir(ROOT)
    commands = [words for words in commands_in(SCRIPT.with_name("README.md")) if SCRIPT.name in " ".join(words)]
    assert len(commands) >= 4
    for words in commands:
        assert words[:2] == ["accelerate", "launch"]
        script = words.index(str(SCRIPT.relative_to(ROOT)))
        launch = launch_command_parser().parse_args(words[2 : script + 1])
        assert launch.config_file is None or (ROOT / launch.config_file).is_file()
        train_sid_dit.parse_args(words[script + 1 :])
