# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Latents to images through the pipeline's own code."""

import functools

import numpy as np
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from hf_flowdistill.teachers.finite import finite_images
from hf_flowdistill.teachers.watch import call_arguments, own_scheduler, plain_scheduler, undisturbed, watch


def decode(pipeline, contract, latents: Tensor, output_type: str = "pil", *, batch_size: int = 8):
    """The images of x0 latents [n, *contract.latent_shape]: bit for bit those that the pipeline would show.

    One sampler step that ends at these latents, whatever it starts from, with the transformer switched off; so
    unpacking, scaling, the VAE and the post-processing are the pipeline's, and so is the encoding of an empty prompt,
    for which the text encoders must be there. No gradient. The pipeline is left as it was.

    Returns:
        "pil": a list of images; "np": an array [n, height, width, 3] in [0, 1]; "pt": a tensor [n, 3, height, width].

    Raises:
        ValueError: latents of another shape.
        UserError: the images would not be finite.
    """
    if tuple(latents.shape[1:]) != contract.latent_shape:
        raise ValueError(f"expected latents [n, *{contract.latent_shape}], not {tuple(latents.shape)}")
    batches = []
    with undisturbed(pipeline), finite_images(pipeline):
        for part in latents.split(batch_size):
            arguments = call_arguments(
                pipeline,
                [""] * len(part),
                height=contract.height,
                width=contract.width,
                pipeline_kwargs=contract.pipeline_kwargs,
                num_inference_steps=1,
                output_type=output_type,
                **contract.guidance.arguments(on=False),
            )
            scheduler = _scheduler_that_returns(part.detach(), plain_scheduler(pipeline))
            batches.append(watch(pipeline, arguments, scheduler=scheduler, stub=contract.zero_output)[1])
    if output_type == "pt":
        return torch.cat(batches)
    return np.concatenate(batches) if output_type == "np" else [image for batch in batches for image in batch]


def sampler_levels(pipeline, contract) -> list[float]:
    """The noise levels of the pipeline's own many steps at the contract's size, falling, and the 0 that they end at.

    Learned from one call with the transformer switched off. The pipeline is left as it was.

    Raises:
        CallFailed, UserError: the call fails.
    """
    with undisturbed(pipeline), finite_images(pipeline):
        arguments = call_arguments(
            pipeline,
            [""],
            height=contract.height,
            width=contract.width,
            pipeline_kwargs=contract.pipeline_kwargs,
            output_type="np",
            **contract.guidance.arguments(on=False),
        )
        steps, _ = watch(pipeline, arguments, scheduler=own_scheduler(pipeline), stub=contract.zero_output)
    return [*(step.sigma for step in steps), 0.0]


def _scheduler_that_returns(latents: Tensor, scheduler):
    """`scheduler` with a step that ends at `latents`. Handing them to the pipeline's call instead would not do: some
    pipelines take them there in another layout than their sampler's."""
    step = scheduler.step

    @functools.wraps(step)
    def step_to_latents(model_output, timestep, sample, **kwargs):
        step(model_output, timestep, sample, **kwargs)
        end = latents.to(sample.device, sample.dtype)
        if kwargs.get("return_dict", True):
            return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=end)
        return (end,)

    scheduler.step = step_to_latents
    return scheduler
