# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the steps of a watched call say: which argument is the latent, which the time, what the output means.

Every function looks at recorded tensors only. None of them knows a model family.
"""

import contextlib
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.teachers.arguments import Slot
from hf_flowdistill.teachers.watch import CallFailed, Step


def refuse(name: str, reason: str):
    """Raise the `UserError` that says why `name` cannot be a teacher."""
    raise UserError(f"{name} cannot be a teacher: {reason}; choose another pipeline.")


@contextlib.contextmanager
def followed(name: str):
    """Inside, whatever goes wrong is a `UserError` that says why `name` cannot be a teacher."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kind = "" if isinstance(error, CallFailed) else f"{type(error).__name__}: "
        raise UserError(
            f"{name} cannot be a teacher: its own call cannot be followed ({kind}{first_line(error)}); choose another "
            "pipeline, or other --pipeline_kwargs."
        ) from error


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest absolute reference value; 0 for empty tensors, inf for other shapes."""
    if value.shape != reference.shape:
        return math.inf
    if reference.numel() == 0:
        return 0.0
    value, reference = value.double(), reference.double()
    largest = reference.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return ((value - reference).abs().max() / largest).item()


def as_batch(value) -> Tensor | None:
    """A tensor as it is, a list of tensors of one shape stacked; None for anything else."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
        return torch.stack(list(value)) if len({item.shape for item in value}) == 1 else None
    return value if isinstance(value, Tensor) else None


def find_latent(steps: list[Step]) -> str | None:
    """The argument that holds the sampler's latents at every step, reshaped and cast at most, if there is one."""

    def holds_latent(value, sample):
        value = as_batch(value)
        if value is None or not value.is_floating_point() or value.numel() != sample.numel():
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


def find_time_map(name: str, steps: list[Step], time: str) -> tuple[float, float] | None:
    """(scale, offset) with time = scale * sigma + offset at every step given; None if no such line fits."""
    times, sigmas, precision = _times(name, steps, time)
    low, high = sigmas.argmin(), sigmas.argmax()
    scale = (times[high] - times[low]) / (sigmas[high] - sigmas[low])
    offset = times[high] - scale * sigmas[high]
    tolerance = max(1e-5, 2 * precision) * max(abs(scale), abs(times).max())
    digits = 6 if precision < 1e-6 else 3
    if scale == 0:
        return None
    # The rounded line first: the slope of 1000 * sigma is then 1000 and not 999.99994.
    rounded = float(f"{scale:.{digits}g}"), round(offset / abs(scale), digits - 1) * abs(scale) + 0.0
    for line in (rounded, (scale, offset)):
        if abs(line[0] * sigmas + line[1] - times).max() <= tolerance:
            return float(line[0]), float(line[1])
    return None


def find_time_table(name: str, many: list[Step], steps: list[Step], time: str) -> tuple[Tensor, Tensor]:
    """(sigmas, times) from `many` steps, both in float64 and increasing in sigma, which `steps` confirm.

    The first and the last piece go on beyond the sigmas that were seen.
    """
    times, sigmas, _ = _times(name, many, time)
    sigmas, kept = np.unique(sigmas, return_index=True)
    times = times[kept]
    if len(sigmas) < 100:
        refuse(name, f"{time} is not an affine function of sigma, and {len(sigmas)} sigmas are too few for a table")
    expected, at, precision = _times(name, steps, time)
    right = np.searchsorted(sigmas, at).clip(1, len(sigmas) - 1)
    slope = (times[right] - times[right - 1]) / (sigmas[right] - sigmas[right - 1])
    worst = abs(times[right - 1] + slope * (at - sigmas[right - 1]) - expected).max()
    if not worst <= max(1e-5, 2 * precision) * abs(times).max():
        refuse(name, f"{time} is not a function of sigma alone: with another number of steps it is off by {worst:.3g}")
    return torch.from_numpy(sigmas), torch.from_numpy(times)


def _times(name: str, steps: list[Step], time: str) -> tuple[np.ndarray, np.ndarray, float]:
    """(times, sigmas, precision of the former), one of each per step."""
    values = [step.calls[0].arguments[time] for step in steps]
    times = np.array([value.flatten()[0].double().item() for value in values])
    sigmas = np.array([step.sigma for step in steps])
    if not np.isfinite(sigmas).all() or len(set(sigmas)) < 2:
        refuse(name, f"its scheduler's sigmas are {sigmas.tolist()}")
    return times, sigmas, torch.finfo(values[0].dtype).eps if values[0].is_floating_point() else 0.0


