# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The files of a checkpoint: networks and optimizers, whole or in shards; either can be read into the other.

Whole, each network is a safetensors file and each optimizer one of `torch.save`. In shards, they are one state of
`torch.distributed.checkpoint`, of which every process writes what it holds.
"""

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from hf_flowdistill.errors import first_line
from hf_flowdistill.training.distributed import copy_whole, is_distributed


def are_sharded(networks: dict) -> bool:
    """Whether one of `networks`, modules or mappings of tensors, has a sharded parameter."""
    return any(isinstance(tensor, DTensor) for network in networks.values() for tensor in tensors_of(network).values())


def tensors_of(network) -> dict[str, torch.Tensor]:
    """What is saved of a module or of a mapping of tensors: the tensors themselves, not copies."""
    tensors = network.state_dict() if isinstance(network, torch.nn.Module) else network
    return {name: tensor.detach() for name, tensor in tensors.items()}


def write_whole(folder: Path, networks: dict, optimizers: dict) -> None:
    """One file for each; for one process, and networks that are not sharded."""
    for name, network in networks.items():
        if isinstance(network, torch.nn.Module):
            save_model(network, str(folder / f"{name}.safetensors"))
        else:
            save_file(
                {key: tensor.contiguous() for key, tensor in tensors_of(network).items()},
                folder / f"{name}.safetensors",
            )
    for name, optimizer in optimizers.items():
        torch.save(optimizer.state_dict(), folder / f"{name}_optimizer.pt")


def read_whole(folder: Path, networks: dict, optimizers: dict) -> None:
    """Read what `write_whole` wrote, on every process, into networks and optimizers that may be sharded."""
    for name, network in networks.items():
        file = folder / f"{name}.safetensors"
        if isinstance(network, torch.nn.Module) and not are_sharded({name: network}):
            load_model(network, str(file))
        else:
            saved = load_file(file)
            for key, target in tensors_of(network).items():
                copy_whole(target, saved[key])
    for name, optimizer in optimizers.items():
        saved = torch.load(folder / f"{name}_optimizer.pt", map_location="cpu", weights_only=True)
        for index, parameter in enumerate(_parameters(optimizer)):
            for key, value in saved["state"].get(index, {}).items():
                if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                    saved["state"][index][key] = target = torch.zeros_like(parameter, dtype=value.dtype)
                    copy_whole(target, value)
        optimizer.load_state_dict(saved)


def write_shards(folder: Path, networks: dict, optimizers: dict) -> None:
    """Every process writes its share; all call this.

    Raises:
        OSError: on all processes, if one of them could not.
    """
    state = {
        f"{name}.{key}": tensor for name, network in networks.items() for key, tensor in tensors_of(network).items()
    }
    for name, optimizer in optimizers.items():
        for index, values in optimizer.state_dict()["state"].items():
            state |= {f"{name}_optimizer.{index}.{key}": value for key, value in values.items()}
    try:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder))
    except CheckpointException as error:
        raise OSError(_reason(error)) from error


def read_shards(folder: Path, networks: dict, optimizers: dict) -> None:
    """Read what `write_shards` wrote, on any number of processes, into networks that may be sharded or whole.

    Raises:
        OSError: if it cannot be read, or is of other networks.
    """
    reader = dcp.FileSystemReader(folder)
    state = {
        f"{name}.{key}": tensor for name, network in networks.items() for key, tensor in tensors_of(network).items()
    }
    places = {}  # key -> where in an optimizer's state it belongs
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        name, index, value = _place(key)
        if name in optimizers:
            parameter = _parameters(optimizers[name])[index]
            places[key] = name, index, value
            state[key] = _room(stored, parameter)
    try:
        with warnings.catch_warnings():  # that one process reads all of it, as it is meant to
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(state, storage_reader=reader, no_dist=not is_distributed())
    except CheckpointException as error:
        raise OSError(_reason(error)) from error
    for name, optimizer in optimizers.items():
        loaded = {}
        for key, (owner, index, value) in places.items():
            if owner == name:
                loaded.setdefault(index, {})[value] = state[key]
        optimizer.load_state_dict({**optimizer.state_dict(), "state": loaded})


def _parameters(optimizer) -> list[torch.Tensor]:
    """In the order in which the optimizer's state numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _place(key: str) -> tuple[str, int, str] | tuple[None, None, None]:
    """(optimizer, number of the parameter, name of the value) of a key that is of an optimizer."""
    owner, _, rest = key.partition("_optimizer.")
    index, _, value = rest.partition(".")
    return (owner, int(index), value) if index.isdigit() else (None, None, None)


def _room(stored, parameter: torch.Tensor):
    """What a value of an optimizer's state is read into: laid out as its parameter, if it has the same shape."""
    if not isinstance(stored, TensorStorageMetadata):
        return None
    if stored.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=stored.properties.dtype, requires_grad=False)
    return torch.zeros(stored.size, dtype=stored.properties.dtype)


def _reason(error: CheckpointException) -> str:
    return first_line(next(iter(error.failures.values()))[0]) if error.failures else first_line(error)
