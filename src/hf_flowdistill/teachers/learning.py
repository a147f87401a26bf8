# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Learn a teacher's contract: watch a few steps of the pipeline's own call, infer, replay, refuse with one reason."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import ClassifierFreeGuidance

from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.flow import guide
from hf_flowdistill.teachers import inference
from hf_flowdistill.teachers.arguments import get
from hf_flowdistill.teachers.contract import Contract
from hf_flowdistill.teachers.every_step import GuidedSteps
from hf_flowdistill.teachers.finite import check_watched
from hf_flowdistill.teachers.guidance import Guidance
from hf_flowdistill.teachers.inference import as_batch, refuse, relative_error
from hf_flowdistill.teachers.replay import (
    distance,
    half_velocities,
    replay_errors,
    what_does_not_fit,
    with_recorded_times,
)
from hf_flowdistill.teachers.watch import (
    SCALE,
    SET_BY_US,
    Step,
    call_arguments,
    call_parameters,
    check_flow_matching,
    check_many_steps,
    check_size,
    guiders,
    own_scheduler,
    plain_scheduler,
    undisturbed,
    watch,
)


# One short, one long and with words to draw, which some pipelines encode apart. Their embeddings differ in length,
# unless the pipeline pads all to one.
PROMPTS = [
    "a cat",
    'two big dogs beside a sign that says "no dogs" in red letters, early in the morning, in heavy rain',
]
NEGATIVE_PROMPT = "a dog"  # of the first prompt's length, so that neither is padded to the other's
SCALE_TO_COMPARE = 3.0
TABLE_STEPS = 1000


def learn_contract(pipeline, *, height: int, width: int, pipeline_kwargs: dict[str, Any] | None = None) -> Contract:
    """Watch `pipeline` make an image and learn how it talks to its transformer, for one image size.

    Three steps for each of two prompts are watched without guidance, and three for one prompt with it; everything
    else (two prompts in one call, twenty sigmas, a hundred guided steps, another guidance scale) is watched with the
    transformer switched off.
    The contract is then replayed on the latents of all those steps side by side, and must give the pipeline's own
    outputs. That is eleven transformer calls (fourteen where guidance takes two calls a step), of six samples at most;
    one more for each kind of replay where the two prompts differ in length. The pipeline is left as it was, and the
    global random state is neither used nor changed.

    Args:
        height, width: of the image in pixels.
        pipeline_kwargs: further arguments for every call of the pipeline, e.g. `{"max_sequence_length": 128}`.

    Raises:
        UserError: the pipeline cannot be a teacher, or cannot make this size; the message says why. If the replay
            does not fit, it names what does not.
    """
    check_flow_matching(pipeline)
    check_many_steps(pipeline)
    watcher = _Watcher(pipeline, {"height": height, "width": width, "pipeline_kwargs": dict(pipeline_kwargs or {})})
    with undisturbed(pipeline), inference.followed(watcher.name):
        contract, steps = _learn_unguided(watcher)
        every_step = GuidedSteps(pipeline, contract, PROMPTS[:1], NEGATIVE_PROMPT)
        every_step.check_calls()
        contract, guided_steps = _learn_guidance(watcher, contract, steps[0].calls[0].arguments)
        if guided_steps and not every_step.check_scale(contract, watcher.tolerance):
            contract = replace(contract, guidance=replace(contract.guidance, plain=False))
        low = contract.dtype not in (torch.float32, torch.float64)
        replayed = with_recorded_times(contract, steps + guided_steps) if low else contract
        errors = replay_errors(pipeline.transformer, replayed, steps, guided_steps)
        error = max(errors.values(), key=lambda value: (np.isnan(value), value))
        if not error <= watcher.tolerance:
            refuse(
                watcher.name,
                f"replaying it does not give the outputs of its own call (relative error {error:.1e}): "
                + what_does_not_fit(pipeline.transformer, replayed, steps, errors, watcher.tolerance),
            )
    return replace(contract, replay_error=error)


class _Watcher:
    """The pipeline, and the arguments that every call of it gets."""

    def __init__(self, pipeline, settings: dict[str, Any]):
        self.pipeline, self.settings, self.name = pipeline, settings, type(pipeline).__name__
        self.parameters = call_parameters(pipeline).keys()
        missing = SET_BY_US - {"negative_prompt", "latents", "return_dict"} - self.parameters
        if missing:
            refuse(self.name, f"its __call__ has no argument {sorted(missing)}")

    @property
    def tolerance(self) -> float:
        """Of relative errors. Other batch shapes round otherwise, and graphics cards more so (TF32)."""
        if self.pipeline.transformer.dtype not in (torch.float32, torch.float64):
            return 5e-2
        return 1e-4 if self.pipeline._execution_device.type == "cpu" else 5e-3

    def __call__(self, prompts, guidance: Guidance, *, guided=False, stub=None, num_steps=3, **kwargs):
        """Watched steps, and images where the transformer runs: `stub` replaces it, see `watch`."""
        decoded = stub is None and getattr(self.pipeline, "vae", None) is not None
        arguments = call_arguments(
            self.pipeline,
            prompts,
            **self.settings,
            num_inference_steps=num_steps,
            output_type="np" if decoded else "latent",
            **{**guidance.arguments(on=guided), **kwargs},
        )
        scheduler = plain_scheduler(self.pipeline) if num_steps == 1 else own_scheduler(self.pipeline)
        steps, images = watch(self.pipeline, arguments, scheduler=scheduler, stub=stub, guided=guided)
        if len(steps) != num_steps:
            refuse(self.name, f"it takes {len(steps)} sampler steps when asked for {num_steps}")
        return steps, images if decoded else None


