# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Sizes by formula: of a network, and of all that a process keeps for as long as it trains."""

import math
from typing import NamedTuple

import torch

from hf_flowdistill.networks.blocks import linear_layers
from hf_flowdistill.networks.roles import FULL, RoleSettings
from hf_flowdistill.training.optimizers import ROUNDINGS


def count(module: torch.nn.Module) -> tuple[int, int]:
    """(parameters, values saved with them that are not trained, such as a table of positions)."""
    saved = module.state_dict().keys()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return parameters, sum(buffer.numel() for name, buffer in module.named_buffers() if name in saved)


class _Trained(NamedTuple):
    """What is trained of a network, all of it or an adapter: sizes of parameters, and values that are not trained."""

    name: str
    sizes: list[int]
    others: int
    dtype: torch.dtype
    shards: int = 1


def training_memory(
    transformer,
    dtype: torch.dtype,
    roles: RoleSettings = FULL,
    shards: int = 1,
    *,
    bf16_rounding: str = ROUNDINGS[0],
    use_8bit_adam: bool = False,
) -> list[tuple[str, str, float]]:
    """(what, precision, bytes) of all that a process keeps for as long as it trains, activations aside.

    The weights of the networks are in `dtype`, but for a quantized teacher; adapters and the average are float32.
    Gradients are in the dtype of what is trained, and there for one network at a time.

    Args:
        roles, bf16_rounding, use_8bit_adam: as for `Networks.from_teacher` and `build_optimizer`.
        shards: over how many processes each network is sharded; adapters are whole on each, and so are values that are
            not trained.

    Raises:
        UserError: as `linear_layers`.
    """
    parameters, others = count(transformer)
    whole = _Trained("{}", [parameter.numel() for parameter in transformer.parameters()], others, dtype, shards)
    adapter = _Trained("adapter of the {}", adapter_sizes(transformer, roles), 0, torch.float32)
    kinds = {"full": (whole, whole), "lora_fake": (whole, adapter), "lora": (adapter, adapter)}[roles.networks]
    trained = dict(zip(("generator", "fake score"), kinds))
    teacher = (dtype_name(dtype), (parameters / shards + others) * dtype.itemsize)
    if roles.base_quantization != "none":
        teacher = (roles.base_quantization, _quantized_size(transformer, dtype, roles.base_quantization))
    values = [sum(kind.sizes) / kind.shards + kind.others for kind in kinds]
    weights = [
        (kind.name.format(name), dtype_name(kind.dtype), size * kind.dtype.itemsize)
        for (name, kind), size in zip(trained.items(), values)
    ]
    moments = [
        (f"Adam's moments of the {name}", *_moments(kind, bf16_rounding, use_8bit_adam))
        for name, kind in trained.items()
    ]
    gradients = max((sum(kind.sizes) * kind.dtype.itemsize / kind.shards, dtype_name(kind.dtype)) for kind in kinds)
    return [
        ("teacher", *teacher),
        *weights,
        ("average of the generator", "float32", values[0] * 4),
        *moments,
        ("gradients of one network", *reversed(gradients)),
    ]


def adapter_sizes(transformer, roles: RoleSettings) -> list[int]:
    """Numbers of values of the parameters of one adapter; no numbers without adapters."""
    layers = [transformer.get_submodule(name) for name in roles.layers(transformer)]
    return [roles.rank * size for layer in layers for size in (layer.in_features, layer.out_features)]


def _quantized_size(transformer, dtype: torch.dtype, kind: str) -> int:
    """Bytes of a transformer whose blocks' linear layers are quantized: values and their scales; and of the rest."""
    layers = [transformer.get_submodule(name) for name in linear_layers(transformer)]
    sizes = [(layer.weight.numel(), layer.out_features) for layer in layers]
    if kind == "nf4":  # one float32 for every 64 values
        quantized = sum(math.ceil(size / 2) + 4 * math.ceil(size / 64) for size, _ in sizes)
    else:  # one float32 for every row
        quantized = sum(size + 4 * rows for size, rows in sizes)
    return quantized + (sum(count(transformer)) - sum(size for size, _ in sizes)) * dtype.itemsize


def _moments(kind: _Trained, bf16_rounding: str, use_8bit_adam: bool) -> tuple[str, float]:
    """(precision, bytes) of Adam's two moments; bitsandbytes keeps those of fewer than 4,096 values in float32."""
    if use_8bit_adam:
        return "8bit", sum(2 * size + 8 * math.ceil(size / 256) if size >= 4096 else 8 * size for size in kind.sizes)
    dtype = kind.dtype if bf16_rounding == "nearest" else torch.float32
    return dtype_name(dtype), 2 * sum(kind.sizes) * dtype.itemsize / kind.shards


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
