# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Which prompt each training sample uses."""

import functools

import torch

from hf_flowdistill.flow.draws import permutation


class PromptStream:
    """A fresh seeded permutation of the prompts for every pass over them.

    The prompt of a sample depends only on the number of images before it, so there is no state to save: resuming is
    going on at the same position.

    Attributes:
        distinct: every prompt once, in order of first appearance.
        count: how many prompts there are in one pass, repetitions included.
        row_of: the row in `distinct` of each prompt, [count].
    """

    def __init__(self, prompts: list[str], seed: int):
        self.distinct = list(dict.fromkeys(prompts))
        self.count = len(prompts)
        self.seed = seed
        row_of = {prompt: row for row, prompt in enumerate(self.distinct)}
        self.row_of = torch.tensor([row_of[prompt] for prompt in prompts])
        self._pass = functools.lru_cache(maxsize=4)(self._draw_pass)

    def rows(self, purpose: str, positions) -> torch.Tensor:
        """Rows in `distinct` of the samples at `positions`, [len(positions)]; each `purpose` has its own order."""
        picked = [self._pass(purpose, position // self.count)[position % self.count] for position in positions]
        return torch.stack(picked)

    def _draw_pass(self, purpose: str, number: int) -> torch.Tensor:
        return self.row_of[permutation(self.count, self.seed, purpose, number)]
