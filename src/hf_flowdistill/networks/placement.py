# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Where the networks of a pipeline are: on the accelerator, or in main memory and streamed from there."""

import contextlib
from collections.abc import Iterable

import torch


@contextlib.contextmanager
def streamed(modules: Iterable[torch.nn.Module], device):
    """Inside, `modules` compute on `device` with weights that come from main memory, layer by layer; then as before.

    With those that are on such a device already, nothing is done. What is computed is the same.
    """
    device = torch.device(device)
    waiting = [module for module in modules if waits(module, device)]
    if waiting:  # accelerate is there where anything trains
        from accelerate import cpu_offload
        from accelerate.hooks import remove_hook_from_submodules
    for module in waiting:
        cpu_offload(module, device, offload_buffers=bool(module._parameters))  # as diffusers' pipelines do
    try:
        yield
    finally:
        for module in waiting:
            remove_hook_from_submodules(module)


def waits(module: torch.nn.Module, device: torch.device) -> bool:
    """Whether the weights of `module` are in main memory, and it is to run on an accelerator."""
    return any(parameter.device.type != device.type for parameter in module.parameters())


def modules_of(pipeline) -> dict[str, torch.nn.Module]:
    """The networks among the components of `pipeline`, by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def has_room(size: float, memory: float) -> bool:
    """Whether text encoders of `size` bytes stay on an accelerator with `memory` bytes free while they encode.

    If not, they are streamed. Half as much again is left for what they compute.
    """
    return 1.5 * size <= memory


def place_text_encoders(pipeline, device) -> None:
    """Everything that encodes text to `device`, if there is room for it."""
    device = torch.device(device)
    encoders = [module for name, module in modules_of(pipeline).items() if name not in ("transformer", "vae")]
    size = sum(parameter.nbytes for module in encoders for parameter in module.parameters())
    if device.type != "cuda" or has_room(size, torch.cuda.mem_get_info(device)[0]):
        for module in encoders:
            module.to(device)


def move_all_but_transformer(pipeline, device) -> None:
    """Text encoders and VAE to `device`: they are needed before training and for decoding only."""
    for name, module in modules_of(pipeline).items():
        if name != "transformer":
            module.to(device)
