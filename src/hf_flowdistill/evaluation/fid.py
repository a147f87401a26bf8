# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Frechet distance between two sets of pictures, in the feature space of any network."""

import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from hf_flowdistill.errors import UserError
from hf_flowdistill.teachers.finite import is_finite


class FID:
    """Frechet distance (arXiv 1706.08500) to one set of real pictures.

    Args:
        features: a module, pictures [N, 3, H, W] in [0, 1] -> features [N, D], with the attribute `num_features` = D.
        real: the real pictures, [N, 3, H, W]; their statistics are computed once.
    """

    def __init__(self, features: torch.nn.Module, real: torch.Tensor, batch_size: int = 250):
        self.batch_size = batch_size
        self.metric = FrechetInceptionDistance(
            features, reset_real_features=False, normalize=True, input_img_size=tuple(real.shape[1:])
        )
        self._update(real, real_pictures=True)

    def _update(self, pictures, real_pictures):
        if not is_finite(pictures):
            raise UserError("pictures to be scored are not finite: draw them in a longer dtype.")
        for part in pictures.split(self.batch_size):
            self.metric.update(part, real=real_pictures)

    def __call__(self, pictures: torch.Tensor) -> float:
        """The distance of `pictures` [N, 3, H, W], N >= 2, from the real ones; 0 for the same statistics."""
        self.metric.reset()
        self._update(pictures, real_pictures=False)
        return float(self.metric.compute())
