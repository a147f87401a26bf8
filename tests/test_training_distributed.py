# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
import pytest
import torch

from hf_flowdistill.flow.draws import draw_k, global_indices, sample_noise, stream_seed


def noise(indices, **changes):
    key = {"seed": 0, "step": 3, "purpose": "generator noise", **changes}
    return sample_noise((2, 4, 4), indices=indices, **key)


def test_noise_belongs_to_the_sample():
    whole = noise(range(8))
    assert whole.shape == (8, 2, 4, 4) and whole.dtype == torch.float32
    assert torch.equal(whole[[5, 2]], noise([5, 2]))
    assert len({sample.sum().item() for sample in whole}) == 8


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 4}, {"purpose": "generator sigma"}])
def test_noise_depends_on_every_part_of_its_key(change):
    assert not torch.isclose(noise(range(4)), noise(range(4), **change)).any()


def test_noise_is_standard_normal_and_leaves_the_global_state_alone():
    state = torch.random.get_rng_state()
    values = torch.cat([noise(range(64), step=step).flatten() for step in range(100)])
    assert abs(values.mean()) < 0.005 and abs(values.std() - 1) < 0.005
    samples = noise(range(1000)).flatten(1)
    correlations = (samples[1:] * samples[:-1]).mean()
    assert abs(correlations) < 0.02
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("world_size", "accumulation", "batch"), [(1, 1, 8), (2, 1, 4), (1, 4, 2), (2, 2, 2), (4, 2, 1)]
)
def test_a_global_batch_is_divided_without_gaps(world_size, accumulation, batch):
    indices = [
        index
        for micro_batch in range(accumulation)
        for rank in range(world_size)
        for index in global_indices(micro_batch, batch, rank=rank, world_size=world_size)
    ]
    assert indices == list(range(8))


def test_k_is_uniform_and_needs_no_state():
    drawn = [draw_k(0, step, 4) for step in range(4000)]
    assert drawn[:5] == [draw_k(0, step, 4) for step in range(5)]
    counts = torch.bincount(torch.tensor(drawn))
    assert counts[0] == 0 and len(counts) == 5 and all(abs(counts[1:] - 1000) < 120)
    assert drawn != [draw_k(1, step, 4) for step in range(4000)]
    assert {draw_k(0, step, 1) for step in range(50)} == {1}


def test_k_in_turn_takes_its_share_of_the_training():
    shares = [0.4, 0.3, 0.0, 0.3]
    drawn = [draw_k(0, step, 4, shares=shares, progress=step / 1000) for step in range(1000)]
    assert drawn == sorted(drawn) and [drawn.count(k) for k in (1, 2, 3, 4)] == [400, 300, 0, 300]
    assert {draw_k(0, step, 1, shares=[1.0], progress=step / 10) for step in range(10)} == {1}


def test_what_no_step_has_a_share_of_comes_first_and_draws_k():
    drawn = [draw_k(0, step, 4, shares=[0.0, 0.0, 0.1, 0.2], progress=step / 1000) for step in range(1000)]
    assert drawn[:700] == [draw_k(0, step, 4) for step in range(700)]
    assert drawn[700:] == [3] * 100 + [4] * 200


def test_seeds_do_not_mix_up_their_parts():
    assert stream_seed(1, 23) != stream_seed(12, 3)
    assert stream_seed(1, "2") != stream_seed(1, 2)
    assert all(0 <= stream_seed(i) < 2**63 for i in range(100))
