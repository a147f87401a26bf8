# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""In which precision a network is, as diffusers loads it, and on which grid it sees the time there."""

from collections.abc import Callable

import torch
from torch import Tensor


def is_kept(network: torch.nn.Module, name: str) -> bool:
    """Whether diffusers loads the weight called `name` in float32, whatever the precision of the rest
    (`_keep_in_fp32_modules` of the class)."""
    kept = getattr(network, "_keep_in_fp32_modules", None) or []
    return not set([kept] if isinstance(kept, str) else kept).isdisjoint(name.split("."))


def cast(network: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """`network`, in place, in `dtype`, as diffusers would have loaded it.

    Parameters and saved buffers are cast, but for what the class keeps in float32. Buffers that are not saved, such as
    tables of frequencies, are no weights: diffusers makes them anew in float32, and so they stay as they are.
    """
    saved = network.state_dict().keys()
    for prefix, module in network.named_modules():
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                name = f"{prefix}.{key}" if prefix else key
                if tensor is None or name not in saved:
                    continue
                value = tensor.detach().to(cast_dtype(network, name, tensor, dtype))
                if isinstance(tensor, torch.nn.Parameter):
                    tensor.data = value  # the same parameter
                else:
                    store[key] = value
    return network


def cast_dtype(network: torch.nn.Module, name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What the weight called `name` is in where `network` is in `dtype`."""
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if is_kept(network, name) else dtype


def floating_dtype(network: torch.nn.Module) -> torch.dtype:
    """Of what `network` is given: that of its first weight, but for those that its class keeps in float32; a role
    (`networks.adapters.Role`) says it, since its adapter may have another."""
    said = getattr(network, "input_dtype", None)
    weights = ((name, weight.dtype) for name, weight in network.named_parameters() if weight.is_floating_point())
    return said or next(dtype for name, dtype in weights if not is_kept(network, name))


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {  # what a network sees of the time that it is given, float32 [n]
    "bfloat16": lambda time: time.bfloat16().float(),
    "1000 times in bfloat16": lambda time: (1000 * time.bfloat16()).float() / 1000,
}
LEAST = 2.0**-20  # relative to the largest time: below, there are no more levels


def seen_times(rounding: str, lowest: float, highest: float) -> Tensor:
    """The times from `lowest` to `highest` that a network sees as they are, [n] in float32, increasing.

    Only these: for any of them x_t, made at its noise level, and the network, which is given it, agree. Those between
    are taken for one of them, and for which one depends on what is done before the network.
    """
    see, largest = ROUNDINGS[rounding], max(abs(lowest), abs(highest))
    times = torch.arange(0, 2**15, dtype=torch.int16).view(torch.bfloat16).float()  # all that are not negative
    times = see(times[(times <= 2 * largest) & (times >= largest * LEAST)])
    times = torch.cat([times, -times]).unique()
    return times[(see(times) == times) & (times >= lowest) & (times <= highest)]


def find_rounding(tell_apart: Callable[[float, float], bool], lowest: float, highest: float) -> str | None:
    """Which of `ROUNDINGS` a network does, or None: told from pairs of times that a rounding makes one.

    None too where the network tells no times apart at all.

    Args:
        tell_apart: whether the network's outputs at two times differ in any bit.
        lowest, highest: times of noise and of data, in order.
    """
    times = seen_times("bfloat16", lowest, highest)
    times = times[times.abs() > 0.5 * times.abs().max()]
    if not tell_apart(float(times[0]), float(times[-1])):
        return None
    if any(tell_apart(float(time), float(time) * (1 + 2.0**-11)) for time in times[1:-1:40]):
        return None  # a pair of these is one number in bfloat16
    for rounding in [name for name in ROUNDINGS if name != "bfloat16"]:
        seen = ROUNDINGS[rounding](times)
        alike = (seen[1:] == seen[:-1]).nonzero().flatten().tolist()[:2]
        if alike and not any(tell_apart(float(times[i]), float(times[i + 1])) for i in alike):
            return rounding
    return "bfloat16"


def snap(levels: Tensor, values: Tensor) -> Tensor:
    """The nearest of `levels`, [n] and increasing, to each of `values`, in their dtype and on their device."""
    levels = levels.to(values.device, values.dtype)
    right = torch.searchsorted(levels, values.contiguous()).clamp(1, len(levels) - 1)
    low, high = levels[right - 1], levels[right]
    return torch.where(values - low < high - values, low, high)
