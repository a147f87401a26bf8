# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Several processes that compute what one process would; see also `flow.draws`."""

import contextlib
import os
import signal
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_flowdistill.errors import UserError, first_line


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def process_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def together(work: Callable) -> list:
    """Run `work` on every process, and return on all what it returned on each, in the order of their ranks.

    Raises:
        OSError: on all, if it raised an exception on one; the message is that of the first.
    """
    result, reason, cause = None, None, None
    try:
        result = work()
    except Exception as error:
        reason, cause = first_line(error), error
    results = [(result, reason)]
    if is_distributed():
        results = [None] * dist.get_world_size()
        dist.all_gather_object(results, (result, reason))
    reason = next((reason for _, reason in results if reason is not None), None)
    if reason is not None:
        raise OSError(reason) from cause
    return [result for result, _ in results]


def on_main(work: Callable):
    """Run `work` on the main process alone; what it returns, and that it failed, reaches all, as by `together`."""
    return together(work if process_rank() == 0 else lambda: None)[0]


@contextlib.contextmanager
def stop_signals():
    """A list that gets the name of every SIGTERM and SIGUSR1 in the context; they do nothing else there."""
    received = []
    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    handlers = {
        number: signal.signal(number, lambda n, _: received.append(signal.Signals(n).name)) for number in signals
    }
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of `tensor` over all processes (in place; the tensor itself on one process)."""
    if is_distributed():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def all_ranks_agree(flag: bool, device="cpu") -> bool:
    """True only if `flag` is true on every process."""
    if not is_distributed():
        return flag
    vote = torch.tensor(int(flag), device=device)
    dist.all_reduce(vote, op=dist.ReduceOp.MIN)
    return bool(vote)


def average_gradients(parameters, bucket_elements: int = 2**25) -> None:
    """Replace every gradient by its mean over processes, taken in float32; nothing to do on one process.

    Gradients of sharded parameters are left alone: the backward pass has averaged them. The others travel in flat
    buckets of at most about `bucket_elements` values, so that many small tensors cost few messages. A parameter
    without a gradient has none on any process, since all run the same graph.
    """
    if not is_distributed():
        return
    bucket, size = [], 0
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    gradients = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    for i, gradient in enumerate(gradients):
        bucket.append(gradient)
        size += gradient.numel()
        last = i + 1 == len(gradients)
        if last or size + gradients[i + 1].numel() > bucket_elements or gradients[i + 1].dtype != gradient.dtype:
            flat = mean_over_ranks(torch.cat([g.flatten() for g in bucket]).float())
            for g, mean in zip(bucket, flat.split([g.numel() for g in bucket])):
                g.copy_(mean.view_as(g))
            bucket, size = [], 0


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself, or all of a sharded one, which every process has to ask for."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself, or what this process holds of a sharded one: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_whole(target: torch.Tensor, source: torch.Tensor) -> None:
    """Fill `target`, which may be sharded, from `source`, which every process has whole."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device_mesh.device_type), target.device_mesh, target.placements)
    local(target).copy_(local(source))


def check_accelerator(accelerator) -> None:
    """Stop a launch that this package does not compute rightly.

    Raises:
        UserError: for a mixed precision other than bfloat16, or networks that the launcher would shard.
    """
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(
            f"mixed precision {accelerator.mixed_precision} was launched, whose scaled losses are not supported: "
            "launch with --mixed_precision bf16 or no."
        )
    kind = str(accelerator.distributed_type.value)
    if kind in ("DEEPSPEED", "MEGATRON_LM"):
        raise UserError(
            f"{kind} was launched, but the script shards by itself: launch with --multi_gpu or --use_fsdp."
        )


def check_world_size(num_processes: int) -> None:
    """Stop a run whose processes do not see each other: each would train alone and write over the others.

    Raises:
        UserError: if the launcher started another number of processes than the run counts.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if "WORLD_SIZE" not in os.environ and {"MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys():
        # accelerate tells the single process that it starts where there is no accelerator where the others would be
        raise UserError(
            "accelerate was asked for several processes but started one: on CPUs launch with `torchrun "
            "--nproc_per_node N`, or for one process unset MASTER_ADDR."
        )
    if launched != num_processes:
        raise UserError(
            f"the launcher started {launched} processes but this one counts {num_processes}: "
            "launch on machines with one accelerator per process, or without accelerators on all of them."
        )
