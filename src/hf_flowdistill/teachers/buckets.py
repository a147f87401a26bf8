# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Several image sizes of one teacher: a contract for each, and which of them share their conditioning."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from hf_flowdistill.errors import UserError
from hf_flowdistill.teachers.conditioning import Conditioning, encode_batch, encode_unconditional
from hf_flowdistill.teachers.contract import Contract
from hf_flowdistill.teachers.learning import PROMPTS, learn_contract


def learn_contracts(
    pipeline,
    sizes: Sequence[tuple[int, int]],
    pipeline_kwargs: dict[str, Any] | None = None,
    *,
    row_by_row: bool = False,
) -> list[Contract]:
    """`learn_contract` for each of `sizes`, (height, width) in pixels; `row_by_row` is of `Contract`.

    Raises:
        UserError: as `learn_contract`, or the times of the network depend on the size: those of a student are among
            its defaults, for one size.
    """
    contracts = [
        replace(
            learn_contract(pipeline, height=height, width=width, pipeline_kwargs=pipeline_kwargs),
            row_by_row=row_by_row,
        )
        for height, width in sizes
    ]
    sigma = torch.linspace(0.01, 0.99, 99)
    for contract in contracts:
        if not torch.allclose(contract.time(sigma), contracts[0].time(sigma), rtol=1e-4, atol=1e-6):
            first, other = (f"{one.height}x{one.width}" for one in (contracts[0], contract))
            raise UserError(
                f"{contract.pipeline_class} feeds its transformer other times at {other} than at {first}, and its "
                "student could not follow: train it at one size."
            )
    return contracts


def first_alike(pipeline, contracts: Sequence[Contract]) -> list[int]:
    """For each of the pipeline's contracts, the number of the first whose conditioning is the same, bit for bit.

    Most pipelines feed their transformer the same for a prompt at every size. With one contract nothing is encoded.
    """
    if len(contracts) == 1:
        return [0]
    probes = [
        (encode_batch(pipeline, contract, PROMPTS[:1]), encode_unconditional(pipeline, contract))
        for contract in contracts
    ]
    return [next(i for i, other in enumerate(probes) if all(map(_equal, probe, other))) for probe in probes]


def _equal(a: Conditioning, b: Conditioning) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)
