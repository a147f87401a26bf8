# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Weights w(sigma, x0, x0_teacher) of the generator loss.

The first six are rows of SiD-DiT Figure 2 or their squares and depend on sigma alone; the last is the weight of the
original SiD. All return [B].

At the ends of [0, 1]: the weights with 1 - sigma in the numerator vanish at sigma = 1, and those with sigma in the
denominator are inf at sigma = 0. That is left as it is: p(sigma) = sigmoid(N(ln 2, 1.6^2)) does not reach the ends in
float32, while a floor would change the objective for every sigma below it. Keep sigma in float32: bfloat16 rounds all
sigmas above 0.998 to 1. The error weight can meet a zero denominator at any sigma, so that one is floored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hf_flowdistill.errors import UserError


if TYPE_CHECKING:  # a command line chooses among the names, and torch takes seconds to import
    from torch import Tensor


# Below this mean absolute error a sample counts as exact. Latents have unit scale, so it changes no ordinary sample.
ERROR_FLOOR = 1e-5


def _inverse_error(sigma: Tensor, x0: Tensor, x0_teacher: Tensor) -> Tensor:
    return 1 / (x0 - x0_teacher).abs().flatten(1).mean(1).clamp(min=ERROR_FLOOR)


WEIGHTINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "1-sigma": lambda sigma, x0, x0_teacher: 1 - sigma,
    "(1-sigma)^2": lambda sigma, x0, x0_teacher: (1 - sigma) ** 2,
    "1/sigma": lambda sigma, x0, x0_teacher: 1 / sigma,
    "1/sigma^2": lambda sigma, x0, x0_teacher: 1 / sigma**2,
    "(1-sigma)/sigma": lambda sigma, x0, x0_teacher: (1 - sigma) / sigma,
    "((1-sigma)/sigma)^2": lambda sigma, x0, x0_teacher: ((1 - sigma) / sigma) ** 2,
    "1/mean|x0-x0_teacher|": _inverse_error,
}


def get_weighting(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The weight function of that name: (sigma [B], x0 [B, ...], x0_teacher [B, ...]) -> weight [B].

    The functions do not detach; the loss does.

    Raises:
        UserError: no weight has that name.
    """
    if name not in WEIGHTINGS:
        raise UserError(f"unknown weighting '{name}': choose one of {', '.join(repr(known) for known in WEIGHTINGS)}")
    return WEIGHTINGS[name]
