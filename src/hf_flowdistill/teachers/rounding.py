# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""How a network in low precision takes the time: in which dtype it must be, and what of it the network sees."""

import functools
from dataclasses import replace

import torch

from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.teachers.conditioning import encode_batch
from hf_flowdistill.teachers.contract import Contract
from hf_flowdistill.teachers.learning import PROMPTS
from hf_flowdistill.teachers.precision import find_rounding, floating_dtype


@torch.no_grad()
def learn_low_precision(pipeline, contract: Contract, transformer=None) -> Contract:
    """`contract` for `transformer` in its dtype and in the caller's autocast; in float32, as it is.

    A contract that was learned in float32 does not say how a network in bfloat16 takes its time and an embedded scale:
    float32, which has every digit, or where its class cannot, its own dtype (`time_dtype`). And some classes cast
    their time to the precision of what they compute with, under autocast too, which in bfloat16 leaves 8 bits: sigma
    .977 and .978 are then one time. A few calls at two times each tell which cast it is (`time_rounding`).

    Args:
        transformer: of the teacher's class, on the pipeline's device; the pipeline's own by default.

    Raises:
        UserError: the class does not compute in this precision.
    """
    device, transformer = pipeline._execution_device, transformer or pipeline.transformer
    dtype = floating_dtype(transformer)
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if dtype != torch.bfloat16:
        return replace(contract, time_rounding=None)
    with torch.autocast(device.type, enabled=False):
        conditioning = encode_batch(pipeline, contract, PROMPTS[:1])
    x_t = torch.randn(1, *contract.latent_shape, generator=torch.Generator().manual_seed(0)).to(device)

    def velocity(contract, time: float) -> torch.Tensor:
        sigma = contract.noise_levels(torch.tensor([time])).to(device, torch.float32)
        return contract.velocity(transformer, x_t, sigma, conditioning)

    ends = contract.time(torch.tensor([0.0, 1.0])).sort().values.tolist()
    contract = _with_dtype(contract, lambda contract: velocity(contract, ends[1]))
    seen = functools.cache(functools.partial(velocity, contract))
    found = find_rounding(lambda one, other: not torch.equal(seen(one), seen(other)), *ends)
    return replace(contract, time_rounding=found)


def _with_dtype(contract: Contract, compute) -> Contract:
    """The contract with which the network computes: times and scales as they are, or in the network's dtype."""
    low = replace(contract, time_dtype=torch.bfloat16, embedded_guidance_dtype=torch.bfloat16)
    for tried in (contract, low):
        try:
            compute(tried)
        except (TypeError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = first_line(error)
        else:
            return tried
    raise UserError(
        f"{contract.transformer_class} does not compute in bfloat16 ({reason}): use float32 weights, with or without "
        "--mixed_precision bf16."
    )
