# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
import argparse
import json
import math
import re

import pytest
import torch

from hf_flowdistill.methods.reference import measure_teacher
from hf_flowdistill.training.monitors import (
    MetricsFile,
    add_hardware,
    average_metrics,
    drift,
    progress,
    training_facts,
    watch,
)


def test_averages_pool_the_spread():
    parts = torch.randn(4, 50, dtype=torch.float64) * torch.arange(1, 5)[:, None] + torch.arange(4)[:, None]
    means = average_metrics([{"x_mean": p.mean(), "x_std": p.std(correction=0), "loss": p.max()} for p in parts])
    assert means["x_mean"] == pytest.approx(parts.mean().item(), rel=1e-5)
    assert means["x_std"] == pytest.approx(parts.std(correction=0).item(), rel=1e-5)
    assert means["loss"] == pytest.approx(parts.amax(1).mean().item())


def test_progress_shows_what_there_is():
    pieces = ("gap {gap:.2f}", "told {real:.0%}/{fake:.0%}", "lag {lag}")
    assert progress({"gap": 0.5, "real": 0.25, "lag": 2, "k": 3}, pieces, 40) == "k=3 gap 0.50 lag 2"
    assert progress({"fake": 1.0, "real": 0.25}, pieces, 40) == "told 25%/100%"
    everything = {"gap": 0.5, "real": 0.25, "fake": 1.0, "lag": 2, "k": 3}
    assert progress(everything, pieces, 40) == "k=3 gap 0.50 told 25%/100% lag 2"
    assert progress(everything, pieces, 20) == "k=3 gap 0.50 lag 2"  # as far as there is room
    assert progress(everything, pieces, 2) == "k=3"


def test_averages_show_what_is_not_finite():
    means = average_metrics(
        [{"x_mean": torch.tensor(math.nan), "x_std": torch.tensor(1.0), "loss": torch.tensor(1.0)}]
    )
    assert math.isnan(means["x_mean"]) and math.isnan(means["x_std"]) and means["loss"] == 1


def test_the_teacher_of_a_gaussian():
    """Data N(m, s^2) have a velocity in closed form; the sampler's mean and spread, and the error, must be theirs."""
    mean, std, level = 0.7, 0.5, 0.6

    def velocity(x_t, sigma, conditional, unconditional):
        assert len(conditional) == len(x_t) <= 300 and not torch.is_grad_enabled()
        sigma = sigma[:, None]
        variance = (1 - sigma) ** 2 * std**2 + sigma**2
        residual = x_t - (1 - sigma) * mean
        x0 = mean + (1 - sigma) * std**2 / variance * residual
        return sigma / variance * residual - x0

    generator = torch.Generator().manual_seed(0)
    noise, *noises = (torch.randn(1000, 20, generator=generator) for _ in range(4))
    sigmas, words = [torch.full((1000,), level)] * 3, torch.zeros(1000, 1)
    measured = measure_teacher(velocity, velocity, noise, sigmas, noises, words, None, batch_size=300, num_steps=200)
    assert measured["teacher_latent_mean"] == pytest.approx(mean, abs=0.02)
    assert measured["teacher_latent_std"] == pytest.approx(std, abs=0.02)
    assert measured["teacher_latent_peak"] == pytest.approx(1.63, abs=0.03)  # E max |N(.7, .5)| of 20, by simulation
    assert measured["teacher_error"] == pytest.approx(std**2 / ((1 - level) ** 2 * std**2 + level**2), rel=0.02)


TEACHER = {"teacher_latent_mean": 0.1, "teacher_latent_std": 0.5, "teacher_latent_peak": 2.0, "teacher_error": 0.2}


def test_drift_is_in_units_of_the_teacher():
    generator = {"x0_mean": 0.2, "x0_std": 0.75, "x0_peak": 1.0, "fake_score_error": 0.5}
    assert drift(TEACHER | generator) == pytest.approx(
        {"latent_shift": 0.2, "latent_spread": 1.5, "latent_peak": 0.5, "fake_score_lag": 2.5}
    )


def test_a_discriminator_that_wins_is_told_once_its_term_is_in_the_loss():
    generator = {"x0_mean": 0.1, "x0_std": 0.5, "x0_peak": 2.0, "fake_score_error": 0.2}
    record = TEACHER | generator | {"real_accuracy": 0.97, "fake_accuracy": 0.95, "k": 4}
    averages, told = {}, []
    for update in range(60):
        record |= {"images_seen": update} | ({"adversarial_loss": 1.0} if update >= 30 else {})
        told += watch(record | drift(record), averages, num_steps=4)
    assert len(told) == 1 and told[0].startswith("54 images: told_apart of sampler step 4 is 0.95")
    assert drift(record | {"fake_accuracy": 0.4})["told_apart"] == 0.4


def test_a_monitor_that_leaves_its_range_is_told_once():
    """The overshoot comes after 30 updates, goes after 30 more, and comes again."""
    averages, told = {}, []
    for update in range(130):
        high = 30 <= update < 60 or update >= 100
        for k in (1, 2):
            values = {
                "latent_shift": 0.0,
                "latent_spread": 2.0 if high and k == 2 else 1.0 if k == 2 else 0.1,
                "fake_score_lag": 1.0,
            }
            record = {"k": k, "images_seen": update, "latent_peak": math.nan if update % 7 else 1.0, **values}
            told += [(update, sentence) for sentence in watch(record, averages, num_steps=2)]
    assert [update for update, _ in told] == [42, 108]
    assert all("latent_spread of sampler step 2 is 1.4" in sentence for _, sentence in told)
    assert all("--learning_rate" in sentence for _, sentence in told)
    json.dumps(averages)  # it travels in a checkpoint's state.json


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


def test_hardware_is_all_that_a_run_was_on():
    eight, one = (argparse.Namespace(num_processes=n, device=torch.device("cpu")) for n in (8, 1))
    state = {}
    for launch in (eight, eight, one, eight):
        state["hardware"] = add_hardware(state, launch)
    assert re.fullmatch(r"8 x CPU \(\d+ threads\), then 1 x CPU \(\d+ threads\)", state["hardware"])


def test_what_a_run_cost_up_to_a_checkpoint(tmp_path):
    state = {"images_seen": 8, "settings": {"images_per_update": 4}, "hardware": "2 x H100"}
    assert training_facts(tmp_path, state) == {"images_seen": 8, "hardware": "2 x H100"}
    records = [{"images_seen": seen, "images_per_second": 4 / 1800} for seen in (4, 8, 12)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    facts = training_facts(tmp_path, state)
    assert facts["training_hours"] == pytest.approx(1.0) and "device_hours" not in facts  # as on how many devices?
    for record, processes in zip(records, (8, 1, 1)):
        record["processes"] = processes
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    facts = training_facts(tmp_path, state)
    assert (facts["training_hours"], facts["device_hours"]) == pytest.approx((1.0, 0.5 * 8 + 0.5 * 1))
    # a half line of a killed run, or lines that are missing, are no measurement
    assert "training_hours" not in training_facts(tmp_path, {**state, "images_seen": 16})
