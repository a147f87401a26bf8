# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Optimizers, learning rates that count images, and one guarded update."""

import math

import torch

from hf_flowdistill.training.distributed import all_ranks_agree, average_gradients, whole


LR_SCHEDULES = ("constant", "cosine", "linear")


def build_optimizer(network, *, betas=(0.0, 0.999), epsilon: float = 1e-8):
    """Adam as in SiD-DiT, Tables 3 and 4: beta1 0, beta2 0.999, no weight decay."""
    return torch.optim.Adam(network.parameters(), betas=betas, eps=epsilon)


def learning_rate_factor(schedule: str, images_seen: int, *, batch_size: int, warmup: int, end: int) -> float:
    """What the learning rate of an update with `batch_size` images is multiplied by, in [0, 1], after `images_seen`.

    It rises linearly over `warmup` images, this update's included, so that no update is wasted on a rate of 0; then
    `constant` stays, `linear` and `cosine` fall to 0 at `end`. It depends on nothing else, so there is no scheduler
    state to save.
    """
    if images_seen < warmup:
        return min(1.0, (images_seen + batch_size) / warmup)
    progress = min(1.0, (images_seen - warmup) / max(1, end - warmup))
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[schedule]


def apply_update(optimizer, *, loss: float, learning_rate: float, max_grad_norm: float | None = None):
    """Average the gradients over processes, step if everything is finite, and clear the gradients.

    The processes decide together, before anyone steps: a non-finite loss or gradient on one of them skips the update
    on all. `loss` is the value that was differentiated. Returns (whether the step was taken, total gradient norm).
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    average_gradients(parameters)
    total_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    norm = whole(total_norm)
    finite = all_ranks_agree(math.isfinite(loss) and bool(norm.isfinite()), norm.device)
    if finite:
        if max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, total_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return finite, norm.item()
