# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the steps of a watched call say: which argument is the latent, which the time, what the output means.

Every function looks at recorded tensors only. None of them knows a model family.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_flowdistill.errors import UserError
from hf_flowdistill.teachers.watch import Step


def refuse(name: str, reason: str):
    """Raise the `UserError` that says why `name` cannot be a teacher."""
    raise UserError(f"{name} cannot be a teacher: {reason}; choose another pipeline.")


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest absolute reference value; 0 for empty tensors, inf for other shapes."""
    if value.shape != reference.shape:
        return math.inf
    if reference.numel() == 0:
        return 0.0
    value, reference = value.double(), reference.double()
    largest = reference.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return ((value - reference).abs().max() / largest).item()


def find_latent(steps: list[Step]) -> str | None:
    """The argument that holds the sampler's latents at every step, reshaped and cast at most, if there is one."""

    def holds_latent(value, sample):
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() != sample.numel():
            return False
        return len(value) == len(sample) and torch.equal(value, sample.to(value.dtype).reshape(value.shape))

    for name in steps[0].calls[0].arguments:
        if all(holds_latent(step.calls[0].arguments[name], step.sample) for step in steps):
            return name
    return None


def find_time(name: str, steps: list[Step], latent: str) -> str:
    """The one argument besides the latent that changes from step to step."""
    first, *others = (step.calls[0].arguments for step in steps)
    changing = [key for key in first if key != latent and not all(same(first[key], other[key]) for other in others)]
    if len(changing) != 1:
        refuse(name, f"one argument of its transformer should follow the time, but {changing or 'none'} do")
    value = first[changing[0]]
    if not isinstance(value, Tensor) or value.ndim > 1 or value.unique().numel() != 1:
        refuse(name, f"{changing[0]}, which changes from step to step, is not one time per sample")
    return changing[0]


def find_time_map(name: str, steps: list[Step], time: str) -> tuple[float, float]:
    """(scale, offset) with time = scale * sigma + offset, checked at every step given."""
    values = [step.calls[0].arguments[time] for step in steps]
    times = np.array([value.flatten()[0].double().item() for value in values])
    sigmas = np.array([step.sigma for step in steps])
    low, high = sigmas.argmin(), sigmas.argmax()
    if not np.isfinite(sigmas).all() or sigmas[low] == sigmas[high]:
        refuse(name, f"its scheduler's sigmas are {sigmas.tolist()}")
    scale = (times[high] - times[low]) / (sigmas[high] - sigmas[low])
    offset = times[high] - scale * sigmas[high]
    precision = torch.finfo(values[0].dtype).eps if values[0].is_floating_point() else 0.0
    tolerance = max(1e-5, 2 * precision) * max(abs(scale), abs(times).max())
    digits = 6 if precision < 1e-6 else 3
    # The rounded line first: the slope of 1000 * sigma is then 1000 and not 999.99994.
    rounded = float(f"{scale:.{digits}g}"), round(offset / abs(scale), digits - 1) * abs(scale) + 0.0
    for line in (rounded, (scale, offset)):
        if abs(line[0] * sigmas + line[1] - times).max() <= tolerance:
            return float(line[0]), float(line[1])
    worst = abs(scale * sigmas + offset - times).max()
    line = f"{scale:.4g} * sigma + {offset:.4g}"
    refuse(name, f"{time} is not an affine function of sigma (it is off {line} by up to {worst:.3g})")


def find_output_map(name: str, steps: list[Step]) -> tuple[int, bool]:
    """(sign, first half of the channels or all) that turn the transformer's output into the scheduler's velocity."""
    outputs = [step.calls[0].output for step in steps]
    if not all(isinstance(output, Tensor) for output in outputs):
        refuse(name, f"its transformer returns a {type(outputs[0]).__name__}, not a tensor")
    if not all(step.model_output.any() for step in steps):
        raise UserError(f"{name} has a transformer that returns only zeros: train it before distilling it.")
    tolerance = 1e-5 if outputs[0].dtype in (torch.float32, torch.float64) else 1e-2
    for first_half in (False, True):
        for sign in (1, -1):
            for output, step in zip(outputs, steps, strict=True):
                part = output.chunk(2, dim=1)[0] if first_half else output
                if part.numel() != step.sample.numel():
                    break
                if not relative_error(sign * part.reshape(step.sample.shape), step.model_output) <= tolerance:
                    break
            else:
                return sign, first_half
    refuse(
        name,
        "what its scheduler is given is not plus or minus the output of its transformer, so the network does not "
        "predict a flow velocity",
    )


def find_prompt_arguments(name: str, two: dict[str, Any], one: dict[str, Any]) -> dict[str, int]:
    """Argument -> batch dimension, for those that differ between a call with `two` prompts and a call with `one`.

    The others are the same for both and so depend on neither prompt nor batch size.
    """
    if two.keys() != one.keys():
        refuse(name, f"its transformer is given {sorted(two.keys() ^ one.keys())} for some batch sizes only")
    dims = {}
    for key, value in two.items():
        single = one[key]
        if same(value, single):
            continue
        if not isinstance(value, Tensor) or not isinstance(single, Tensor) or value.ndim != single.ndim:
            refuse(name, f"its transformer's argument {key} depends on the prompt but is not a tensor")
        candidates = [dim for dim in range(value.ndim) if single.shape[dim] == 1 and value.shape[dim] == 2]
        rest = [dim for dim in range(value.ndim) if single.shape[dim] != value.shape[dim]]
        if not candidates:
            refuse(name, f"its transformer's argument {key} depends on the prompt but has no batch dimension")
        if rest != candidates[:1]:
            refuse(name, f"its transformer's argument {key} is longer for one prompt than for another")
        dims[key] = candidates[0]
    if not dims:
        refuse(name, "nothing that its transformer is given depends on the prompt")
    return dims


def find_embedded_guidance(
    name: str, calls: list[dict[str, Any]], other: list[dict[str, Any]], scale: float, other_scale: float
) -> tuple[str, float] | None:
    """(argument, factor) if some argument is factor * guidance scale, from the calls of one step at two scales."""
    found = None
    for key in calls[0]:
        value, other_value = calls[0][key], other[0].get(key)
        if same(value, other_value):
            continue
        if not isinstance(value, Tensor) or value.ndim != 1 or found is not None:
            refuse(name, f"its transformer's argument {key} changes with guidance_scale in an unknown way")
        factor = float(f"{value[0].item() / scale:.6g}")
        if not torch.allclose(
            other_value.float(), torch.full_like(other_value.float(), factor * other_scale), rtol=1e-2
        ):
            refuse(name, f"its transformer's argument {key} is not proportional to guidance_scale")
        found = (key, factor)
    return found


def same(a, b) -> bool:
    """Equal, for the kinds of values that pipelines hand to their transformers."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    return a is b or a == b
