# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Several image sizes in one training: a contract, a reference and a sheet for each, one size an update."""

import math

import pytest
import tiny_teachers
import torch
from PIL import Image
from teacher_cases import learned
from test_distributed import TORCHRUN
from test_resume import same_bits, same_metrics
from training_helpers import (
    folder,
    largest_difference,
    metrics,
    networks_in,
    quiet,
    run_command,
    run_here,
    saved_teacher,
    script_arguments,
)

from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.draws import draw_bucket, draw_k
from hf_flowdistill.hub.settings import read_settings
from hf_flowdistill.planning.dry_run import describe_sizes
from hf_flowdistill.teachers import encode_prompts, first_alike, learn_contract, learn_contracts
from hf_flowdistill.training import texts


SIZES = [(32, 32), (32, 48), (48, 32)]
BUCKETS = {"aspect_ratio_buckets": "32,32;32,48;48,32", "resolution": None}
TEACHER_LATENTS = ("teacher_latent_mean", "teacher_latent_std", "teacher_latent_peak", "teacher_error")


def test_the_draw_is_uniform_and_needs_no_state():
    drawn = torch.tensor([draw_bucket(0, step, 3) for step in range(3000)])
    counts = torch.bincount(drawn)
    assert len(counts) == 3 and all(abs(counts - 1000) < 120)
    assert drawn.tolist() != [draw_bucket(1, step, 3) for step in range(3000)]
    assert {draw_bucket(0, step, 1) for step in range(50)} == {0}
    same_k = torch.tensor([1 + drawn[step].item() == draw_k(0, step, 3) for step in range(3000)])
    assert abs(same_k.float().mean() - 1 / 3) < 0.03


def test_one_bucket_is_that_size(tmp_path):
    """Bit for bit the run without buckets, but for the size in its metrics."""
    run_here(*script_arguments(tmp_path / "size"))
    run_here(*script_arguments(tmp_path / "bucket", aspect_ratio_buckets="32,32", resolution=None))
    one, other = (networks_in(tmp_path / name / "checkpoint-8") for name in ("size", "bucket"))
    assert largest_difference(one, other) == 0
    sized = [{**line, "height": 32, "width": 32} for line in metrics(tmp_path / "size")]
    for expected, line in zip(sized, metrics(tmp_path / "bucket"), strict=True):
        assert {**line, "images_per_second": 0} == {**expected, "images_per_second": 0}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Six updates in one go, with a sheet at the end."""
    output_dir = tmp_path_factory.mktemp("buckets") / "run"
    sheets = {"validation_images": 24, "validation_prompts": "red circle", "num_validation_images": 2}
    run_here(*script_arguments(output_dir, max_train_images=24, **BUCKETS, **sheets))
    return output_dir


def test_each_update_has_its_size(uninterrupted):
    lines = metrics(uninterrupted)
    drawn = [SIZES[draw_bucket(0, step, 3)] for step in range(6)]
    assert [(line["height"], line["width"]) for line in lines] == drawn and set(drawn) == set(SIZES)
    references = {(line["height"], line["width"]): [line[name] for name in TEACHER_LATENTS] for line in lines}
    for line in lines:
        assert references[line["height"], line["width"]] == [line[name] for name in TEACHER_LATENTS]
    assert len({tuple(reference) for reference in references.values()}) == 3
    assert all(math.isfinite(value) for reference in references.values() for value in reference)


def test_sheets_student_and_cache(uninterrupted):
    """A sheet of every size; the student's default is the first; what is fed alike at every size is kept once."""
    for height, width in SIZES:
        folder = uninterrupted / "validation" / f"{height}x{width}"
        assert {path.name for path in folder.iterdir()} == {"images-0.png", "images-24.png", "teacher.png"}
        with Image.open(folder / "teacher.png") as samples, Image.open(folder / "images-24.png") as sheet:
            assert samples.size == (2 * width, height)
            assert (sheet.width > sheet.height) == (width > height)
    settings = read_settings(uninterrupted / "student")
    defaults = settings["student"]["call_defaults"]
    assert (defaults["height"], defaults["width"]) == SIZES[0]
    assert settings["training_args"]["aspect_ratio_buckets"] == [list(size) for size in SIZES]
    card = (uninterrupted / "student" / "README.md").read_text()
    assert "\nIts images in training were 32x32, 32x48, 48x32 (height x width).\n" in card
    assert "| `aspect_ratio_buckets` | `[[32, 32], [32, 48], [48, 32]]` |" in card
    assert not [path for path in (uninterrupted / "conditioning").iterdir() if path.is_dir()]


def test_two_steps_and_four_more_are_six(uninterrupted, tmp_path):
    run_here(*script_arguments(tmp_path / "run", max_train_images=8, **BUCKETS))
    resumed = {"max_train_images": 24, "resume_from_checkpoint": "latest", **BUCKETS}
    with pytest.raises(UserError, match=r"aspect_ratio_buckets \(was \[\[32, 32\], \[32, 48\], \[48, 32\]\], now"):
        run_here(*script_arguments(tmp_path / "run", **{**resumed, "aspect_ratio_buckets": "32,32;48,32"}))
    run_here(*script_arguments(tmp_path / "run", **resumed))
    same_bits(uninterrupted / "checkpoint-24", tmp_path / "run" / "checkpoint-24")
    same_metrics(uninterrupted, tmp_path / "run")


