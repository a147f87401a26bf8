# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Every key has random numbers of its own, and they are what they should be."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from tiny_pipelines import stable_diffusion_3

from hf_flowdistill.data.stream import PromptStream
from hf_flowdistill.flow.draws import draw_k, half_words, k_in_turn, normal, permutation, sample_noise, stream
from hf_flowdistill.networks.roles import RoleSettings
from hf_flowdistill.training.optimizers import round_stochastically


# Samples whose 63-bit seeds have equal low halves, which is all that torch takes on the CPU: of 400,000, 19 pairs.
COLLIDING = [(50505, 116453), (124344, 191741), (124148, 220016), (158756, 220224), (40307, 222046), (25194, 225440)]


@pytest.mark.parametrize("pair", COLLIDING)
def test_two_samples_never_have_the_same_noise(pair):
    first, second = sample_noise((4, 4), seed=0, step=0, purpose="generator step 0", indices=pair)
    assert not torch.isclose(first, second).any()


def test_a_stream_has_all_of_its_128_bits():
    keys = [stream(0, 0, "a", index).bit_generator.state["state"]["key"] for index in range(2000)]
    ones = np.unpackbits(np.stack(keys).view(np.uint8), axis=1).mean(0)
    assert ones.shape == (128,) and (abs(ones - 0.5) < 0.06).all()
    assert len({key.tobytes() for key in keys}) == 2000


def test_noise_has_the_moments_of_a_normal_distribution():
    """A million numbers: mean, variance, skewness, kurtosis, tails, and no relation between neighbours or halves."""
    drawn = torch.cat([normal((16, 128, 128), 0, "moments", index).flatten() for index in range(4)]).double()
    count = len(drawn)
    assert drawn.isfinite().all()
    for power, expected in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        spread = math.sqrt((math.prod(range(1, 2 * power, 2)) - expected**2) / count)
        assert abs((drawn**power).mean() - expected) < 4 * spread, power
    for size in (1, 2, 3, 4):
        share = math.erfc(size / math.sqrt(2))
        assert abs((drawn.abs() > size).double().mean() - share) < 4 * math.sqrt(share / count), size
    for distance in (1, 2, 128, 131072):  # the last is between the two numbers of a pair
        assert abs((drawn[distance:] * drawn[:-distance]).mean()) < 4 / math.sqrt(count), distance


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 4, 4)])
def test_noise_of_every_shape_is_float32_and_repeats(shape):
    first, second = (normal(shape, 1, "a", 2) for _ in range(2))
    assert first.shape == shape and first.dtype == torch.float32 and torch.equal(first, second)


def test_prompts_have_an_order_of_every_pass_and_purpose():
    order = permutation(1000, 0, "a", 0)
    assert order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(1000))
    assert abs((order == torch.arange(1000)).sum()) < 8
    prompts = PromptStream([str(number) for number in range(50)], seed=0)
    passes = [tuple(prompts.rows(purpose, range(50 * n, 50 * n + 50)).tolist()) for purpose in "ab" for n in range(40)]
    assert len(set(passes)) == 80 and {tuple(sorted(one)) for one in passes} == {tuple(range(50))}


def test_rounding_takes_all_of_its_key():
    """These two had the same numbers, as the low halves of their seeds are equal."""
    keys = [("rounding", 0, 55443), ("rounding", 0, 68337)]
    rounded = [torch.zeros(1000, dtype=torch.bfloat16) for _ in keys]
    for parameter, key in zip(rounded, keys):
        round_stochastically(torch.full((1000,), 1.001), parameter, *key[1:])
    assert not torch.equal(*rounded)
    words = half_words((1000, 1000), "cpu", "uniform")
    assert words.dtype == torch.int32 and 0 <= words.min() and words.max() < 2**16
    assert abs(words.double().mean() - 32767.5) < 4 * 2**16 / math.sqrt(12e6)


def test_an_adapter_shares_its_numbers_with_no_other_seed_or_adapter():
    """The second adapter of seed 0 was the first of seed 1, and seeds were alike from 2^32 on."""
    drawn = {}
    for seed in (0, 1, 2**32):
        shared = RoleSettings("lora", rank=4).share(stable_diffusion_3().transformer, seed=seed)
        for name in ("generator", "fake_score"):
            drawn[seed, name] = torch.cat(
                [tensor.flatten() for key, tensor in shared.add(name).state_dict().items() if "lora_A" in key]
            )
    values = list(drawn.values())
    for number, one in enumerate(values):
        assert abs(one.std() - 1 / 4) < 0.02 and abs(one.mean()) < 0.02
        assert not any(torch.isclose(one, other).all() for other in values[:number])
        assert all(abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.1 for other in values[:number])


def test_a_sampler_step_without_a_share_has_no_turn():
    """Its very beginning, which is not exact in floating point: 39,360 of 48,000 images are 1 - .18."""
    assert draw_k(0, 0, 4, shares=[0, 0, 0, 0.18], progress=39_360 / 48_000) == 4
    length = 48_000
    for hundredths in range(1, 100):
        for k in (1, 2, 3, 4):
            shares = [hundredths / 100 if k == other else 0 for other in (1, 2, 3, 4)]
            begin = 1 - Fraction(hundredths, 100)
            for images in range(0, length, 480):
                found = k_in_turn(shares, images / length)
                assert found == (k if Fraction(images, length) >= begin else None), (shares, images)


def test_sampler_steps_take_turns_at_the_exact_images():
    length = 1000
    for first in range(0, 100, 7):
        for second in range(0, 100 - first, 9):
            for last in (0, 1, 100 - first - second):
                hundredths = [first, 0, second, last if first + second + last <= 100 else 0]
                turns = [k_in_turn([h / 100 for h in hundredths], images / length) for images in range(length)]
                expected = [k for k, share in enumerate(hundredths, start=1) for _ in range(10 * share)]
                assert turns[length - len(expected) :] == expected, hundredths
                assert set(turns[: length - len(expected)]) <= {None}
