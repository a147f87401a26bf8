# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The training script's adversarial stage: what it starts from, its gate, its metrics, and what it refuses."""

import json
import shutil

import pytest
import torch
from image_sets import write_image_set
from safetensors.torch import load_file, save_file
from score_distillation import train_sid_dit
from stand_in_pairs import open_images, open_pairs
from training_helpers import (
    metrics,
    networks_in,
    prompt_file,
    reset_accelerate,
    run_here,
    saved_student,
    saved_teacher,
    script_arguments,
)

from hf_flowdistill.errors import UserError
from hf_flowdistill.hub.settings import write_settings
from hf_flowdistill.networks.adapters import LORA_FILE
from hf_flowdistill.training import run as run_module


GATE = {"discriminator_warmup_images": 4, "adversarial_start_images": 8}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(run_module, "open_images", open_images)
    monkeypatch.setattr(run_module, "open_pairs", open_pairs)


def adversarial(output_dir, *more, **named):
    settings = {"prompt_file": None, "dataset_name": "none", "student_model_name_or_path": saved_student()}
    gate = {"discriminator_warmup_images": 0, "adversarial_start_images": 0}  # the defaults are longer than these runs
    return script_arguments(output_dir, "--adversarial", *more, **{**settings, **gate, **named})


def of_generator(checkpoint):
    whole = networks_in(checkpoint)
    return {name.removeprefix("generator."): value for name, value in whole.items() if name.startswith("generator.")}


def test_the_stage_goes_through_its_gate(tmp_path):
    """First the discriminator alone, then SiD, then both; over two parts of the images, and with a measured share."""
    run_here(*adversarial(tmp_path / "run", **GATE, max_train_images=16))
    student, (first, second, third, fourth) = load_file(saved_student() / WEIGHTS), metrics(tmp_path / "run")
    start, moved = (of_generator(tmp_path / "run" / f"checkpoint-{images}") for images in (4, 8))
    assert all(torch.equal(start[name], student[name]) for name in student)
    assert any(not torch.equal(moved[name], student[name]) for name in student)
    assert "generator_loss" not in first and "x0_std" in first and "latent_spread" in first
    assert "generator_loss" in second and "adversarial_loss" not in second
    assert 0 < third["adversarial_share"] < 1 and "adversarial_share" not in fourth
    for line in (first, second, third, fourth):
        assert {"discriminator_loss", "real_logit", "fake_logit"} < line.keys()
        assert 0 <= line["real_accuracy"] <= 1 and 0 <= line["fake_accuracy"] <= 1
    state = json.loads((tmp_path / "run" / "checkpoint-16" / "state.json").read_text())
    assert state["images"] == {"first": 8}
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert "SiD-DiT with an adversarial term" in card and "`adversarial_weight` | `0.5`" in card