def _learn_unguided(watcher: _Watcher) -> tuple[Contract, list[Step]]:
    """The contract but for guidance, and the steps it was learned from: three for each prompt alone."""
    pipeline, name = watcher.pipeline, watcher.name
    guidance, steps = _watch_unguided(watcher)
    arguments, output = steps[0].calls[0].arguments, steps[0].calls[0].output
    latent = inference.find_latent(steps)
    time = inference.find_time(name, steps, latent)
    sign, part = inference.find_output_map(name, steps)
    deviation = steps[0].sample.float().std().item() / steps[0].sigma
    if not 0.75 < deviation < 1.25:
        refuse(name, f"its sampler starts from noise of standard deviation {deviation:.2f} where it should be 1")
    contract = Contract(
        pipeline_class=name,
        transformer_class=type(pipeline.transformer).__name__,
        **watcher.settings,
        latent_shape=tuple(steps[0].sample.shape[1:]),
        latent_argument=latent,
        latent_input_shape=tuple(as_batch(arguments[latent]).shape[1:]),
        latent_is_list=not isinstance(arguments[latent], torch.Tensor),
        time_argument=time,
        time_scale=float("nan"),
        time_offset=float("nan"),
        time_dtype=arguments[time].dtype,
        output_shape=tuple(as_batch(output).shape[1:]),
        output_sign=sign,
        output_part=part,
        output_is_list=not isinstance(output, torch.Tensor),
        output_container=steps[0].calls[0].container,
        dtype=pipeline.transformer.dtype,
        slots={},
        repeated={},
        dtypes={},
        static={},
        guidance=guidance,
    )
    steps += watcher(PROMPTS[1:], guidance)[0]
    contract = _with_time(watcher, contract, steps)
    return _with_slots(watcher, contract, arguments, steps[-1].calls[0].arguments), steps


def _with_time(watcher: _Watcher, contract: Contract, steps: list[Step]) -> Contract:
    def more(num_steps):
        return watcher(PROMPTS[:1], contract.guidance, stub=contract.zero_output, num_steps=num_steps)[0]

    steps = steps + more(20)
    line = inference.find_time_map(watcher.name, steps, contract.time_argument)
    if line is not None:
        return replace(contract, time_scale=line[0], time_offset=line[1])
    table = inference.find_time_table(watcher.name, more(TABLE_STEPS), steps, contract.time_argument)
    return replace(contract, time_table=table)


def _with_slots(watcher: _Watcher, contract: Contract, one, other) -> Contract:
    """The contract with what is kept per prompt, from a step with one prompt and a step with the other."""

    def together(prompts):
        (step,), _ = watcher(prompts, contract.guidance, stub=contract.zero_output, num_steps=1)
        return step.calls[0].arguments

    def rest(arguments):
        known = contract.latent_argument, contract.time_argument
        return {name: value for name, value in arguments.items() if name not in known}

    try:
        twice = together([PROMPTS[0], PROMPTS[0]])
    except (TypeError, ValueError, RuntimeError) as error:
        refuse(watcher.name, f"it does not take two prompts in one call ({first_line(error)})")
    slots, repeated = inference.find_slots(watcher.name, rest(one), rest(other), rest(twice))
    contract = replace(
        contract,
        slots=slots,
        repeated=repeated,
        static={name: value for name, value in rest(one).items() if name not in slots},
        dtypes={path: as_batch(get(one, path)).dtype for path in slots},
    )
    alone = contract.conditioning_from(one)
    if not distance(contract, alone, contract.conditioning_from(twice)[0]) <= watcher.tolerance:
        refuse(watcher.name, "the conditioning of a prompt depends on how many are encoded at once")
    return replace(contract, prompts_at_once=_same_in_company(watcher, contract, together, one, other))


def _same_in_company(watcher, contract, together, one, other) -> bool:
    """Whether two different prompts in one call are encoded as each is alone."""
    try:
        both = contract.conditioning_from(together(PROMPTS))
    except (TypeError, ValueError, RuntimeError, AttributeError):  # None where a single prompt has a mask, say
        return False
    alone = [contract.conditioning_from(one), contract.conditioning_from(other)]
    return all(distance(contract, both[row], alone[row]) <= watcher.tolerance for row in range(2))


