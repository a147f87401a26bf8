# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Every random number of a training, each from a key of its own.

Nothing here keeps a random state. Every draw is keyed by (seed, step, purpose, global sample index), so a resumed run,
a run on another number of processes and a run with other accumulation draw the same numbers for the same samples.
"""

import bisect
import hashlib
import itertools

import torch


def stream_seed(*key) -> int:
    """A 63-bit seed that changes with every part of `key` (integers and strings)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def global_indices(micro_batch: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> range:
    """Which samples of the step's global batch this process handles in this micro-batch."""
    start = (micro_batch * world_size + rank) * batch_size
    return range(start, start + batch_size)


def sample_noise(shape, *, seed: int, step: int, purpose: str, indices, device="cpu"):
    """Standard normal noise of shape [len(indices), *shape], one independent stream per sample.

    `shape` is the shape of one sample. The numbers are float32 and drawn on the CPU, so they do not depend on the
    device, or on how the global batch is divided among processes and micro-batches.
    """
    generator = torch.Generator()
    samples = [
        torch.randn(shape, generator=generator.manual_seed(stream_seed(seed, step, purpose, index)))
        for index in indices
    ]
    return torch.stack(samples).to(device)


def draw_k(seed: int, step: int, num_steps: int, *, shares=None, progress: float = 0.0) -> int:
    """The sampler step, in 1..num_steps, that carries gradient in this training step: the same in every process, since
    processes with different k would run different numbers of forward passes.

    Uniform, as in SiD-DiT (Sec. 3). With `shares`, `num_steps` numbers that sum to 1 or less, the training ends with
    the sampler steps one after the other, each for its share; `progress` is the share of the training that is done,
    in [0, 1).
    """
    in_turn = 0.0 if shares is None else progress - (1 - sum(shares))
    if shares is None or in_turn < -1e-9:
        return 1 + stream_seed(seed, step, "k") % num_steps
    return 1 + bisect.bisect_right(list(itertools.accumulate(shares[:-1])), in_turn)


def draw_bucket(seed: int, step: int, buckets: int) -> int:
    """The number of the image size, in 0..buckets - 1, of this training step: uniform, and the same in every process,
    since one size takes longer than another."""
    return stream_seed(seed, step, "bucket") % buckets
