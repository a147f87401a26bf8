# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What an update costs, counted: no pass is run twice, and one rollout may serve both turns."""

import runpy

import pytest
from training_helpers import ROOT


LIMITS = {"none": 19, "generator, fake score": 24, "all three": 26}  # forward passes for each training image


def test_work_with_a_shared_rollout_is_within_its_limits():
    """A rollout for each turn takes 2.5 forward passes more, one for each of k = 1..4 on average."""
    count_work = runpy.run_path(str(ROOT / "benchmarks" / "work.py"))["count_work"]
    rows = count_work("sd3", {"num_layers": 12})
    found = {row["checkpointed"]: row["forwards"] for row in rows if row["share_rollout"]}
    apart = {row["checkpointed"]: row["forwards"] for row in rows if not row["share_rollout"]}
    assert found.keys() == LIMITS.keys()
    assert all(found[name] <= LIMITS[name] for name in LIMITS), found
    assert all(apart[name] - found[name] == pytest.approx(2.5, abs=0.01) for name in LIMITS), (apart, found)
