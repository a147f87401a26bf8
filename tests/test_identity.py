# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Which teacher a training is of: its weights and its configuration, and not where it is."""

import json
import shutil

import pytest
from training_helpers import (
    largest_difference,
    networks_in,
    quiet,
    run_here,
    saved_student,
    saved_teacher,
    script_arguments,
)

from hf_flowdistill.cli import main as flowdistill
from hf_flowdistill.errors import UserError


def test_a_teacher_of_another_configuration_is_another_run(tmp_path, capsys):
    """Not its weights, but what is computed with them; neither resume nor export takes it for the run's teacher."""
    path = tmp_path / "teacher"
    shutil.copytree(saved_teacher("sana"), path)
    same = {"pretrained_model_name_or_path": path, "teacher": "sana"}
    run_here(*script_arguments(tmp_path / "run", max_train_images=4, **same))
    config = path / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "norm_eps": 0.3}))
    differs = r"teacher_config transformer.norm_eps \(was 1e-06, now 0.3\)"
    with pytest.raises(UserError, match=f"other settings, {differs}"):
        run_here(*script_arguments(tmp_path / "run", max_train_images=8, resume_from_checkpoint="latest", **same))
    with pytest.raises(SystemExit):
        flowdistill(["export", str(tmp_path / "run"), f"--output_dir={tmp_path / 'out'}", "--device=cpu"])
    error = capsys.readouterr().err
    assert "transformer.norm_eps is 0.3, in training it was 1e-06: name that with --teacher" in error
    assert not (tmp_path / "out").exists()

    run_here(*script_arguments(tmp_path / "other", max_train_images=4, **same))
    with pytest.raises(SystemExit):
        runs = [str(tmp_path / name) for name in ("run", "other")]
        flowdistill(["export", *runs, f"--output_dir={tmp_path / 'mean'}", "--device=cpu"])
    assert "differ in teacher_config transformer.norm_eps (1e-06 and 0.3)" in capsys.readouterr().err


def test_a_teacher_that_moved_is_the_same(tmp_path, capsys):
    """Training goes on to the same bits, export says what to do, and takes the teacher from where it is told."""
    shutil.copytree(saved_teacher("stable_diffusion_3"), tmp_path / "before")
    run_here(*script_arguments(tmp_path / "whole"))
    there = {"pretrained_model_name_or_path": tmp_path / "before"}
    run_here(*script_arguments(tmp_path / "run", max_train_images=4, **there))
    (tmp_path / "before").rename(tmp_path / "after")

    words = ["export", str(tmp_path / "run"), f"--output_dir={tmp_path / 'out'}", "--device=cpu"]
    with pytest.raises(SystemExit):
        flowdistill(words)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{tmp_path / 'before'}, the teacher of " in error
    assert "is no longer there: say with --teacher where it is now" in error
    with pytest.raises(SystemExit):
        flowdistill([*words, "--teacher", str(saved_student())])
    assert "is not the teacher of this training, its weights differ" in capsys.readouterr().err
    with quiet():
        flowdistill([*words, "--teacher", str(tmp_path / "after")])
    assert (tmp_path / "out" / "model_index.json").exists()

    there = {"pretrained_model_name_or_path": tmp_path / "after", "resume_from_checkpoint": "latest"}
    run_here(*script_arguments(tmp_path / "run", **there))
    whole, moved = (networks_in(tmp_path / name / "checkpoint-8") for name in ("whole", "run"))
    assert largest_difference(whole, moved) == 0
    with quiet():
        flowdistill(words)  # the last checkpoint knows where the teacher is


def test_a_run_of_a_version_that_recorded_less_is_not_gone_on_with(tmp_path):
    run_here(*script_arguments(tmp_path / "run", max_train_images=4))
    for file in (tmp_path / "run" / "run.json", tmp_path / "run" / "checkpoint-4" / "state.json"):
        recorded = json.loads(file.read_text())
        del recorded.get("settings", recorded)["teacher_config"]
        file.write_text(json.dumps(recorded))
    with pytest.raises(UserError, match="from an earlier version, which did not record the teacher's configuration"):
        run_here(*script_arguments(tmp_path / "run", max_train_images=8, resume_from_checkpoint="latest"))
