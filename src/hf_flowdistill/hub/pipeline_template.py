# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A few-step student: the stock pipeline with the student's own defaults, and all noise from the call's generator.

    student = "..."  # this folder, or its id on the Hub
    pipe = DiffusionPipeline.from_pretrained(student, custom_pipeline=student, trust_remote_code=True)
    image = pipe("...", generator=torch.Generator().manual_seed(0)).images[0]

Needs diffusers only.
"""

import functools
import inspect
import itertools
import json
import shutil
from pathlib import Path

from diffusers import StableDiffusion3Pipeline as StockPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput


NOISE_TYPE = "fresh"
CALL_DEFAULTS = {"num_inference_steps": 4, "guidance_scale": 1.0}
ABSENT_COMPONENTS = []


def _signature(call):
    """The stock call's signature with the student's defaults in it."""
    signature = inspect.signature(call)
    return signature.replace(
        parameters=[
            parameter.replace(default=CALL_DEFAULTS.get(name, parameter.default))
            for name, parameter in signature.parameters.items()
        ]
    )


def _fewer(levels, num_steps):
    """The first and the last `num_steps` - 1 of the levels that the student was trained at."""
    if num_steps > len(levels):
        raise ValueError(f"This student has {len(levels)} steps: take as many or fewer, or give the call its sigmas.")
    return [levels[0], *levels[len(levels) - num_steps + 1 :]]


def _step_with_first_noise(scheduler):
    """A `scheduler.step` that noises every x0 with the noise the image started from, its first sample."""
    noise = None
    index = itertools.count()

    def step(model_output, timestep, sample, return_dict=True, **kwargs):
        nonlocal noise
        sample = sample.float()
        noise = sample if noise is None else noise
        i = next(index)
        sigma, next_sigma = scheduler.sigmas[i], scheduler.sigmas[i + 1]
        x0 = sample - sigma * model_output.float()
        prev_sample = ((1 - next_sigma) * x0 + next_sigma * noise).to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    return step


class FewStepPipeline(StockPipeline):
    """The stock pipeline, sampling at sigma = 1, 1 - 1/n, ..., 1/n for any number of steps n.

    A student with sigmas among CALL_DEFAULTS samples at these, and in fewer steps at the first and the last of them.
    `generator` (or a list of them, one for each image) is the only source of randomness, where most stock classes draw
    the noise between steps from torch's global generator.
    """

    _optional_components = [*StockPipeline._optional_components, *ABSENT_COMPONENTS]
    SIGNATURE = _signature(StockPipeline.__call__)

    def __call__(self, *args, **kwargs):
        call = self.SIGNATURE.bind(self, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        for name in ("sigmas", "timesteps"):
            if name in CALL_DEFAULTS and given[name] is CALL_DEFAULTS[name]:
                given[name] = _fewer(given[name], given["num_inference_steps"])
        explicit = any(given.get(name) is not None for name in ("sigmas", "timesteps"))
        num_steps = given["num_inference_steps"]
        scheduler = self.scheduler
        shift_terminal = scheduler.config.shift_terminal
        # A schedule of one step cannot be stretched: 0 / 0.
        scheduler.register_to_config(shift_terminal=None if explicit or num_steps == 1 else 1 / num_steps)
        if NOISE_TYPE == "fixed":
            scheduler.step = _step_with_first_noise(scheduler)
        else:
            scheduler.step = functools.partial(scheduler.step, generator=given.get("generator"))
        try:
            return super().__call__(*call.args[1:], **call.kwargs)
        finally:
            del scheduler.step
            scheduler.register_to_config(shift_terminal=shift_terminal)

    __call__.__doc__ = StockPipeline.__call__.__doc__
    __call__.__signature__ = SIGNATURE

    def save_config(self, save_directory, **kwargs):
        """As the stock class, so that what is saved loads without this file; which goes along."""
        super().save_config(save_directory, **kwargs)
        index_file = Path(save_directory) / self.config_name
        index = json.loads(index_file.read_text()) | {"_class_name": StockPipeline.__name__}
        index_file.write_text(json.dumps(index, indent=2) + "\n")
        shutil.copyfile(__file__, Path(save_directory) / "pipeline.py")