def _watch_unguided(watcher: _Watcher) -> tuple[Guidance, list[Step]]:
    """Three steps for the first prompt without guidance, and the argument and value that switched guidance off."""
    argument = next((key for key in ("true_cfg_scale", "guidance_scale") if key in watcher.parameters), None)
    argument = None if guiders(watcher.pipeline) else argument
    for off in (1.0, 0.0) if argument else (1.0,):
        guidance = Guidance(argument=argument, off=off)
        try:
            steps, images = watcher(PROMPTS[:1], guidance)
        except (UserError, torch.OutOfMemoryError):
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            settings = ", ".join(f"{key} {value}" for key, value in watcher.settings.items() if value)
            raise UserError(f"{watcher.name} fails when called with {settings}: {first_line(error)}") from error
        check_watched(watcher.pipeline, steps, images)
        if isinstance(images, np.ndarray):
            check_size(watcher.name, images, watcher.settings["height"], watcher.settings["width"])
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
    contract = _with_constants_of(watcher, contract, calls)
    guidance = replace(contract.guidance, kind=kind, conditional_first=True)
    first, second = replace(contract, guidance=guidance).halves(calls)
    alone = contract.conditioning_from(single)
    distances = distance(contract, alone, first), distance(contract, alone, second)
    if not (min(distances) <= watcher.tolerance and max(distances) > 4 * min(distances)):
        refuse(watcher.name, "under guidance neither or both of the halves are what it uses for the prompt alone")
    contract = replace(contract, guidance=replace(guidance, conditional_first=distances[0] < distances[1]))
    steps, _ = watcher(PROMPTS[:1], contract.guidance, guided=True, negative_prompt=NEGATIVE_PROMPT)
    scale = contract.guidance.watched_scale
    own = [getattr(watcher.pipeline, name) for name in guiders(watcher.pipeline)]
    plain = all(map(_is_plain, own)) and all(
        relative_error(guide(*half_velocities(contract, step), scale), step.model_output) <= watcher.tolerance
        for step in steps
    )
    return replace(contract, guidance=replace(contract.guidance, plain=plain)), steps


def _is_plain(guider) -> bool:
    """Whether a component that guides does nothing but classifier-free guidance, in all steps."""
    part = guider.config.get("start", 0.0), guider.config.get("stop", 1.0)
    return type(guider) is ClassifierFreeGuidance and guider.guidance_rescale == 0 and part == (0.0, 1.0)


def _with_constants_of(watcher: _Watcher, contract: Contract, calls) -> Contract:
    """What was the same for both prompts but is not in a guided call is kept per prompt after all."""
    while (changed := contract.changed_constant(calls)) is not None:
        slot = contract.repeated.get(changed)
        value = None if slot is None else as_batch(get(contract.static, changed))
        if value is None or changed not in contract.static:
            refuse(watcher.name, f"its transformer's argument {changed} is another one under guidance")
        contract = replace(
            contract,
            slots={
                **contract.slots,
                changed: replace(slot, shape=tuple(slot.rows(get(contract.static, changed))[0].shape)),
            },
            repeated={path: slot for path, slot in contract.repeated.items() if path != changed},
            static={name: value for name, value in contract.static.items() if name != changed},
            dtypes={**contract.dtypes, changed: value.dtype},
        )
    return contract


def _calls_at_scale(watcher: _Watcher, contract: Contract, scale: float) -> list[dict[str, Any]]:
    """The arguments of the transformer calls of one guided step for the first prompt, with embedded scales `scale`."""
    scales = {key: scale for key in watcher.parameters if key.endswith("guidance_scale")}
    (step,), _ = watcher(
        PROMPTS[:1],
        replace(contract.guidance, argument=None),
        guided=True,
        stub=contract.zero_output,
        num_steps=1,
        negative_prompt=NEGATIVE_PROMPT,
        **{**contract.guidance.arguments(on=True), **scales},
    )
    return [call.arguments for call in step.calls]


def _with_embedded_guidance(watcher: _Watcher, contract: Contract, calls) -> Contract:
    other = _calls_at_scale(watcher, contract, SCALE_TO_COMPARE)
    found = inference.find_embedded_guidance(watcher.name, calls, other, SCALE, SCALE_TO_COMPARE)
    if found is None:
        return contract
    scales = [key for key in watcher.parameters if key.endswith("guidance_scale")]
    return replace(
        contract,
        embedded_guidance=found,
        embedded_guidance_dtype=calls[0][found[0]].dtype,
        embedded_guidance_argument=scales[0],
        repeated={path: slot for path, slot in contract.repeated.items() if path != found[0]},
        static={name: value for name, value in contract.static.items() if name != found[0]},
    )
