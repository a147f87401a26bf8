# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""One call of a pipeline, watched: what its transformer was fed and returned, and what its scheduler was handed.

The pipeline is not changed: everything that is swapped in for the call is put back by `undisturbed`.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler
from diffusers.guiders import BaseGuidance
from torch import Tensor

from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.teachers.names import GUIDANCE_SCALES, SET_BY_US


SCALE = 2.0  # of the classifier-free guidance in every guided call that is watched


class CallFailed(RuntimeError):
    """Something in a pipeline's own call raised; the message is its first line."""


@dataclass
class TransformerCall:
    """Arguments by parameter name (tensors copied), the first thing returned, and what it was returned in."""

    arguments: dict[str, Any]
    output: Any
    container: str = "nothing"


@dataclass
class Step:
    """One sampler step: the transformer calls it took, and what `scheduler.step` was given at which sigma."""

    calls: list[TransformerCall]
    sigma: float
    sample: Tensor
    model_output: Tensor


def check_flow_matching(pipeline) -> None:
    """Raise `UserError` unless `pipeline` has a transformer and a scheduler that steps along a flow velocity."""
    name = type(pipeline).__name__
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None:
        raise UserError(f"{name} has no scheduler: load the pipeline with its scheduler.")
    config = getattr(scheduler, "config", {})
    kind = type(scheduler).__name__
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or kind.startswith("FlowMatch"):
        predicts = "flow_prediction"
    else:
        predicts = config.get("prediction_type", "something unknown")
    if predicts == "trigflow" or getattr(pipeline, "config", {}).get("is_distilled", False):
        raise UserError(
            f"{name} cannot be a teacher: it is itself a student of few steps; choose the many-step model it was made "
            "from."
        )
    if predicts != "flow_prediction":
        raise UserError(
            f"{name} is not a flow-matching pipeline: its scheduler, {kind}, takes a network that predicts "
            f"{predicts}, not a velocity; choose a teacher with a flow-matching scheduler."
        )
    if config.get("invert_sigmas", False):
        raise UserError(
            f"{name} cannot be a teacher: its scheduler has invert_sigmas=True, so that sigma 1 is the image and not "
            "the noise; choose a teacher whose time runs from noise to image."
        )
    if not isinstance(getattr(pipeline, "transformer", None), torch.nn.Module):
        raise UserError(f"{name} has no transformer: load the pipeline with its transformer.")


def check_many_steps(pipeline) -> None:
    """Raise `UserError` if the scheduler of `pipeline` is one for students only."""
    name, kind = type(pipeline).__name__, type(pipeline.scheduler).__name__
    if kind == "FlowMatchLCMScheduler":
        raise UserError(
            f"{name} cannot be a teacher: its scheduler, {kind}, is a sampler of students of few steps; choose the "
            "many-step model it was made from, or, if it is one, save it with a FlowMatchEulerDiscreteScheduler."
        )


def can_be_guided(pipeline) -> bool:
    """Whether its call has an argument, or it has a component, that guides."""
    return bool(guiders(pipeline)) or any(name.endswith(GUIDANCE_SCALES) for name in call_parameters(pipeline))


def call_arguments(pipeline, prompts, *, height, width, pipeline_kwargs, negative_prompt=None, **more) -> dict:
    """Keyword arguments of `pipeline.__call__`, those that it does not have left out.

    Raises:
        UserError: `pipeline_kwargs` names something that the pipeline does not take, or that the library sets.
    """
    accepted = call_parameters(pipeline)
    for name in pipeline_kwargs:
        if name not in accepted or name in SET_BY_US:
            reason = "is set by the library" if name in SET_BY_US else f"is no argument of {type(pipeline).__name__}"
            raise UserError(f"pipeline_kwargs has '{name}', which {reason}: leave it out.")
    arguments = {
        "prompt": list(prompts),
        "height": height,
        "width": width,
        "generator": torch.Generator().manual_seed(0),
        "return_dict": False,
        **pipeline_kwargs,
        **more,
    }
    if negative_prompt is not None:
        arguments["negative_prompt"] = [negative_prompt] * len(prompts)
    return {name: value for name, value in arguments.items() if name in accepted}


def call_parameters(pipeline) -> dict[str, inspect.Parameter]:
    """The parameters of the pipeline's `__call__` by name."""
    return dict(inspect.signature(type(pipeline).__call__).parameters)


def check_size(name: str, images, height: int, width: int) -> None:
    """Raise `UserError` if the pipeline called `name` made `images`, [n, height, width, 3], of another size."""
    if images.shape[1:3] != (height, width):
        made = f"height {images.shape[1]}, width {images.shape[2]}"
        raise UserError(f"{name} makes {made} when asked for height {height}, width {width}: ask for {made}.")