def test_images_that_are_none_are_refused_before_the_teacher_is_loaded(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(run_module, "load_teacher", pytest.fail)
    columns = write_image_set(tmp_path / "set", "parquet", 4, broken=range(4))
    for more, sentence in (
        (
            columns,
            r"no image of the dataset .*set can be used \(row 0: it is of no known format\): choose --image_col",
        ),
        ({**columns, "image_column": "n"}, r"no image of the dataset .* \(row 0: it is no image but int\)"),
        ({**columns, "caption_column": "text"}, "the dataset .*set has no column text: choose --caption_column among"),
        ({"dataset_name": tmp_path / "nowhere"}, "the dataset .*nowhere cannot be read"),
    ):
        with pytest.raises(UserError, match=sentence):
            run_here(*adversarial(tmp_path / "run", **{"dataset_name": tmp_path / "set", **more}))
        assert not (tmp_path / "run").exists()


def test_images_are_the_pairs(tmp_path, monkeypatch, caplog):
    """A folder of pictures, one of them broken, in parts; stopped in the middle of one, the same bits come of it."""
    monkeypatch.undo()
    columns = write_image_set(tmp_path / "set", "imagefolder", 20, broken={3})
    data = {"dataset_name": tmp_path / "set", **columns, "images_per_part": 8, **GATE}
    run_here(*adversarial(tmp_path / "whole", **data, max_train_images=16))
    run_here(*adversarial(tmp_path / "parts", **data, max_train_images=12))
    caplog.clear()
    run_here(*adversarial(tmp_path / "parts", **data, max_train_images=16, resume_from_checkpoint="latest"))
    assert f"8 of 8 images are read from {tmp_path / 'parts' / 'images'}" in caplog.text
    whole, parts = (networks_in(tmp_path / name / "checkpoint-16") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert len((tmp_path / "whole" / "images" / "skipped.jsonl").read_text().splitlines()) == 1
    assert json.loads((tmp_path / "whole" / "checkpoint-16" / "state.json").read_text())["images"]["first"] > 0


def test_a_student_with_a_lora_is_gone_on_with(tmp_path):
    """Its adapter is the generator's, whatever alpha; another rank is refused, and a student without a LoRA."""
    lora = {"networks": "lora", "rank": 4, "lora_alpha": 6, "max_train_images": 4}
    run_here(*script_arguments(tmp_path / "first", **lora, ema_half_life_images=0))
    student = tmp_path / "first" / "student"
    more = {"max_train_images": 8, "student_model_name_or_path": student}  # it rests for four of them
    run_here(*adversarial(tmp_path / "run", **{**lora, **more}, **GATE))
    start, trained = (of_generator(tmp_path / name / "checkpoint-4") for name in ("run", "first"))
    assert start.keys() == trained.keys()
    assert all(torch.allclose(start[name], trained[name], rtol=1e-6, atol=0) for name in trained)
    lora["student_model_name_or_path"] = student
    with pytest.raises(UserError, match="LoRA is of other layers or of another rank: choose"):
        run_here(*adversarial(tmp_path / "other", **{**lora, "rank": 2}))
    (student / LORA_FILE).unlink()
    with pytest.raises(UserError, match=f"has no {LORA_FILE} for the generator of --networks lora"):
        run_here(*adversarial(tmp_path / "another", **lora))


def test_a_student_of_another_teacher_is_refused(tmp_path):
    other = shutil.copytree(saved_student(), tmp_path / "other")
    config = json.loads((other / "transformer" / "config.json").read_text())
    for path, refused in (
        (saved_teacher("sana"), "has a SanaTransformer2DModel, but the teacher a SD3Transformer2DModel"),
        (other, "has a transformer with num_layers 7, but the teacher one with"),
        (tmp_path / "nothing", "does not exist"),
    ):
        (other / "transformer" / "config.json").write_text(json.dumps({**config, "num_layers": 7}))
        with pytest.raises(UserError, match=refused):
            run_here(*adversarial(tmp_path / "run", student_model_name_or_path=path))
    (other / "transformer" / "config.json").write_text(json.dumps(config))
    weights = load_file(other / WEIGHTS)
    save_file({**weights, "proj_out.weight": weights["proj_out.weight"][:2].clone()}, other / WEIGHTS)
    with pytest.raises(UserError, match="cannot be (read|gone on with)"):
        run_here(*adversarial(tmp_path / "run2", student_model_name_or_path=other))


def test_going_on_with_another_sampler_is_told(tmp_path, monkeypatch):
    """Even levels of as many steps are the default's, spelled out or not."""
    warned, student = [], shutil.copytree(saved_student(), tmp_path / "student")
    of_student = {"student_model_name_or_path": student, "num_steps": 2}
    sampler = {"num_steps": 2, "noise_type": "fresh", "call_defaults": {"sigmas": [1.0, 0.5]}}
    write_settings(student, {"exported_by": "hf_flowdistill", "student": sampler})
    monkeypatch.setattr(run_module.logger, "warning", warned.append)
    for number, sigmas in enumerate(([], ["--sigmas", 1, 0.9])):
        run_here(*adversarial(tmp_path / f"run{number}", *sigmas, **GATE, **of_student))
    before, now = (f"2 steps at sigma {levels}, fresh noise" for levels in ("1, 0.5", "1, 0.9"))
    told = [sentence for sentence in warned if "was made for" in sentence]
    assert told == [f"the student {student} was made for {before}; it goes on with {now}."]


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (["--adversarial"], "goes on with a student that was distilled without images"),
        (["--adversarial_weight=0.3"], "--adversarial_weight is of the adversarial stage: give --adversarial too"),
        (["--discriminator_features=proj_out"], "--discriminator_features is of the adversarial stage"),
        (["--adversarial", "STUDENT", "--adversarial_weight=2"], "--adversarial_weight is 2.0: it must be from 0"),
        (["--adversarial", "STUDENT", "--adversarial_start_images=5"], "it must be at least --discriminator_warmup"),
        (["--adversarial", "STUDENT", "--discriminator_warmup_images=-1"], "must be at least 0"),
        (["--adversarial", "STUDENT", "--aspect_ratio_buckets=32,32;32,64"], "has images of one size"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments, refused):
    prompts = "--dataset_name=x" if "STUDENT" in arguments else f"--prompt_file={prompt_file()}"
    arguments = [argument.replace("STUDENT", "--student_model_name_or_path=x") for argument in arguments]
    common = ["--pretrained_model_name_or_path=a/b", prompts, "--report_to=none"]
    with pytest.raises(UserError, match=refused):
        train_sid_dit.parse_args([*common, *arguments])


def test_a_module_that_is_none_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match="--discriminator_features out is no module of SD3Transformer2DModel"):
        run_here(*adversarial(tmp_path / "run", discriminator_features="out"))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_reads_what_the_run_would(tmp_path, capsys, monkeypatch):
    """Another split than train, a slice of one, and captions that are none."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    rows = {"image": [b"no image"] * 4, "text": ["a", None, " ", "b"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "set" / "validation-0.parquet")
    for split, prompts in (("validation", 2), ("validation[:3]", 1)):
        reset_accelerate()
        data = {"dataset_name": tmp_path / "set", "dataset_split": split}
        train_sid_dit.main(adversarial(tmp_path / "run", "--dry_run", **data))
        assert f"{prompts} distinct" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no column jpg: choose --image_column among image, text"):
        reset_accelerate()
        train_sid_dit.main(adversarial(tmp_path / "run", "--dry_run", **data, image_column="jpg"))


def test_data_that_changed_is_another_run(tmp_path, monkeypatch):
    monkeypatch.undo()
    columns = write_image_set(tmp_path / "set", "imagefolder", 8)
    data = {"dataset_name": tmp_path / "set", **columns, **GATE}
    run_here(*adversarial(tmp_path / "run", "--streaming", **data, max_train_images=8))
    shutil.copy(tmp_path / "set" / "00001.jpg", tmp_path / "set" / "00000.jpg")
    with pytest.raises(UserError, match="from a run with other settings, dataset .was .*: use those, or start a new"):
        run_here(
            *adversarial(tmp_path / "run", "--streaming", **data, max_train_images=12, resume_from_checkpoint="latest")
        )


def test_a_part_smaller_than_the_update_of_all_processes_is_refused(tmp_path):
    for processes, refused in (
        (["--dry_run", "4"], "which are 16 of 4 processes"),
        ([], "which are 4 of 1 processes"),
    ):
        with pytest.raises(UserError, match=f"--images_per_part is 3: .*, {refused}"):
            reset_accelerate()
            train_sid_dit.main(adversarial(tmp_path / "run", *processes, images_per_part=3))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_it_leaves_out(tmp_path, capsys):
    write_image_set(tmp_path / "set", "imagefolder", 4)
    reset_accelerate()
    train_sid_dit.main(adversarial(tmp_path / "run", "--dry_run", dataset_name=tmp_path / "set"))
    printed = capsys.readouterr().out
    assert "not in it: the pass of the real images" in printed and "images: 8 in 2 updates" in printed
    assert not (tmp_path / "run").exists()