def find_output_map(name: str, steps: list[Step]) -> tuple[int, tuple[int, int, int] | None]:
    """(sign, part) that turn the transformer's output into the scheduler's velocity; see `Contract.output_part`."""
    outputs = [as_batch(step.calls[0].output) for step in steps]
    if any(output is None for output in outputs):
        refuse(name, f"its transformer returns a {type(steps[0].calls[0].output).__name__}, not a tensor")
    if not all(step.model_output.any() for step in steps):
        raise UserError(f"{name} has a transformer that returns only zeros: train it before distilling it.")
    tolerance = 1e-5 if outputs[0].dtype in (torch.float32, torch.float64) else 1e-2

    def fits(sign, part):
        for output, step in zip(outputs, steps, strict=True):
            output = output if part is None else output.narrow(*part)
            if output.numel() != step.sample.numel():
                return False
            if not relative_error(sign * output.reshape(step.sample.shape), step.model_output) <= tolerance:
                return False
        return True

    for part in _parts(outputs[0], steps[0].sample.numel()):
        for sign in (1, -1):
            if fits(sign, part):
                return sign, part
    refuse(
        name,
        "what its scheduler is given is not plus or minus the output of its transformer, so the network does not "
        "predict a flow velocity",
    )


def _parts(output: Tensor, numel: int) -> list[tuple[int, int, int] | None]:
    """The whole output, or its beginning or end along one dimension, where that has `numel` entries."""
    if output.numel() == numel:
        return [None]
    parts = []
    for dim in range(1, output.ndim):
        length, rest = divmod(numel * output.shape[dim], output.numel())
        if rest == 0 and 0 < length < output.shape[dim]:
            # counted from the end: what is before it, the text for instance, may be longer for another prompt
            parts += [(dim, 0, length), (dim, -length, length)]
    return parts


def find_slots(
    name: str, one: dict[str, Any], other: dict[str, Any], twice: dict[str, Any]
) -> tuple[dict[str, Slot], dict[str, Slot]]:
    """Where the samples are in the transformer's arguments: (what depends on the prompt, what does not).

    From one step with a prompt, one with another prompt and one with the first prompt `twice`. Arguments in neither
    are the same for all of them.
    """
    slots, repeated = {}, {}

    def look(a, b, two, path):
        differs = not same(a, b)
        if not differs and same(a, two):
            return
        slot = _slot(name, path, a, b, two)
        if slot is not None and differs:
            slots[path] = replace(slot, ragged=_ragged(name, path, slot, a, b), shape=tuple(slot.rows(a)[0].shape))
        elif slot is not None:
            repeated[path] = slot
        else:
            for key in a if isinstance(a, dict) else range(len(a)):
                look(a[key], b[key], two[key], f"{path}.{key}")

    if not one.keys() == other.keys() == twice.keys():
        odd = sorted((one.keys() ^ other.keys()) | (one.keys() ^ twice.keys()))
        refuse(name, f"its transformer is given {odd} for some prompts or batch sizes only")
    for key in one:
        look(one[key], other[key], twice[key], key)
    if not slots:
        refuse(name, "nothing that its transformer is given depends on the prompt")
    return slots, repeated


def _slot(name, path, one, other, twice) -> Slot | None:
    """Where the samples are in one argument; None for a container of which that has to be asked entry by entry."""
    kinds = {"None" if value is None else type(value).__name__ for value in (one, other, twice)}
    if kinds <= {"list", "tuple"} and len(one) == 1 and len(twice) == 2 and same([*one] * 2, list(twice), 1e-3):
        return Slot("list")
    if kinds <= {"list", "tuple"} and len(one) == len(other) == len(twice):
        return None
    if kinds == {"dict"} and one.keys() == other.keys() == twice.keys():
        return None
    if not all(isinstance(value, Tensor) for value in (one, other, twice)) or one.ndim != twice.ndim:
        kinds = " or ".join(sorted(kinds))
        refuse(name, f"its transformer's argument {path} depends on the prompt in an unknown way (it is {kinds})")
    grown = [dim for dim in range(one.ndim) if one.shape[dim] != twice.shape[dim]]
    if not grown:
        return Slot("shared")
    if (one.shape[grown[0]], twice.shape[grown[0]], len(grown)) != (1, 2, 1):
        shapes = f"{list(one.shape)} for one and {list(twice.shape)} for two"
        refuse(name, f"its transformer's argument {path} has no batch dimension: it is {shapes}")
    return Slot("tensor", grown[0])


def _ragged(name, path, slot: Slot, one, other) -> int | None:
    a, b = slot.rows(one)[0], slot.rows(other)[0]
    if not isinstance(a, Tensor) or a.ndim != b.ndim:
        refuse(name, f"its transformer's argument {path} depends on the prompt but is not made of tensors")
    dims = [dim for dim in range(a.ndim) if a.shape[dim] != b.shape[dim]]
    if len(dims) > 1:
        refuse(name, f"its transformer's argument {path} varies with the prompt in {len(dims)} dimensions")
    return dims[0] if dims else None


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


def same(a, b, tolerance: float = 0.0) -> bool:
    """Equal, for the kinds of values that pipelines hand to their transformers; tensors up to a relative error."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
            return False
        return torch.equal(a, b) or (tolerance > 0 and relative_error(a, b) <= tolerance)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], tolerance) for key in a)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    return a is b or a == b
