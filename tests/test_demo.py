# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`make demo` end to end, shortened; and the claims of the README, on the report of the full one."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image

from demo import HERE, launch, train, usable_cpus
from hf_flowdistill.evaluation.report import format_table


ROOT = Path(__file__).parents[1]
SHORT = """--num_prompts 60 --curve_prompts 60 --max_train_images 96 --checkpointing_images 48 --validation_images 96
--report_to none""".split()
KEYS = {
    *("pipeline", "num_steps", "guidance_scale", "accuracy", "accuracy_by_category", "fid"),
    *("forwards_per_image", "seconds_per_image"),
}


def demo(output_dir, *more):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(ROOT / "examples" / "shapes" / "demo.py"), "--output_dir", str(output_dir), *more]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900)


def test_demo_writes_report_and_pictures(tmp_path):
    done = demo(tmp_path / "demo", *SHORT)
    assert done.returncode == 0, done.stderr
    processes = min(2, usable_cpus())
    assert f"{processes} processes x 1 micro-batches x {48 // processes}" in done.stderr
    rows = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert all(set(row) == KEYS for row in rows)
    expected = {("teacher", 28)} | {(name, n) for name in ("teacher", "undistilled", "student") for n in (1, 2, 4)}
    assert {(row["pipeline"], row["num_steps"]) for row in rows} == expected
    forwards = {(row["pipeline"], row["num_steps"], row["guidance_scale"]): row["forwards_per_image"] for row in rows}
    assert forwards["student", 4, 1.0] == 4 and forwards["undistilled", 4, 1.0] == 4
    assert {n for (name, steps, _), n in forwards.items() if name == "teacher" and steps == 28} == {56}
    assert format_table(rows) in done.stdout
    curve = json.loads((tmp_path / "demo" / "curve.json").read_text())
    assert [point["images_seen"] for point in curve] == [48, 96] and set(curve[0]) == KEYS | {"images_seen"}
    for name in ("grid.png", "curve.png"):
        assert min(Image.open(tmp_path / "demo" / name).size) > 300


@pytest.mark.parametrize("words", [["--weighting", "none-such"], ["--teacher", "nowhere"]])
def test_a_mistake_is_one_sentence(words, tmp_path):
    """What the arguments show, and what only the training sees."""
    done = demo(tmp_path / "demo", *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1


def test_processes_that_fail(capfd):
    """What the second one says is heard where the first one cannot tell, which does not wait for it for ever."""
    program = "import os, sys, time; rank = int(os.environ['RANK']); print('rank', rank, file=sys.stderr);"
    code = launch([sys.executable, "-c", program + "time.sleep(100) if rank == 0 else sys.exit(3)"], 2, patience=1)
    assert code == 3 and sorted(capfd.readouterr().err.splitlines()) == ["rank 0", "rank 1"]
    assert launch([sys.executable, "-c", program + "sys.exit(2)"], 2) == 2
    assert capfd.readouterr().err == "rank 0\n"
    assert launch([sys.executable, "-c", program], 2) == 0 and capfd.readouterr().err == "rank 0\n"


@pytest.mark.parametrize("cpus, batch, processes", [(1, 48, 1), (2, 48, 2), (8, 48, 2), (8, 25, 1)])
def test_processes_of_a_training(cpus, batch, processes, monkeypatch, tmp_path):
    launched = []
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("demo.usable_cpus", lambda: cpus)
    monkeypatch.setattr("demo.launch", lambda words, count: launched.append((count, words[-1])))
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model_index.json").touch()
    (tmp_path / "run.json").write_text("{}")
    args = Namespace(config=str(HERE / "recipe.yaml"), teacher=str(HERE / "teacher"), guidance_scale=2.0)
    train(tmp_path, args, ["--train_batch_size", str(batch)])
    assert launched == [(processes, str(batch // processes))]


@pytest.fixture(scope="module")
def reported():
    """The report that `make demo` wrote for the README."""
    return json.loads((ROOT / "docs" / "results" / "shapes_demo.json").read_text())


def find(rows, pipeline, num_steps):
    return [row for row in rows if (row["pipeline"], row["num_steps"]) == (pipeline, num_steps)]


def test_the_teacher_is_good_and_its_steps_matter(reported):
    (slow,), (fast,) = find(reported, "teacher", 28), find(reported, "teacher", 4)
    assert slow["accuracy"] >= 0.95 and min(slow["accuracy_by_category"].values()) >= 0.90
    assert fast["fid"] >= 2 * slow["fid"] and fast["accuracy"] <= slow["accuracy"] - 0.10


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_the_student_is_ahead_of_its_controls(reported, num_steps):
    (student,) = find(reported, "student", num_steps)
    controls = find(reported, "teacher", num_steps) + find(reported, "undistilled", num_steps)
    assert len(controls) == 3 and all(student["fid"] < control["fid"] for control in controls)


def test_the_student_stands_beside_its_teacher(reported):
    (teacher,), (student,) = find(reported, "teacher", 28), find(reported, "student", 4)
    assert student["accuracy"] >= teacher["accuracy"] - 0.02 - 1e-9 and student["fid"] <= 1.5 * teacher["fid"]


def test_the_readme_shows_that_report(reported):
    assert format_table(reported) in (ROOT / "README.md").read_text(encoding="utf-8")
