# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
import argparse
import json
import math

import pytest
import torch

from hf_flowdistill.training.monitors import MetricsFile, average_metrics, latent_statistics, tracker_config


def test_averages_pool_the_spread():
    parts = torch.randn(4, 50, dtype=torch.float64) * torch.arange(1, 5)[:, None] + torch.arange(4)[:, None]
    means = average_metrics([{"x_mean": p.mean(), "x_std": p.std(correction=0), "loss": p.max()} for p in parts])
    assert means["x_mean"] == pytest.approx(parts.mean().item(), rel=1e-5)
    assert means["x_std"] == pytest.approx(parts.std(correction=0).item(), rel=1e-5)
    assert means["loss"] == pytest.approx(parts.amax(1).mean().item())


def test_averages_show_what_is_not_finite():
    means = average_metrics(
        [{"x_mean": torch.tensor(math.nan), "x_std": torch.tensor(1.0), "loss": torch.tensor(1.0)}]
    )
    assert math.isnan(means["x_mean"]) and math.isnan(means["x_std"]) and means["loss"] == 1


def test_latent_statistics_of_a_gaussian():
    """Data N(m, s^2) have a velocity in closed form; the sampler's mean and spread must be theirs."""
    mean, std = 0.7, 0.5

    def velocity(x_t, sigma, conditional, unconditional):
        assert len(conditional) == len(x_t) and not torch.is_grad_enabled()
        sigma = sigma[:, None]
        variance = (1 - sigma) ** 2 * std**2 + sigma**2
        residual = x_t - (1 - sigma) * mean
        x0 = mean + (1 - sigma) * std**2 / variance * residual
        return sigma / variance * residual - x0

    noise = torch.randn(1000, 20, generator=torch.Generator().manual_seed(0))
    measured = latent_statistics(velocity, noise, torch.zeros(1000, 1), None, batch_size=300, num_steps=200)
    assert measured["teacher_latent_mean"] == pytest.approx(mean, abs=0.02)
    assert measured["teacher_latent_std"] == pytest.approx(std, abs=0.02)


def test_metrics_file_is_cut_where_a_run_goes_on(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    first = MetricsFile(path)
    for seen in (4, 8, 12):
        first.write({"images_seen": seen, "loss": math.nan if seen == 8 else 0.5})
    with path.open("a") as file:
        file.write('{"images_seen": 16, "lo')
    MetricsFile(path, images_seen=8).write({"images_seen": 12, "loss": 1.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"images_seen": 4, "loss": 0.5},
        {"images_seen": 8, "loss": None},
        {"images_seen": 12, "loss": 1.0},
    ]


def test_trackers_get_no_token_and_nothing_they_cannot_take():
    args = argparse.Namespace(alpha=1.0, hub_token="hf_secret", validation_prompts=["a"], revision=None, flag=True)
    assert tracker_config(args) == {"alpha": 1.0, "validation_prompts": "['a']", "revision": "None", "flag": True}
