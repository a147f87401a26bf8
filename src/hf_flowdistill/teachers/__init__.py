# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Teachers: any diffusers flow-matching text-to-image pipeline, through what one watched call says about it."""

from hf_flowdistill.teachers.buckets import first_alike, learn_contracts
from hf_flowdistill.teachers.conditioning import (
    Conditioning,
    bytes_per_prompt,
    encode_batch,
    encode_prompts,
    encode_unconditional,
)
from hf_flowdistill.teachers.contract import Contract
from hf_flowdistill.teachers.decode import decode
from hf_flowdistill.teachers.encode import ImageEncoder, learn_image_encoder
from hf_flowdistill.teachers.learning import learn_contract
from hf_flowdistill.teachers.rounding import learn_low_precision
from hf_flowdistill.teachers.watch import check_flow_matching


__all__ = [
    "Conditioning",
    "Contract",
    "ImageEncoder",
    "bytes_per_prompt",
    "check_flow_matching",
    "decode",
    "encode_batch",
    "encode_prompts",
    "encode_unconditional",
    "first_alike",
    "learn_contract",
    "learn_contracts",
    "learn_image_encoder",
    "learn_low_precision",
]
