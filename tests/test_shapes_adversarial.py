# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`make shapes-adversarial`: its image sets, its judge, its table; and the mistakes that are told before it trains."""

import csv
import json
import random

import numpy as np
import pytest
from PIL import Image
from training_helpers import ROOT, run_command

from adversarial import STAGES, image_folder, summarize
from detector import accuracy
from judging_styles import StyleJudge, draw_like
from scenes import CATEGORIES, random_scene


DOCUMENT = "before\n<!-- table of `make shapes-adversarial` -->\nold\n<!-- end of that table -->\nafter\n"


@pytest.fixture(scope="module")
def scenes():
    rng = random.Random(3)
    return [random_scene(rng) for _ in range(240)]


def test_posters_show_what_their_captions_say_in_a_style_that_the_fid_sees(scenes):
    posters = draw_like("poster", scenes, 5)
    assert accuracy(scenes, posters)[0] >= 0.98
    judge = StyleJudge(240, 7)
    renders, posters = (draw_like(style, judge.scenes, 8) for style in ("own", "poster"))
    own, other = (judge.pictures("", pictures) for pictures in (renders, posters))
    assert 20 * own["fid"] < other["fid"] and 20 * other["fid_posters"] < own["fid_posters"]
    assert min(own["accuracy"], other["accuracy"]) >= 0.98


def test_an_image_set_is_the_same_every_time_and_both_styles_show_the_same_scenes(tmp_path):
    folders = [image_folder(tmp_path / run, style, 7) for run in ("a", "b") for style in ("own", "poster")]
    rows = []
    for folder in folders:
        with open(folder / "metadata.csv", newline="") as file:
            rows.append(list(csv.DictReader(file)))
    assert len(rows[0]) == 7 and rows.count(rows[0]) == 4
    pictures = [[np.asarray(Image.open(folder / row["file_name"])) for row in rows[0]] for folder in folders]
    assert all(np.array_equal(*pair) for n in (0, 1) for pair in zip(pictures[n], pictures[n + 2]))
    assert not np.array_equal(pictures[0][0], pictures[1][0]) and pictures[0][0].shape == (40, 40, 3)
    written = (folders[0] / "metadata.csv").stat().st_mtime_ns
    assert image_folder(tmp_path / "a", "own", 7) == folders[0]
    assert (folders[0] / "metadata.csv").stat().st_mtime_ns == written


def test_the_command_that_writes_an_image_set(tmp_path):
    script = ROOT / "examples/shapes/image_set.py"
    run_command(script, tmp_path / "set", "--images", 2, "--style", "poster")
    assert len(list((tmp_path / "set").glob("*.png"))) == 2
    for words, message in (
        ([tmp_path / "set"], "is there already: name a new folder"),
        ([tmp_path / "new", "--images", 0], "--images is 0: it must be at least 1"),
    ):
        refused = run_command(script, *words, check=False)
        assert refused.returncode == 2 and message in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "new").exists()


def test_the_table_has_means_and_spreads():
    rows = [
        {
            "pipeline": name,
            "accuracy": 0.9 + 0.01 * seed,
            "accuracy_by_category": dict.fromkeys(CATEGORIES, 0.5),
            "fid": 8.0 + seed,
            "fid_posters": 100.0,
            "seed": seed,
        }
        for seed in (0, 1)
        for name in ("renders", *(f"student, {stage}" for stage in STAGES))
    ]
    lines = summarize(rows).splitlines()
    assert len(lines) == 2 + 4 and all("8.5 ± 0.7" in line and "0.905 ± 0.007" in line for line in lines[2:])
    assert lines[3].startswith("| student, on renders ")


@pytest.mark.parametrize("mistake", ["no student", "no place"])
def test_mistakes_are_told_before_anything_starts(mistake, tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "doc.md").write_text(DOCUMENT if mistake == "no student" else "no marks")
    if mistake == "no place":
        (tmp_path / "student/model_index.json").write_text("{}")
    refused = run_command(
        *(
            ROOT / "examples/shapes/adversarial.py",
            "--student",
            tmp_path / "student",
            "--documents",
            tmp_path / "doc.md",
        ),
        *("--output_dir", tmp_path / "runs", "--results", tmp_path / "results.json"),
        check=False,
    )
    message = {"no student": "`make demo` makes one", "no place": "has no place for the table"}[mistake]
    assert refused.returncode == 2 and message in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "runs").exists()


def test_the_documents_table_is_that_of_the_results():
    rows = json.loads((ROOT / "docs/results/adversarial.json").read_text())
    assert summarize(rows) in (ROOT / "docs/shapes_search.md").read_text(encoding="utf-8")
