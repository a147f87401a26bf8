# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What trackers show of a run: real files of TensorBoard, and of the real wandb client where it is installed."""

import argparse
import json

import numpy as np
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_helpers import metrics, run_here, script_arguments

from hf_flowdistill.training.monitors import NORMAL
from hf_flowdistill.training.trackers import RUN_NAMES, scalars, tracker_config


SHEETS = ["--validation_prompts", "red circle", "--num_validation_images=2"]
RUN = {"num_steps": 2, "max_train_images": 16, "checkpointing_images": 8, "validation_images": 8}


def test_curves_are_grouped_and_by_sampler_step():
    record = {"images_seen": 8, "step": 2, "skipped_updates": 0, "k": 2, "learning_rate": 1e-6, "processes": 1}
    record |= {"generator_loss": -3.0, "fake_score_grad_norm": 2.0, "x0_std": 0.5, "teacher_latent_std": 0.6}
    record |= {"latent_spread": 0.8, "images_per_second": 3.0, "height": 32, "weight": 1.5}
    assert scalars(record, NORMAL) == {
        "run/step": 2,
        "run/skipped_updates": 0,
        "run/learning_rate": 1e-6,
        "run/images_per_second": 3.0,
        "loss/generator/k2": -3.0,
        "gradient/fake_score/k2": 2.0,
        "latents/x0_std/k2": 0.5,
        "drift/latent_spread/k2": 0.8,
        "other/weight/k2": 1.5,
    }
    del record["k"]  # a method without sampler steps
    assert scalars(record, NORMAL)["loss/generator"] == -3.0


def test_trackers_get_no_token_and_nothing_they_cannot_take():
    args = argparse.Namespace(alpha=1.0, hub_token="hf_secret", validation_prompts=["a"], revision=None, flag=True)
    assert tracker_config(args) == {"alpha": 1.0, "validation_prompts": "['a']", "revision": "None", "flag": True}


def test_what_has_a_run_name_is_a_tracker_that_there_is():
    assert RUN_NAMES.keys() <= LOGGER_TYPE_TO_CLASS.keys()


def test_tensorboard_shows_each_sampler_step_by_itself_and_goes_on(tmp_path):
    settings = {**RUN, "report_to": None, "checkpointing_images": 4}
    words = script_arguments(tmp_path / "run", *SHEETS, "--report_to", "tensorboard", **settings)
    run_here(*words, "--max_train_images=8")
    run_here(*words, "--resume_from_checkpoint=checkpoint-4")  # what came after it comes again, and is shown once
    shown = EventAccumulator(str(tmp_path / "run" / "logs" / "sid-dit"), size_guidance={"images": 0}).Reload()
    tags, lines = shown.Tags(), metrics(tmp_path / "run")
    assert {tag.split("/")[0] for tag in tags["scalars"]} == {
        "loss",
        "gradient",
        "latents",
        "drift",
        "other",
        "run",
    }
    for k in (1, 2):
        of_step = [(line["images_seen"], line["generator_loss"]) for line in lines if line["k"] == k]
        curve = shown.Scalars(f"loss/generator/k{k}") if of_step else []
        assert [(point.step, pytest.approx(point.value)) for point in curve] == of_step
    assert [point.step for point in shown.Scalars("run/learning_rate")] == [4, 8, 12, 16]
    assert tags["images"] == ["validation"] and tags["tensors"] == ["arguments/text_summary"]
    assert [path.name for path in (tmp_path / "run" / "logs").iterdir()] == ["sid-dit"]
    assert not any(path.is_dir() for path in (tmp_path / "run" / "logs" / "sid-dit").iterdir())  # one run in its list
    assert [image.step for image in shown.Images("validation")] == [0, 8, 16]
    assert lines[0].keys() >= {"generator_loss", "teacher_latent_std", "processes"}  # the file keeps its flat records


def test_wandb_knows_the_run_again(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    if "wandb" not in map(str, get_available_trackers()):
        pytest.skip("accelerate does not find wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    words = [*SHEETS, "--report_to", "tensorboard", "wandb", "--tracker_run_name", "a name"]
    words = script_arguments(tmp_path / "run", *words, **{**RUN, "report_to": None})
    run_here(*words, "--max_train_images=8")
    run_here(*words, "--resume_from_checkpoint=latest")
    identity = (tmp_path / "run" / "logs" / "wandb_run_id").read_text()
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and {folder.name.rpartition("-")[2] for folder in folders} == {identity}
    stored = b"".join(file.read_bytes() for folder in folders for file in folder.glob("run-*.wandb"))
    for words in (b"a name", b"loss/generator/k1", b"drift/latent_spread/k2"):
        assert words in stored
    pictures = sorted(folders[0].rglob("media/images/validation_*.png"), key=lambda path: path.stat().st_mtime)
    sheets = [tmp_path / "run" / "validation" / f"images-{seen}.png" for seen in (0, 8)]
    for picture, sheet in zip(pictures, sheets, strict=True):
        assert np.array_equal(np.asarray(Image.open(picture)), np.asarray(Image.open(sheet)))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["num_steps"] == 2
