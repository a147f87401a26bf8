# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Latents to images through the pipeline's own code."""

import numpy as np
import torch
from torch import Tensor

from hf_flowdistill.teachers.watch import call_arguments, plain_scheduler, undisturbed, watch


def decode(pipeline, contract, latents: Tensor, output_type: str = "pil", *, batch_size: int = 8):
    """The images of x0 latents [n, *contract.latent_shape]: bit for bit those that the pipeline would show.

    One sampler step with the transformer replaced by a zero velocity, which leaves the latents as they are; so
    unpacking, scaling, the VAE and the post-processing are the pipeline's, and so is the encoding of an empty prompt,
    for which the text encoders must be there. No gradient. The pipeline is left as it was.

    Returns:
        "pil": a list of images; "np": an array [n, height, width, 3] in [0, 1]; "pt": a tensor [n, 3, height, width].

    Raises:
        ValueError: latents of another shape.
    """
    if tuple(latents.shape[1:]) != contract.latent_shape:
        raise ValueError(f"expected latents [n, *{contract.latent_shape}], not {tuple(latents.shape)}")
    batches = []
    with undisturbed(pipeline):
        for part in latents.split(batch_size):
            arguments = call_arguments(
                pipeline,
                [""] * len(part),
                height=contract.height,
                width=contract.width,
                pipeline_kwargs=contract.pipeline_kwargs,
                num_inference_steps=1,
                latents=part.detach(),
                output_type=output_type,
                **contract.guidance.arguments(on=False),
            )
            batches.append(
                watch(pipeline, arguments, scheduler=plain_scheduler(pipeline), stub=contract.zero_output)[1]
            )
    if output_type == "pt":
        return torch.cat(batches)
    return np.concatenate(batches) if output_type == "np" else [image for batch in batches for image in batch]
