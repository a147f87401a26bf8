# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a command line says of noise levels, and whether it can be meant. No torch, which takes seconds to import."""

import math
from collections.abc import Sequence
from itertools import pairwise


NOISE_TYPES = ("fresh", "fixed", "ddim")
SOLVERS = ("euler", "heun")

# p(sigma) of SiD-DiT: the schedule SANA-Sprint's teacher was fine-tuned with (Sec. 4.1).
SIGMA_MEAN = math.log(2)
SIGMA_STD = 1.6


def falls_from_one(levels: Sequence[float]) -> bool:
    """Whether these can be a sampler's noise levels: the first is 1, and they decrease strictly without reaching 0."""
    return levels[:1] == [1] and all(before > after for before, after in pairwise([*levels, 0]))
