# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Text-image pairs without images: `ImagePairs` for the training script, with random latents, in parts of 8 pairs."""

from pathlib import Path

import torch


PART = 8


class StandInPairs:
    identity = {"files": "none"}

    def __init__(self, folder, latent_shape):
        self.root, self.latent_shape, self.captions, self.state = Path(folder), latent_shape, [], {"first": -1}

    @property
    def folder(self):
        return self.root / f"part-{self.state['first']}"

    def is_over(self, position):
        return self.state["first"] != position // PART * PART

    def move_to(self, position):
        self.state = {"first": position // PART * PART}
        self.captions = [f"{self.state['first'] + row // 2} squares" for row in range(PART)]  # each twice

    def rows(self, positions):
        return torch.tensor([3 * position % PART for position in positions])

    def latents(self, rows):
        seeds = [self.state["first"] + int(row) for row in rows]
        drawn = [torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn)


def open_images(args):
    """No dataset."""


def open_pairs(args, accelerator, teacher, dataset, state):
    return StandInPairs(Path(args.output_dir, "images"), teacher.contracts[0].latent_shape)
