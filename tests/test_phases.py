# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What begins at some number of images: it is told where the training ends before, and the student is not said to
have it."""

import json

import numpy as np
import pytest
from PIL import Image
from stand_in_pairs import open_images, open_pairs
from training_helpers import quiet, run_here, saved_student, script_arguments

from hf_flowdistill.cli import main as flowdistill
from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.draws import draw_k
from hf_flowdistill.hub.settings import read_settings
from hf_flowdistill.methods.phases import last_begun, method_of, not_reached, trained_sampler
from hf_flowdistill.training import run as run_module


LEVELS = [1.0, 0.9]


def settings(**named):
    return {"images_per_update": 4, "num_steps": 2, "noise_type": "fresh", "sigmas": LEVELS, **named}


def warnings_of(caplog):
    return [record.message for record in caplog.records if "the training ends before" in record.message]


@pytest.mark.parametrize("start", range(0, 20))
def test_the_sampler_is_that_of_the_last_update(start):
    """Counted out, update by update, as `SiD.update` does it."""
    used = None
    for before in range(0, 20, 4):
        used = None if before < start else LEVELS
        assert trained_sampler(settings(sigmas_start_images=start), before + 4).sigmas == used
    assert trained_sampler(settings(sigmas_start_images=start), 0).sigmas == (None if start else LEVELS)


def test_the_last_update_of_a_length_that_is_no_multiple():
    assert [last_begun(settings(), seen) for seen in (0, 1, 4, 5, 8, 9)] == [0, 0, 0, 4, 4, 8]


def test_an_adversarial_student_is_one_that_the_term_has_trained():
    stage = settings(adversarial=True, adversarial_weight=0.5, adversarial_start_images=8)
    assert [method_of(stage, seen) for seen in (4, 8, 12)] == ["sid", "sid", "sid_adversarial"]
    assert method_of({**stage, "adversarial_weight": 0}, 12) == "sid" == method_of(settings(), 12)


@pytest.mark.parametrize("name", ["sigmas_start_images", "adversarial_start_images", "discriminator_warmup_images"])
def test_a_phase_is_not_reached_where_no_update_begins_in_it(name):
    assert [bool(not_reached(settings(**{name: start}), 16)) for start in (0, 12, 13, 16)] == [
        False,
        False,
        True,
        True,
    ]
    assert f"(--{name} 30)" in not_reached(settings(**{name: 30}), 16)[name]


def test_a_warm_up_is_over_with_the_update_at_the_whole_rate():
    assert [bool(not_reached(settings(lr_warmup_images=n), 16)) for n in (0, 16, 17)] == [False, False, True]


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0, 0.25], [0.1, 0.02, 0.3], [0.01, 0, 0.2], [0, 0], [0.3, 0.3, 0.4]])
def test_a_step_in_turn_is_missed_where_no_update_draws_it(shares):
    for length in (16, 40, 100):
        for seen in range(4, length + 4, 4):
            asked = settings(step_shares=shares, max_train_images=length)
            done = [
                draw_k(0, 0, 10**9, shares=shares, progress=before / length)  # large where no step is in turn
                for before in range(0, min(seen, length), 4)
            ]
            missed = [k for k, share in enumerate(shares, start=1) if share and k not in done]
            found = not_reached(asked, seen).get("step_shares", "")
            assert bool(found) == bool(missed)
            assert not missed or found.startswith(f"the turn of sampler step {' and '.join(map(str, missed))} (")


def test_levels_that_were_never_trained_at_leave_no_trace(tmp_path, caplog):
    """Not in the student, its card or its sheets, and not in what a checkpoint is exported as."""
    sheets = {"validation_prompts": "square", "validation_images": 4, "num_validation_images": 1, "num_steps": 2}
    run_here(*script_arguments(tmp_path / "even", **sheets))
    assert not warnings_of(caplog)
    run_here(*script_arguments(tmp_path / "never", "--sigmas", 1, 0.9, **sheets, sigmas_start_images=8))
    phrase = "training at --sigmas (--sigmas_start_images 8)"
    assert warnings_of(caplog) == [f"the training ends before {phrase}: --max_train_images is 8"]
    run_here(*script_arguments(tmp_path / "late", "--sigmas", 1, 0.9, **sheets, sigmas_start_images=4))
    assert len(warnings_of(caplog)) == 1

    def exported(name, checkpoint):
        with quiet():
            folder = tmp_path / f"{name}-{checkpoint}"
            flowdistill(["export", str(tmp_path / name / checkpoint), "--output_dir", str(folder), "--device=cpu"])
        return folder

    for folder in (
        tmp_path / "never" / "student",
        exported("never", "checkpoint-8"),
        exported("late", "checkpoint-4"),
    ):
        written, card = read_settings(folder), (folder / "README.md").read_text()
        assert "sigmas" not in written["student"]["call_defaults"] and not written["training_args"]["sigmas"]
        assert "Its steps are at" not in card and "`sigmas`" not in card
        assert "The training ended before training at --sigmas (--sigmas_start_images" in card
    for folder in (tmp_path / "late" / "student", exported("late", "checkpoint-8")):
        assert read_settings(folder)["student"]["call_defaults"]["sigmas"] == LEVELS
        assert "The training ended before" not in (folder / "README.md").read_text()

    def sheet(name, images):
        return np.asarray(Image.open(tmp_path / name / "validation" / f"images-{images}.png"))

    assert (sheet("even", 8) == sheet("never", 8)).all() and (sheet("even", 4) == sheet("late", 4)).all()
    assert (sheet("even", 8) != sheet("late", 8)).any()


def test_checkpoints_with_and_without_the_levels_have_no_mean(tmp_path, capsys):
    run_here(*script_arguments(tmp_path / "run", "--sigmas", 1, 0.9, num_steps=2, sigmas_start_images=4))
    both = [str(tmp_path / "run" / f"checkpoint-{images}") for images in (4, 8)]
    with pytest.raises(SystemExit):
        flowdistill(["export", *both, f"--output_dir={tmp_path / 'mean'}", "--device=cpu"])
    assert "differ in sigmas (None and [1.0, 0.9]): give runs of one teacher" in capsys.readouterr().err


def adversarial(output_dir, **named):
    common = {"prompt_file": None, "dataset_name": "none", "student_model_name_or_path": saved_student()}
    return script_arguments(output_dir, "--adversarial", **common, **named)


def test_a_stage_that_would_only_rest_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "open_images", open_images)
    monkeypatch.setattr(run_module, "open_pairs", open_pairs)
    with pytest.raises(
        UserError, match="rest for all of --max_train_images 8, since --discriminator_warmup_images is 200"
    ):
        run_here(*adversarial(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_stage_whose_term_never_acts_is_no_adversarial_training(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run_module, "open_images", open_images)
    monkeypatch.setattr(run_module, "open_pairs", open_pairs)
    run_here(*adversarial(tmp_path / "run", discriminator_warmup_images=4, adversarial_start_images=8))
    phrase = "the adversarial term (--adversarial_start_images 8)"
    assert warnings_of(caplog) == [f"the training ends before {phrase}: --max_train_images is 8"]
    folder = tmp_path / "run" / "student"
    card, written = (folder / "README.md").read_text(), json.loads((folder / "training_args.json").read_text())
    assert written["student"]["method"] == "sid" and "SiD2a" not in card
    assert f"The training ended before {phrase}." in card
