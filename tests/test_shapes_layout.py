# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Which call goes wrong: what is known of renders, of the teacher itself and of its undistilled network."""

import json

import layout
from training_helpers import ROOT, run_command

from arguments import CALL
from hf_flowdistill.flow.rollout import Sampler
from hf_flowdistill.hub.export import export_student
from hf_flowdistill.networks.loading import load_pipeline


SCRIPT = ROOT / "examples/shapes/studies/layout.py"


def test_what_the_undistilled_network_gets_wrong(tmp_path):
    teacher = load_pipeline(ROOT / "examples/shapes/teacher")
    student = export_student(teacher, tmp_path / "student", Sampler(2), pipeline_kwargs=CALL)
    run_command(SCRIPT, "--student", student, "--num_prompts", 40, "--output_file", tmp_path / "rows.json")

    right = {(row["calls"], row["sigma"]): row["accuracy"] for row in json.loads((tmp_path / "rows.json").read_text())}
    assert right.keys() == {(0, 0.5), (1, 1.0), (1, 0.5), (2, 0.5), (2, 0.0)}
    assert right[0, 0.5] > 0.9  # pictures that are right, and half of them is still there
    assert right[1, 1.0] > 0.8  # nothing is left of the call: the teacher from pure noise
    assert right[1, 0.5] < 0.6  # one call decides nothing, and too little is left to decide it
    assert right[2, 0.0] < 0.2  # what the student shows


def test_a_folder_without_a_student_is_refused(tmp_path):
    refused = run_command(SCRIPT, "--student", tmp_path, check=False)
    assert refused.returncode == 2 and "holds no student" in refused.stderr and "Traceback" not in refused.stderr


def test_the_document_shows_the_figures():
    rows = json.loads((ROOT / "docs/results/shapes_layout.json").read_text())
    assert layout.format_rows(rows) in (ROOT / "docs/shapes_search.md").read_text(encoding="utf-8")
