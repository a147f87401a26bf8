# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""At which noise wrong pictures are told from right ones: known gaps, a training of one update, the document."""

import json

import gaps
import pytest
import torch
from training_helpers import ROOT, run_command


SCRIPT = ROOT / "examples/shapes/studies/gaps.py"


def test_the_gap_is_the_norm_over_each_picture_and_the_mean_of_its_kind():
    latents, right = torch.zeros(250, 2, 3), torch.arange(250) % 2 == 0  # more than two batches
    factors = torch.where(right, 1.0, 3.0)

    def predict_gap(x_t, sigma, places):
        assert torch.equal(x_t, sigma[:, None, None] * torch.ones_like(x_t))  # latents are 0, the noise is 1
        return factors[places][:, None, None] * x_t

    rows = gaps.measure(predict_gap, latents, right, lambda: torch.ones(250, 2, 3))
    assert [row["sigma"] for row in rows] == list(gaps.SIGMAS)
    for row in rows:
        assert row["gap_right"] == pytest.approx(row["sigma"] * 6**0.5)
        assert row["gap_wrong"] == pytest.approx(3 * row["sigma"] * 6**0.5)


def test_of_a_training_of_one_update(tmp_path):
    """The fake score is nearly the unguided teacher, so the gap is what guidance adds."""
    run_command(
        ROOT / "examples/score_distillation/train_sid_dit.py",
        *("--config", ROOT / "examples/shapes/recipe.yaml", "--output_dir", tmp_path / "run", "--report_to", "none"),
        *("--pretrained_model_name_or_path", ROOT / "examples/shapes/teacher", "--max_train_images", 8),
        *("--prompt_file", ROOT / "examples/shapes/prompts.txt", "--train_batch_size", 8),
    )
    words = ["--run", tmp_path / "run", "--num_prompts", 20, "--output_file", tmp_path / "rows.json"]
    done = run_command(SCRIPT, *words)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert gaps.format_rows(rows) in done.stdout
    by_sigma = {row["sigma"]: row["gap_right"] for row in rows}
    assert by_sigma[0.9] > 2 * by_sigma[0.3] > 0  # guidance acts where the layout is still open


def test_a_folder_without_a_training_is_refused(tmp_path):
    refused = run_command(SCRIPT, "--run", tmp_path, check=False)
    assert refused.returncode == 2 and "holds no finished training" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_document_shows_the_figures():
    rows = json.loads((ROOT / "docs/results/shapes_gaps.json").read_text())
    assert gaps.format_rows(rows) in (ROOT / "docs/shapes_search.md").read_text(encoding="utf-8")
