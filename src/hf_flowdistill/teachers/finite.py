# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Numbers that are not finite, found where they arise: which component makes them, and what helps."""

import contextlib
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_flowdistill.errors import UserError
from hf_flowdistill.teachers.watch import Step, first_output


def is_finite(value: Any) -> bool:
    """Whether all numbers in tensors, arrays, and lists, tuples and dicts of them are."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, np.ndarray):
        return bool(np.isfinite(value).all())
    if isinstance(value, dict):
        return is_finite(list(value.values()))
    return not isinstance(value, (list, tuple)) or all(map(is_finite, value))


def has_nan(value: Any) -> bool:
    """The same of NaN alone: masks may hold an infinity by design."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and bool(value.isnan().any())
    if isinstance(value, dict):
        return has_nan(list(value.values()))
    return isinstance(value, (list, tuple)) and any(map(has_nan, value))


def not_finite(pipeline, component: str) -> UserError:
    """That `component`, an attribute of the pipeline or "text encoders", makes numbers that are not finite."""
    parts = {component: getattr(pipeline, component, None)}
    if component == "text encoders":
        parts = {name: part for name, part in pipeline.components.items() if "encoder" in name}
    parts = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    made = f"{type(pipeline).__name__} makes numbers that are not finite in its {component}"
    for name, part in parts.items():
        for weight, tensor in part.named_parameters():
            if not tensor.is_meta and not tensor.detach().isfinite().all():
                return UserError(f"{made}, whose weight {name}.{weight} is not finite: get its files again.")
    return UserError(f"{made}{advice(parts)}.")


def advice(parts: dict[str, torch.nn.Module]) -> str:
    """The end of a sentence about what overflows: what dtype may be better, if the weights are in a short one."""
    dtypes = {next((p.dtype for p in part.parameters() if p.is_floating_point()), None) for part in parts.values()}
    if torch.float16 in dtypes:
        return ", in float16: use bfloat16 or float32"
    if torch.bfloat16 in dtypes:
        return ", in bfloat16: use float32"
    return ", in float32: it is broken, or its settings are not those it was made for; choose another"


def check_watched(pipeline, steps: list[Step], images) -> None:
    """Refuse a watched call in which a number is not finite.

    Raises:
        UserError: naming the component where the first one arose.
    """
    calls = [call for step in steps for call in step.calls]
    if any(has_nan(call.arguments) for call in calls):
        latent_too = has_nan(steps[0].sample) if steps else False
        fed = {name for name, value in steps[0].calls[0].arguments.items() if has_nan(value)} if steps else set()
        raise not_finite(pipeline, "text encoders" if fed and not latent_too else "transformer")
    if not all(is_finite(call.output) for call in calls):
        raise not_finite(pipeline, "transformer")
    if isinstance(images, np.ndarray) and not is_finite(images):
        raise not_finite(pipeline, "vae")


@contextlib.contextmanager
def finite_images(pipeline):
    """Inside, a pipeline that decodes what is not finite raises, instead of painting it black.

    Raises:
        UserError: the VAE makes such numbers, or is given some by the transformer.
    """
    vae = getattr(pipeline, "vae", None)
    if not hasattr(vae, "decode"):
        yield
        return
    own, decode = vae.__dict__.get("decode"), vae.decode

    @functools.wraps(decode)
    def checked(*args, **kwargs):
        if not is_finite([*args, *kwargs.values()]):
            raise not_finite(pipeline, "transformer")
        output = decode(*args, **kwargs)
        if not is_finite(first_output(output)):
            raise not_finite(pipeline, "vae")
        return output

    vae.decode = checked
    try:
        yield
    finally:
        if own is None:
            del vae.decode
        else:
            vae.decode = own
