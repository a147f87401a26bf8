# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Pictures for a list of prompts from any pipeline, with what they cost."""

import time
from dataclasses import dataclass

import torch

from hf_flowdistill.teachers.finite import finite_images


@dataclass
class Generated:
    """images: [N, 3, H, W] in [0, 1]; cost per image: rows through the transformer (a guided step counts two) and
    wall-clock seconds, text encoding and decoding included."""

    images: torch.Tensor
    forwards_per_image: float
    seconds_per_image: float


def generate(
    pipeline,
    prompts: list[str],
    *,
    num_steps: int,
    guidance_scale: float,
    seed: int = 0,
    batch_size: int = 100,
    **call,
) -> Generated:
    """Run a pipeline over prompts; picture i is drawn from seed + i, whatever the batch size.

    Noise drawn between steps also follows the seed where the pipeline hands its `generator` to the scheduler, as a
    student's own pipeline does. `call` holds further arguments of the pipeline's call.

    Raises:
        UserError: a picture would not be finite.
    """
    rows = 0

    def count(module, args, kwargs, output):
        nonlocal rows
        rows += len(output[0] if isinstance(output, tuple) else output.sample)

    pipeline.set_progress_bar_config(disable=True)
    images = []
    handle = pipeline.transformer.register_forward_hook(count, with_kwargs=True)
    started = time.perf_counter()
    try:
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
            with finite_images(pipeline):
                output = pipeline(
                    part,
                    num_inference_steps=num_steps,
                    guidance_scale=guidance_scale,
                    generator=generators,
                    output_type="pt",
                    **call,
                )
            images.append(output.images.float().cpu())
    finally:
        handle.remove()
    seconds = time.perf_counter() - started
    return Generated(torch.cat(images), rows / len(prompts), seconds / len(prompts))
