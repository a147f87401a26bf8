# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`make shapes-table` end to end, shortened: rows of every seed, means and spreads in the documents."""

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from table import summarize


ROOT = Path(__file__).parents[1]
# an odd batch is one process's: fewer to start
SHORT = """--num_prompts 60 --train_batch_size 25 --max_train_images 25 --checkpointing_images 25
--validation_images 25 --report_to none --reference_guidance_scales 1.0""".split()
DOCUMENT = "before\n<!-- table of table.py -->\nold\n<!-- end of the table -->\nafter\n"


def table(folder, *more):
    words = [sys.executable, ROOT / "examples/shapes/table.py", "--output_dir", folder / "runs"]
    words += ["--results", folder / "shapes.json", "--documents", folder / "shapes.md", *SHORT, *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(w) for w in words], env=environment, capture_output=True, text=True, timeout=900)


def test_two_seeds_end_to_end(tmp_path):
    """One test, since it trains: every row of every seed, the document, and a second run that judges nothing again."""
    (tmp_path / "shapes.md").write_text(DOCUMENT)
    done = table(tmp_path, "--seeds", "0", "1", "--trainings", "2")
    assert done.returncode == 0, done.stderr
    runs = sorted((tmp_path / "runs").glob("seed-*/run-*/run.json"))
    seeds = [json.loads(run.read_text())["seed"] for run in runs]
    students = [tmp_path / f"runs/seed-{seed}/student/training_args.json" for seed in (0, 1)]
    trained = [json.loads(file.read_text())["training_args"]["seed"] for file in students]
    assert seeds == [0, 1, 2, 3] and trained == [[0, 1], [2, 3]]
    rows, text = json.loads((tmp_path / "shapes.json").read_text()), (tmp_path / "shapes.md").read_text()

    few = {(name, n) for name in ("teacher", "undistilled", "student") for n in (1, 2, 4)}
    for seed in (0, 1):
        cases = [(r["pipeline"], r.get("num_steps")) for r in rows if r["seed"] == seed]
        assert set(cases) == few | {("renders", None), ("teacher", 28)}
        assert cases.count(("teacher", 28)) == 2  # the recipe's guidance and the one beside it
    assert all(r["accuracy"] >= 0.95 for r in rows if r["pipeline"] == "renders")
    fids = [r["fid"] for r in rows if (r["pipeline"], r.get("num_steps")) == ("student", 4)]
    assert fids[0] != fids[1]

    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    (line,) = [line for line in text.splitlines() if re.match(r"\| student +\| +4 ", line)]
    assert f"{statistics.mean(fids):.1f} ± {statistics.stdev(fids):.1f}" in line

    report = tmp_path / "runs/seed-0/report.json"
    written = report.stat().st_mtime_ns
    done = table(tmp_path, "--seeds", "0", "--trainings", "2")
    assert done.returncode == 0 and "judging" not in done.stdout and report.stat().st_mtime_ns == written


@pytest.mark.parametrize("name", ["shapes", "shapes_flux"])
def test_the_documents_table_is_that_of_the_results(name):
    rows = json.loads((ROOT / f"docs/results/{name}.json").read_text())
    assert summarize(rows) in (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")


def test_a_document_without_a_place_is_refused_first(tmp_path):
    (tmp_path / "shapes.md").write_text("no marks")
    done = table(tmp_path)
    assert done.returncode == 2 and "has no place for the table" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
