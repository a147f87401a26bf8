# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Prompt files, and which prompt each training sample uses."""

import functools
from pathlib import Path

import torch

from hf_flowdistill.errors import UserError
from hf_flowdistill.training.distributed import stream_seed


def read_prompts(path) -> list[str]:
    """The non-blank lines of a UTF-8 text file, stripped, in file order (repeated lines count repeatedly).

    Raises:
        UserError: if the file is missing, unreadable as text, or holds no prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the prompt file {path} does not exist: give a text file with one prompt per line.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"the prompt file {path} is not UTF-8 text: save it as such, one prompt per line.") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"the prompt file {path} holds no prompt: write one prompt per line.")
    return prompts


class PromptStream:
    """A fresh seeded permutation of the prompts for every pass over them.

    The prompt of a sample depends only on the number of images before it, so there is no state to save: resuming is
    going on at the same position.

    Attributes:
        distinct: every prompt once, in order of first appearance.
        count: how many prompts there are in one pass, repetitions included.
    """

    def __init__(self, prompts: list[str], seed: int):
        self.distinct = list(dict.fromkeys(prompts))
        self.count = len(prompts)
        self.seed = seed
        row_of = {prompt: row for row, prompt in enumerate(self.distinct)}
        self._rows = torch.tensor([row_of[prompt] for prompt in prompts])
        self._pass = functools.lru_cache(maxsize=4)(self._draw_pass)

    def rows(self, purpose: str, positions) -> torch.Tensor:
        """Rows in `distinct` of the samples at `positions`, [len(positions)]; each `purpose` has its own order."""
        picked = [self._pass(purpose, position // self.count)[position % self.count] for position in positions]
        return torch.stack(picked)

    def _draw_pass(self, purpose: str, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(stream_seed(self.seed, purpose, number))
        return self._rows[torch.randperm(self.count, generator=generator)]
