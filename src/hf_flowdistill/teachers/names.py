# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Names of the arguments of a pipeline's call. No torch, which takes seconds to import."""

GUIDANCE_SCALES = ("guidance_scale", "true_cfg_scale")  # the ends of their names
SET_BY_US = frozenset(
    "prompt negative_prompt height width num_inference_steps latents generator output_type return_dict".split()
)
