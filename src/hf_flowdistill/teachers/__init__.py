# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Teachers: any diffusers flow-matching text-to-image pipeline, through what one watched call says about it."""

from hf_flowdistill import on_demand


NAMES = {
    "buckets": ["first_alike", "learn_contracts"],
    "conditioning": ["Conditioning", "bytes_per_prompt", "encode_batch", "encode_prompts", "encode_unconditional"],
    "contract": ["Contract"],
    "decoding": ["decode"],
    "encode": ["ImageEncoder", "learn_image_encoder"],
    "learning": ["learn_contract"],
    "rounding": ["learn_low_precision"],
    "watch": ["check_flow_matching"],
}
__all__ = [name for names in NAMES.values() for name in names]
__getattr__ = on_demand(__name__, NAMES)