def test_two_processes_are_one(uninterrupted, tmp_path):
    arguments = script_arguments(tmp_path / "two", max_train_images=12, train_batch_size=1, **BUCKETS)
    run_command(*TORCHRUN, *arguments)
    one, two = networks_in(uninterrupted / "checkpoint-12"), networks_in(tmp_path / "two" / "checkpoint-12")
    assert largest_difference(one, two) < 2e-6


def chroma_folder():
    path = folder() / "chroma"
    if not path.exists():
        with quiet():
            tiny_teachers.chroma().save_pretrained(path)
    return path


def test_conditioning_that_depends_on_the_size(tmp_path):
    """Chroma's mask covers the image tokens too, so that every size has its own rows, cached by themselves."""
    case = learned("chroma")
    contracts = learn_contracts(case.pipeline, [*SIZES, (16, 64)], case.teacher.kwargs)
    # 32x48 and 48x32 have one number of tokens; so have 32x32 and 16x64
    assert first_alike(case.pipeline, contracts) == [0, 1, 1, 0]
    masks = [encode_prompts(case.pipeline, contract, ["x"])[0].tensors["attention_mask"] for contract in contracts]
    assert masks[1].shape[1] - masks[0].shape[1] == 8

    arguments = script_arguments(
        tmp_path / "run", **{**BUCKETS, "pretrained_model_name_or_path": chroma_folder()}, max_sequence_length=16
    )
    run_here(*arguments)
    cache = tmp_path / "run" / "conditioning"
    assert [path.name for path in cache.iterdir() if path.is_dir()] == ["32x48"]
    assert len(list(cache.glob("shard-*"))) == len(list(cache.glob("32x48/shard-*"))) == 2
    assert {(line["height"], line["width"]) for line in metrics(tmp_path / "run")} > {SIZES[0]}


def test_teachers_that_feed_alike_at_every_size():
    case = learned("sd3")
    contracts = learn_contracts(case.pipeline, SIZES, case.teacher.kwargs)
    assert first_alike(case.pipeline, contracts) == [0, 0, 0]
    assert [contract.latent_shape for contract in contracts] == [(4, 8, 8), (4, 8, 12), (4, 12, 8)]
    alone = learn_contract(case.pipeline, height=32, width=48, pipeline_kwargs=case.teacher.kwargs)
    assert contracts[1].as_dict() == alone.as_dict()


def test_times_that_depend_on_the_size():
    """CogView4's are a table, and a student has the times of one size among its defaults."""
    case = learned("cogview4")
    assert len(learn_contracts(case.pipeline, [(32, 64), (64, 32)])) == 2
    with pytest.raises(UserError, match="feeds its transformer other times at 64x64 than at 32x32, .*: train it at"):
        learn_contracts(case.pipeline, [(32, 32), (64, 64)])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"aspect_ratio_buckets": "32x32"}, r"must be pairs of height and width, e\.g\. 512,512;384,680, not '32x32'"),
        ({"aspect_ratio_buckets": "32,0"}, "must be pairs of height and width"),
        ({"aspect_ratio_buckets": "32,32;32,32"}, "must be different sizes, not '32,32;32,32'"),
        ({"height": 48}, "--height and --width are of one size: leave them out where there are --aspect_ratio_bucke"),
        ({"aspect_ratio_buckets": "32,32;36,32"}, "have to be divisible by 8 but are 36 and 32"),
        ({"aspect_ratio_buckets": "32,32;512,32"}, "fails when called with height 512, width 32"),
    ],
)
def test_what_cannot_be_a_bucket_is_refused_before_anything_is_encoded(changes, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "first_alike", pytest.fail)
    with pytest.raises(UserError, match=sentence):
        run_here(*script_arguments(tmp_path / "run", **{**BUCKETS, **changes}))


def test_the_plan_tells_every_size():
    told = describe_sizes(saved_teacher("stable_diffusion_3"), SIZES, 1000)
    assert [line.partition("hidden_states ")[2] for line in told if line.startswith("image: ")] == [
        "[4, 8, 8], 16 tokens",
        "[4, 8, 12], 24 tokens",
        "[4, 12, 8], 24 tokens",
    ]
    for start in ("text: ", "kept for each prompt: "):
        assert sum(line.startswith(start) for line in told) == 1
    one = describe_sizes(saved_teacher("stable_diffusion_3"), SIZES[:1], 1000)
    assert [line for line in one if not line.startswith("image: ")] == [
        line for line in told if not line.startswith("image: ")
    ]
    kept = [
        describe_sizes(chroma_folder(), sizes, 10**6)[-1].split("distinct, ")[1]
        for sizes in (SIZES[:1], SIZES[1:], SIZES)
    ]
    first, other, both = (float(line.split(" GB")[0]) for line in kept)
    assert math.isclose(both, first + other, abs_tol=0.011) and first > 1
    with pytest.raises(UserError, match="have to be divisible by 8 but are 36 and 32"):
        describe_sizes(saved_teacher("stable_diffusion_3"), [(32, 32), (36, 32)], 1)
