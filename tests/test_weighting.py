# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
import pytest
import torch

from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.weighting import WEIGHTINGS, get_weighting


EXPECTED = {
    "1-sigma": [0.75, 0.5],
    "(1-sigma)^2": [0.5625, 0.25],
    "1/sigma": [4.0, 2.0],
    "1/sigma^2": [16.0, 4.0],
    "(1-sigma)/sigma": [3.0, 1.0],
    "((1-sigma)/sigma)^2": [9.0, 1.0],
    "1/mean|x0-x0_teacher|": [1 / 1.5, 1 / 0.25],
}


def arguments(dtype=torch.float64):
    sigma = torch.tensor([0.25, 0.5], dtype=dtype)
    x0 = torch.zeros(2, 2, 1, 2, dtype=dtype)
    x0_teacher = torch.tensor([[1.0, -2.0, 1.0, -2.0], [0.25, 0.25, -0.25, 0.25]], dtype=dtype).view(2, 2, 1, 2)
    return sigma, x0, x0_teacher


def test_the_seven_weights():
    assert WEIGHTINGS.keys() == EXPECTED.keys()
    for name, expected in EXPECTED.items():
        weight = get_weighting(name)(*arguments())
        torch.testing.assert_close(weight, torch.tensor(expected, dtype=torch.float64))


def test_boundaries_are_as_documented():
    sigma = torch.tensor([0.0, 1.0])
    x = torch.ones(2, 3)
    for name in EXPECTED:
        weight = get_weighting(name)(sigma, x, x)
        if name.startswith("1/mean"):
            assert weight.isfinite().all() and torch.equal(weight[0], weight[1])
        elif "/sigma" in name:
            assert weight[0] == float("inf") and weight[1] == (0 if "(" in name else 1)
        else:
            assert weight.tolist() == [1, 0]


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="unknown weighting 'cosine'") as caught:
        get_weighting("cosine")
    assert all(name in str(caught.value) for name in WEIGHTINGS)
