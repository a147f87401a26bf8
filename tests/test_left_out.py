# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Trainings that do not train: what is left out of one is told, and what never was one does not leave as a student."""

import math

import pytest
import tiny_pipelines
from training_helpers import quiet, run_here, script_arguments

from hf_flowdistill.cli import main as flowdistill
from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.rollout import Sampler
from hf_flowdistill.hub.export import export_student
from hf_flowdistill.methods import sid


def test_updates_that_are_left_out_are_told_in_log_and_card(tmp_path, monkeypatch, caplog):
    """Every second one of the generator's; the log has the first, and each time that they have doubled."""
    generator_turn = sid.generator_turn

    def sometimes_nan(networks, contract, batch, config):
        loss, diagnostics = generator_turn(networks, contract, batch, config)
        return loss * (math.nan if next(calls) % 4 == 0 else 1), diagnostics  # two micro-batches in an update

    monkeypatch.setattr(sid, "generator_turn", sometimes_nan)
    calls = iter(range(100))
    run_here(*script_arguments(tmp_path / "run", max_train_images=24))
    told = [record.message for record in caplog.records if "left out" in record.message]
    assert [line.rpartition("; ")[2] for line in told[:-1]] == [
        "so far 1 of 1 of generator",
        "so far 2 of 3 of generator",
    ]
    assert told[-1].endswith("gradient was not finite: 3 of 6 of generator")
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert "| updates left out, since a loss or gradient was not finite | 3 of 6 of generator |" in card


def test_a_student_that_was_never_trained_is_not_exported(tmp_path, monkeypatch):
    generator_turn = sid.generator_turn

    def nan(networks, contract, batch, config):
        loss, diagnostics = generator_turn(networks, contract, batch, config)
        return loss * math.nan, diagnostics

    monkeypatch.setattr(sid, "generator_turn", nan)
    with pytest.raises(UserError, match="there is no student: none of the generator's 2 updates was taken"):
        run_here(*script_arguments(tmp_path / "run"))
    assert not (tmp_path / "run" / "student").exists()
    with pytest.raises(SystemExit), quiet():
        flowdistill(["export", str(tmp_path / "run"), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_students_folder_is_no_teacher(tmp_path):
    student = tmp_path / "student"
    with quiet():
        export_student(tiny_pipelines.stable_diffusion_3(), student, Sampler())
    with pytest.raises(UserError, match="is itself a student of few steps.*as --student_model_name_or_path to go on"):
        run_here(*script_arguments(tmp_path / "run", pretrained_model_name_or_path=student))
    assert not (tmp_path / "run").exists()
