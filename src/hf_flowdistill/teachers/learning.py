# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Learn a teacher's contract: watch a few steps of the pipeline's own call, infer, replay, refuse with one reason."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.flow import guide
from hf_flowdistill.teachers import inference
from hf_flowdistill.teachers.conditioning import EMBEDDED_GUIDANCE, Conditioning
from hf_flowdistill.teachers.contract import Contract, Guidance
from hf_flowdistill.teachers.inference import refuse, relative_error, same
from hf_flowdistill.teachers.watch import (
    SET_BY_US,
    Step,
    call_arguments,
    call_parameters,
    check_flow_matching,
    own_scheduler,
    plain_scheduler,
    undisturbed,
    watch,
)


PROMPTS = ["a cat", "two dogs"]
SCALE = 2.0
SCALE_TO_COMPARE = 3.0


def learn_contract(pipeline, *, height: int, width: int, pipeline_kwargs: dict[str, Any] | None = None) -> Contract:
    """Watch `pipeline` make an image and learn how it talks to its transformer, for one image size.

    Three steps for two prompts are watched without guidance, and three for one prompt with it; everything else
    (another batch size, twenty sigmas, another guidance scale) is watched with the transformer switched off. The
    contract is then replayed, in one call each, on the latents of all three steps, and must give the pipeline's own
    outputs. That is eight transformer calls (eleven where guidance takes two calls a step), of six samples at most.
    The pipeline is left as it was, and the global random state is neither used nor changed.

    Args:
        height, width: of the image in pixels.
        pipeline_kwargs: further arguments for every call of the pipeline, e.g. `{"max_sequence_length": 128}`.

    Raises:
        UserError: the pipeline cannot be a teacher, or cannot make this size; the message says why.
    """
    check_flow_matching(pipeline)
    watcher = _Watcher(pipeline, {"height": height, "width": width, "pipeline_kwargs": dict(pipeline_kwargs or {})})
    with undisturbed(pipeline):
        contract, steps, single = _learn_unguided(watcher)
        contract, guided_steps = _learn_guidance(watcher, contract, single)
        error = _replay_error(watcher, contract, steps, guided_steps)
    if not error <= watcher.tolerance:
        refuse(watcher.name, f"replaying it does not give the outputs of its own call (relative error {error:.1e})")
    return replace(contract, replay_error=error)


class _Watcher:
    """The pipeline, and the arguments that every call of it gets."""

    def __init__(self, pipeline, settings: dict[str, Any]):
        self.pipeline, self.settings, self.name = pipeline, settings, type(pipeline).__name__
        self.parameters = call_parameters(pipeline).keys()
        missing = SET_BY_US - {"negative_prompt"} - self.parameters
        if missing:
            refuse(self.name, f"its __call__ has no argument {sorted(missing)}")

    @property
    def tolerance(self) -> float:
        """Of relative errors. Other batch shapes round otherwise, and graphics cards more so (TF32)."""
        if self.pipeline.transformer.dtype not in (torch.float32, torch.float64):
            return 5e-2
        return 1e-4 if self.pipeline._execution_device.type == "cpu" else 5e-3

    def __call__(self, prompts, more: dict[str, float], *, stub=None, num_steps=3, **kwargs):
        """Watched steps, and images where the transformer runs: `stub` replaces it, see `watch`."""
        decoded = stub is None and getattr(self.pipeline, "vae", None) is not None
        arguments = call_arguments(
            self.pipeline,
            prompts,
            **self.settings,
            num_inference_steps=num_steps,
            output_type="np" if decoded else "latent",
            **more,
            **kwargs,
        )
        scheduler = plain_scheduler(self.pipeline) if num_steps == 1 else own_scheduler(self.pipeline)
        steps, images = watch(self.pipeline, arguments, scheduler=scheduler, stub=stub)
        return steps, images if decoded else None


