# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Sample sheets: their layout, the teacher's own rows, and what they do where those cannot be drawn."""

import json

import numpy as np
import pytest
import tiny_pipelines
from PIL import Image, ImageFont
from training_helpers import run_here, saved_teacher, script_arguments

from hf_flowdistill.flow.draws import sample_noise
from hf_flowdistill.networks.loading import load_pipeline
from hf_flowdistill.teachers import learn_contract
from hf_flowdistill.teachers.watch import CallFailed
from hf_flowdistill.training import sheets
from hf_flowdistill.training.contact_sheet import Block, contact_sheet, wrapped


SIDE = tiny_pipelines.HEIGHT
SHEETS = ["--validation_prompts", "red circle", "a blue square", "--num_validation_images=3"]
CALLS = {"stable_diffusion_3": {"guidance_scale": 4.5}, "flux": {"guidance_scale": 4.5}}


def plain(colour, size=(160, 160)):
    return Image.new("RGB", size, colour)


def test_samples_stand_apart_under_their_captions():
    rows = [("teacher", [plain("red"), plain("green")]), ("student", [plain("blue"), plain("black")])]
    sheet = contact_sheet([Block("one", rows), Block("two", rows)], title="8 images seen")
    pixels = np.asarray(sheet)
    white = (pixels == 255).all(axis=2)
    for colour, times in (((255, 0, 0), 2), ((0, 128, 0), 2), ((0, 0, 255), 2), ((0, 0, 0), 2)):
        found = (pixels == colour).all(axis=2)
        assert found.sum() == times * 160 * 160
        assert np.flatnonzero(found.any(axis=0)).size == 160  # one column
    red, green = (np.flatnonzero((pixels == colour).all(axis=2).any(axis=0)) for colour in ((255, 0, 0), (0, 128, 0)))
    assert white[:, red[-1] + 1 : green[0]].all() and 4 <= green[0] - red[-1] - 1 <= 16  # a gutter
    assert white[0].all() and white[-1].all() and white[:, 0].all() and white[:, -1].all()
    text = ~white[: np.flatnonzero((pixels == (255, 0, 0)).all(axis=2).any(axis=1))[0]]
    assert text.any()  # title and caption


def test_small_samples_are_enlarged_pixel_by_pixel():
    tiny = Image.fromarray(np.random.default_rng(0).integers(0, 200, (40, 48, 3), dtype=np.uint8))
    sheet = np.asarray(contact_sheet([Block("a", [("student", [tiny])])], title=""))
    rows, columns = (np.flatnonzero((sheet[..., 0] < 200).any(axis=axis)) for axis in (1, 0))
    shown = sheet[rows[-1] - 159 : rows[-1] + 1, columns[-1] - 191 : columns[-1] + 1]
    assert np.array_equal(shown[::4, ::4], np.asarray(tiny)) and np.array_equal(shown[3::4, 3::4], np.asarray(tiny))


@pytest.mark.parametrize("text", ["a red circle " * 60, "circle" * 90, "short", "", "\n", "圆" * 300])
def test_captions_fit(text):
    font = ImageFont.load_default(12)
    lines = wrapped(text, font, 200, lines=2)
    assert len(lines) <= 2 and all(font.getlength(line) <= 200 for line in lines)
    whole = " ".join(text.split())
    assert " ".join(lines) == whole if font.getlength(whole) <= 200 else lines[-1].endswith("...")
    assert font.getlength(whole) <= 200 or font.getlength(lines[0]) > 150  # the room is used


@pytest.mark.parametrize("teacher", CALLS)
def test_the_teachers_rows_are_its_pipelines_own_pictures(teacher, tmp_path, monkeypatch):
    """From the noise of the student's first step, in the pipeline's own number of steps; drawn once, and anew where
    they are of other prompts."""
    words = script_arguments(tmp_path / "run", *SHEETS, teacher=teacher, validation_images=4)
    run_here(*words)
    folder = tmp_path / "run" / "validation"
    assert {path.name for path in folder.iterdir()} == {*(f"images-{n}.png" for n in (0, 4, 8)), "teacher.png"}
    kept = Image.open(folder / "teacher.png")
    assert kept.size == (3 * SIDE, 2 * SIDE) and json.loads(kept.text["about"])["guidance"]["scale"] == 4.5
    pipeline = load_pipeline(saved_teacher(teacher))
    pipeline.set_progress_bar_config(disable=True)
    shape = learn_contract(pipeline, height=SIDE, width=SIDE).latent_shape
    for row, prompt in enumerate(("red circle", "a blue square")):
        noise = sample_noise(shape, seed=0, step=0, purpose="validation step 0", indices=range(3 * row, 3 * row + 3))
        images = pipeline([prompt] * 3, height=SIDE, width=SIDE, latents=noise, **CALLS[teacher]).images
        for column, image in enumerate(images):
            box = column * SIDE, row * SIDE, (column + 1) * SIDE, (row + 1) * SIDE
            error = np.abs(np.asarray(kept.crop(box), dtype=int) - np.asarray(image, dtype=int))
            assert error.max() <= 1 and np.asarray(image).std() > 1
    assert int(kept.text["steps"]) == len(pipeline.scheduler.timesteps) > 20

    before = (folder / "teacher.png").stat().st_mtime_ns
    again = ["--resume_from_checkpoint=latest", "--max_train_images=12"]
    monkeypatch.setattr(sheets.Sheets, "_sampled", pytest.fail)
    run_here(*words, *again)
    assert (folder / "images-12.png").exists() and (folder / "teacher.png").stat().st_mtime_ns == before
    monkeypatch.undo()
    run_here(*words, *again[:1], "--max_train_images=16", "--validation_prompts", "green ring")
    assert Image.open(folder / "teacher.png").size == (3 * SIDE, SIDE)


def test_where_the_teacher_cannot_be_sampled_the_sheet_says_so_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    def fails(*_):
        raise CallFailed("no way")

    titles, notes = [], []

    def noted(blocks, *, title, note):
        titles.append(title)
        notes.append(note)
        assert [label for block in blocks for label, _ in block.rows] == ["student"] * 2
        return contact_sheet(blocks, title=title, note=note)

    monkeypatch.setattr(sheets, "sampler_levels", fails)
    monkeypatch.setattr(sheets, "contact_sheet", noted)
    run_here(*script_arguments(tmp_path / "run", *SHEETS, validation_images=4))
    assert titles == [f"{seen} images seen, student: 4 steps" for seen in (0, 4, 8)]
    assert notes == ["no samples of the teacher: no way"] * 3
    assert caplog.text.count("no samples of the teacher") == 1
    assert (tmp_path / "run" / "student" / "model_index.json").exists()
