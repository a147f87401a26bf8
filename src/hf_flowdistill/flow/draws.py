# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Every random number of a training, each from a key of its own.

Nothing here keeps a random state. Every draw is keyed by (seed, step, purpose, global sample index), so a resumed run,
a run on another number of processes and a run with other accumulation draw the same numbers for the same samples.

The numbers are numpy's Philox, a counter-based generator whose key is 128 bits of a digest, so that no two keys meet.
(torch's generator on the CPU takes 32 bits of a seed: of ten million streams, ten thousand pairs would be equal.) The
numbers of a key are the same on every machine, as far as numpy promises.
"""

import bisect
import hashlib
import itertools

import numpy as np
import torch


def _digest(key: tuple, size: int) -> bytes:
    return hashlib.blake2b(repr(key).encode(), digest_size=size).digest()


def stream_seed(*key) -> int:
    """A 63-bit seed that changes with every part of `key` (integers and strings).

    It is for what takes all of it: Python's `random`, and torch's generators on GPUs. On the CPU see `stream`.
    """
    return int.from_bytes(_digest(key, 8), "big") >> 1


def stream(*key) -> np.random.Generator:
    """The random numbers of `key` (integers and strings): a stream of its own for every key."""
    return np.random.Generator(np.random.Philox(key=np.frombuffer(_digest(key, 16), "<u8")))


def normal(shape, *key) -> torch.Tensor:
    """Standard normal numbers of `key`, float32 of `shape` on the CPU."""
    return torch.from_numpy(stream(*key).standard_normal(tuple(shape), dtype=np.float32))


def permutation(count: int, *key) -> torch.Tensor:
    """The numbers 0 to count - 1 in an order of `key`, [count] in int64."""
    return torch.from_numpy(stream(*key).permutation(count))


def half_words(shape, device, *key) -> torch.Tensor:
    """Uniform integers of `key` from 0 to 2^16 - 1, int32 of `shape`, drawn on `device`: each kind has numbers of its
    own."""
    device = torch.device(device)
    if device.type == "cpu":
        return torch.from_numpy(stream(*key).integers(2**16, size=tuple(shape), dtype=np.uint16).astype(np.int32))
    generator = torch.Generator(device).manual_seed(stream_seed(*key))
    return torch.randint(2**16, shape, dtype=torch.int32, device=device, generator=generator)


def global_indices(micro_batch: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> range:
    """Which samples of the step's global batch this process handles in this micro-batch."""
    start = (micro_batch * world_size + rank) * batch_size
    return range(start, start + batch_size)


def sample_noise(shape, *, seed: int, step: int, purpose: str, indices, device="cpu"):
    """Standard normal noise of shape [len(indices), *shape], one independent stream per sample.

    `shape` is the shape of one sample. The numbers are float32 and drawn on the CPU, so they do not depend on the
    device, or on how the global batch is divided among processes and micro-batches.
    """
    return torch.stack([normal(shape, seed, step, purpose, index) for index in indices]).to(device)


def draw_k(seed: int, step: int, num_steps: int, *, shares=None, progress: float = 0.0) -> int:
    """The sampler step, in 1..num_steps, that carries gradient in this training step: the same in every process, since
    processes with different k would run different numbers of forward passes.

    Uniform, as in SiD-DiT (Sec. 3). With `shares`, `num_steps` numbers that sum to 1 or less, the training ends with
    the sampler steps one after the other, each for its share; `progress` is the share of the training that is done,
    in [0, 1).
    """
    return k_in_turn(shares or [], progress) or 1 + stream_seed(seed, step, "k") % num_steps


def k_in_turn(shares, progress: float) -> int | None:
    """The sampler step whose turn it is, one with a share; None before that, while every update draws one."""
    turns = [(k, share) for k, share in enumerate(shares, start=1) if share > 0]
    done = progress - (1 - sum(shares)) + 1e-9  # a turn begins where it begins, whatever rounding does
    if not turns or done < 0:
        return None
    place = bisect.bisect_right(list(itertools.accumulate(share for _, share in turns)), done)
    return turns[min(place, len(turns) - 1)][0]


def draw_bucket(seed: int, step: int, buckets: int) -> int:
    """The number of the image size, in 0..buckets - 1, of this training step: uniform, and the same in every process,
    since one size takes longer than another."""
    return stream_seed(seed, step, "bucket") % buckets