def _learn_unguided(watcher: _Watcher) -> tuple[Contract, list[Step], dict[str, Any]]:
    """The contract but for guidance, the steps it was learned from, and the arguments for the first prompt alone."""
    pipeline, name = watcher.pipeline, watcher.name
    guidance, steps = _watch_unguided(watcher)
    arguments = steps[0].calls[0].arguments
    latent = inference.find_latent(steps)
    time = inference.find_time(name, steps, latent)
    sign, first_half = inference.find_output_map(name, steps)
    deviation = steps[0].sample.float().std().item() / steps[0].sigma
    if not 0.75 < deviation < 1.25:
        refuse(name, f"its sampler starts from noise of standard deviation {deviation:.2f} where it should be 1")
    contract = Contract(
        pipeline_class=name,
        transformer_class=type(pipeline.transformer).__name__,
        **watcher.settings,
        latent_shape=tuple(steps[0].sample.shape[1:]),
        latent_argument=latent,
        latent_input_shape=tuple(arguments[latent].shape[1:]),
        time_argument=time,
        time_scale=float("nan"),
        time_offset=float("nan"),
        output_shape=tuple(steps[0].calls[0].output.shape[1:]),
        output_sign=sign,
        output_is_first_half=first_half,
        dtype=pipeline.transformer.dtype,
        conditioning_dims={},
        dtypes={key: value.dtype for key, value in arguments.items() if isinstance(value, torch.Tensor)},
        static={},
        guidance=guidance,
    )
    stubbed, _ = watcher(PROMPTS[:1], guidance.arguments(on=False), stub=contract.zero_output, num_steps=20)
    scale, offset = inference.find_time_map(name, steps + stubbed, time)
    single = stubbed[0].calls[0].arguments
    known = {latent, time}
    dims = inference.find_prompt_arguments(
        name,
        {key: value for key, value in arguments.items() if key not in known},
        {key: value for key, value in single.items() if key not in known},
    )
    static = {key: value for key, value in arguments.items() if key not in known | dims.keys()}
    contract = replace(contract, time_scale=scale, time_offset=offset, conditioning_dims=dims, static=static)
    alone, together = contract.conditioning_from(single), contract.conditioning_from(arguments)
    if not _distance(alone, together[:1]) <= watcher.tolerance:
        refuse(name, "the conditioning of a prompt depends on the other prompts of its batch")
    return contract, steps, single


def _watch_unguided(watcher: _Watcher) -> tuple[Guidance, list[Step]]:
    """Three steps for two prompts without guidance, and the argument and value that switched guidance off."""
    argument = next((key for key in ("true_cfg_scale", "guidance_scale") if key in watcher.parameters), None)
    size = watcher.settings["height"], watcher.settings["width"]
    for off in (1.0, 0.0) if argument else (1.0,):
        guidance = Guidance(argument=argument, off=off)
        try:
            steps, images = watcher(PROMPTS, guidance.arguments(on=False))
        except (UserError, torch.OutOfMemoryError):
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            settings = ", ".join(f"{key} {value}" for key, value in watcher.settings.items() if value)
            raise UserError(f"{watcher.name} fails when called with {settings}: {first_line(error)}") from error
        if isinstance(images, np.ndarray) and images.shape[1:3] != size:
            made = f"height {images.shape[1]}, width {images.shape[2]}"
            raise UserError(
                f"{watcher.name} makes {made} when asked for height {size[0]}, width {size[1]}: ask for {made}."
            )
        if all(len(step.calls) == 1 for step in steps) and inference.find_latent(steps) is not None:
            return guidance, steps
    if len(steps[0].calls) != 1:
        refuse(watcher.name, f"it calls its transformer {len(steps[0].calls)} times a step with guidance off")
    refuse(
        watcher.name,
        "no argument of its transformer is the sampler's latent as it stands: the pipeline scales it, joins it to "
        "something else, or keeps guidance on",
    )