def watch(
    pipeline,
    arguments: dict,
    *,
    scheduler,
    stub: Callable[[dict], Any] | None = None,
    guided: bool = False,
    keep: Callable[[dict], dict] | None = None,
):
    """Call the pipeline with `arguments` and return (list of `Step`, what the pipeline returned first).

    `scheduler` stands in for the pipeline's own (and is used up: pass a fresh one). With `stub`, the transformer does
    not run: `stub(arguments by name)` gives what it returns, so the call costs text encoding and decoding only.
    `guided` matters where the pipeline keeps its guidance in a component (a diffusers guider) instead of an argument
    of its call: plain classifier-free guidance at `SCALE` stands in for it, or none. Of the arguments of a transformer
    call, by name, `keep` gives what its record holds, by default copies of all. Use inside `undisturbed`.

    Raises:
        CallFailed: whatever the pipeline's call raises, but for `UserError` and a lack of memory.
    """
    keep = keep or _copied
    transformer = pipeline.transformer
    stand_ins = {name: ClassifierFreeGuidance(SCALE, enabled=guided) for name in guiders(pipeline)}
    stand_ins["scheduler"] = scheduler
    replaced = {name: getattr(pipeline, name) for name in stand_ins}
    forward, step = transformer.forward, scheduler.step
    forward_signature, step_signature = inspect.signature(forward), inspect.signature(step)
    steps, calls = [], []

    def watched_forward(*args, **kwargs):
        named = _by_name(forward_signature, args, kwargs)
        call = TransformerCall(keep(named), None)
        output = forward(*args, **kwargs) if stub is None else stub(named)
        call.output = _copied(first_output(output))
        if not isinstance(output, (Tensor, list)):
            call.container = "tuple" if isinstance(output, tuple) else "object"
        calls.append(call)
        return output

    @functools.wraps(step)
    def watched_step(*args, **kwargs):
        named = _by_name(step_signature, args, kwargs)
        sample, model_output = _copied(named["sample"]), _copied(named["model_output"])
        result = step(*args, **kwargs)
        steps.append(Step(calls.copy(), float(scheduler.sigmas[scheduler.step_index - 1]), sample, model_output))
        calls.clear()
        return result

    scheduler.step = watched_step
    pipeline.__dict__.update(stand_ins)
    transformer.forward = watched_forward
    try:
        return steps, pipeline(**arguments)[0]
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _failed(error) from error
    finally:
        transformer.forward = forward
        pipeline.__dict__.update(replaced)


def guiders(pipeline) -> list[str]:
    """Names of the components that combine the halves of guidance."""
    return [name for name, component in pipeline.components.items() if isinstance(component, BaseGuidance)]


def own_scheduler(pipeline):
    """A copy of the pipeline's scheduler, or the Euler one for the same flow where it steps in some other way.

    Other flow samplers take several evaluations a step or round the time to an integer, which is not the network's.
    """
    config = pipeline.scheduler.config
    if isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        return copy.deepcopy(pipeline.scheduler)
    shift = config.get("flow_shift", config.get("shift", 1.0))
    return FlowMatchEulerDiscreteScheduler(config.get("num_train_timesteps", 1000), shift=shift)


def plain_scheduler(pipeline):
    """One Euler step from sigma 1 to 0. A zero velocity leaves the sample exactly as it was."""
    return FlowMatchEulerDiscreteScheduler(pipeline.scheduler.config.get("num_train_timesteps", 1000))


@contextlib.contextmanager
def undisturbed(pipeline):
    """Without gradient, in evaluation mode, without progress bars; afterwards the pipeline is as it was before.

    That covers the pipeline's attributes, its scheduler, every train/eval flag, the transformer's `forward`, and the
    global random state.
    """
    modules = [m for m in pipeline.components.values() if isinstance(m, torch.nn.Module)]
    training = [m for module in modules for m in module.modules() if m.training]
    transformer = pipeline.transformer
    attributes, transformer_attributes = dict(pipeline.__dict__), set(transformer.__dict__)
    device = pipeline._execution_device
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"), torch.no_grad():
        try:
            torch.manual_seed(0)
            for module in training:
                module.training = False
            pipeline.set_progress_bar_config(disable=True)
            yield
        finally:
            for module in training:
                module.training = True
            for name in set(transformer.__dict__) - transformer_attributes:
                del transformer.__dict__[name]
            # The offloading hooks are made anew at the end of every call: those are the ones to keep.
            hooks = {name: pipeline.__dict__[name] for name in ("_all_hooks",) if name in pipeline.__dict__}
            pipeline.__dict__.clear()
            pipeline.__dict__.update({**attributes, **hooks})


def first_output(output):
    """The sample of a transformer's output, which is a tuple, an output object or the tensor itself."""
    return output if isinstance(output, (Tensor, list)) else output[0]


def _failed(error: Exception) -> CallFailed:
    usual = isinstance(error, (RuntimeError, TypeError, ValueError))  # those of other kinds say little by themselves
    return CallFailed(first_line(error) if usual else f"{type(error).__name__}: {first_line(error)}")


def _by_name(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict[str, Any]:
    bound = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
        elif parameter.kind is parameter.VAR_POSITIONAL and bound.get(name):
            raise UserError("The pipeline passes its transformer arguments without a name, which cannot be followed.")
    return bound


def _copied(value):
    """A copy that later in-place changes do not reach."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value