def _learn_guidance(watcher: _Watcher, contract: Contract, single: dict[str, Any]) -> tuple[Contract, list[Step]]:
    """The contract with guidance, and three guided steps for the first prompt (none without such guidance)."""
    calls = _calls_at_scale(watcher, contract, SCALE)
    contract = _with_embedded_guidance(watcher, contract, calls)
    doubled = len(calls[0][contract.latent_argument]) == 2
    kind = {(1, False): "none", (1, True): "doubled", (2, False): "two calls"}.get((len(calls), doubled))
    if kind is None:
        refuse(watcher.name, f"under guidance it calls its transformer {len(calls)} times a step")
    if kind == "none":
        return replace(contract, guidance=Guidance()), []
    guidance = replace(contract.guidance, kind=kind, conditional_first=True)
    first, second = replace(contract, guidance=guidance).halves(calls)
    alone = contract.conditioning_from(single)
    distances = _distance(alone, first), _distance(alone, second)
    if not (min(distances) <= watcher.tolerance and max(distances) > 4 * min(distances)):
        refuse(watcher.name, "under guidance neither or both of the halves are what it uses for the prompt alone")
    contract = replace(contract, guidance=replace(guidance, conditional_first=distances[0] < distances[1]))
    for key, value in contract.static.items():
        if not all(same(value, call.get(key)) for call in calls):
            refuse(watcher.name, f"its transformer's argument {key} is another one under guidance")
    steps, _ = watcher(PROMPTS[:1], contract.guidance.arguments(on=True, scale=SCALE), negative_prompt="")
    plain = all(
        relative_error(guide(*_half_velocities(contract, step), SCALE), step.model_output) <= watcher.tolerance
        for step in steps
    )
    return replace(contract, guidance=replace(contract.guidance, plain=plain)), steps


def _calls_at_scale(watcher: _Watcher, contract: Contract, guidance_scale: float) -> list[dict[str, Any]]:
    """The arguments of the transformer calls of one guided step for the first prompt."""
    scales = {"true_cfg_scale": SCALE, "guidance_scale": guidance_scale}
    more = {key: value for key, value in scales.items() if key in watcher.parameters}
    (step,), _ = watcher(PROMPTS[:1], more, stub=contract.zero_output, num_steps=1, negative_prompt="")
    return [call.arguments for call in step.calls]


def _with_embedded_guidance(watcher: _Watcher, contract: Contract, calls) -> Contract:
    other = _calls_at_scale(watcher, contract, SCALE_TO_COMPARE)
    found = inference.find_embedded_guidance(watcher.name, calls, other, SCALE, SCALE_TO_COMPARE)
    if found is None:
        return contract
    dims = {key: dim for key, dim in contract.conditioning_dims.items() if key != found[0]}
    return replace(contract, embedded_guidance=found, conditioning_dims=dims)


def _half_velocities(contract: Contract, step: Step):
    """(unconditional, conditional) velocity of a guided step, from the transformer's own outputs."""
    outputs = step.calls[0].output.chunk(2) if contract.guidance.kind == "doubled" else [c.output for c in step.calls]
    velocities = [contract.velocity_from_output(output) for output in outputs]
    return velocities[::-1] if contract.guidance.conditional_first else velocities


def _replay_error(watcher: _Watcher, contract: Contract, steps: list[Step], guided_steps: list[Step]) -> float:
    """Largest relative error of replaying all steps in one call, different sigmas side by side; NaN if one is."""

    def together(steps):
        samples = torch.cat([step.sample for step in steps])
        sigma = torch.tensor([step.sigma for step in steps]).repeat_interleave(len(steps[0].sample))
        return watcher.pipeline.transformer, samples, sigma.to(samples.device)

    rows = Conditioning.cat(contract.conditioning_from(step.calls[0].arguments) for step in steps)
    expected = torch.cat([step.model_output for step in steps])
    error = relative_error(contract.velocity(*together(steps), rows), expected)
    if not guided_steps:
        return error
    halves = [contract.halves([call.arguments for call in step.calls]) for step in guided_steps]
    conditional, unconditional = (Conditioning.cat(half) for half in zip(*halves, strict=True))
    expected = torch.cat([guide(*_half_velocities(contract, step), SCALE) for step in guided_steps])
    replayed = contract.guided_velocity(*together(guided_steps), conditional, unconditional, SCALE)
    return float(np.maximum(error, relative_error(replayed, expected)))


def _distance(a: Conditioning, b: Conditioning) -> float:
    """Largest relative difference of two conditionings; the embedded guidance aside. inf for other shapes."""
    names = a.tensors.keys() - {EMBEDDED_GUIDANCE}
    return max(relative_error(a.tensors[name], b.tensors[name]) for name in names)
