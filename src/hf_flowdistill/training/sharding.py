# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Networks that are larger than one accelerator: their parameters in shards, by PyTorch's FSDP2."""

import copy
import functools
import os
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from hf_flowdistill.errors import UserError
from hf_flowdistill.networks.adapters import Role, without_adapters
from hf_flowdistill.networks.blocks import sharding_units
from hf_flowdistill.networks.flow_map import attach_as
from hf_flowdistill.networks.roles import plain_copy
from hf_flowdistill.teachers.precision import cast, floating_dtype
from hf_flowdistill.training.distributed import local


def process_group_backend() -> str:
    """Of the processes' group: what waits in main memory is reduced there too."""
    return "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "nccl"  # the latter is the default


def count_shards(kind: str, processes: int) -> int:
    """In how many parts networks are, for a plan of `processes`; machines have 8 where the launcher does not say."""
    machine = min(processes, int(os.environ.get("LOCAL_WORLD_SIZE", 8)))
    return {"none": 1, "full": processes, "hybrid": machine}[kind]


class Sharding:
    """How networks lie on the processes: whole on each of them, or in shards.

    Args:
        kind: "none": every process holds networks whole. "full": every process holds a part of each parameter (FSDP2),
            and the blocks of `networks.blocks.sharding_units` are gathered one at a time, to be computed and released.
            "hybrid": so within a machine, and every machine holds the same.
        device: of this process.
        cpu_offload: what `copy` makes, and so its gradients and the states of its optimizer, waits in main memory.

    Raises:
        UserError: "hybrid" without knowing which processes share a machine.

    A sharded network has every parameter as a DTensor. Its gradients are reduced in float32, and optimizers are made
    of its parameters like of any others. Modules that are added to it later, which adapters are, stay whole.
    """

    def __init__(self, kind: str, device, *, cpu_offload: bool = False):
        self.mesh, self.device = None, torch.device(device)
        self.offload = CPUOffloadPolicy(pin_memory=self.device.type != "cpu") if cpu_offload else OffloadPolicy()
        self.shells = weakref.WeakKeyDictionary()  # sharded network -> the same without values, not sharded
        if kind == "none":
            return
        if not dist.is_initialized():  # one process, which may still want to offload
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        size = dist.get_world_size()
        if kind == "full":
            self.mesh = init_device_mesh(self.device.type, (size,), mesh_dim_names=("shard",))
            return
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1 if size == 1 else 0))
        if not on_this_machine or size % on_this_machine:
            raise UserError(
                "hybrid sharding needs equally many processes on every machine, and a launcher that tells how many "
                "(LOCAL_WORLD_SIZE): launch with accelerate or torchrun, or use --sharding full."
            )
        self.mesh = init_device_mesh(
            self.device.type, (size // on_this_machine, on_this_machine), mesh_dim_names=("replicate", "shard")
        )

    @property
    def is_main(self) -> bool:
        """Whether this process holds whole weights before they are sharded, and after they are gathered."""
        return self.mesh is None or dist.get_rank() == 0

    def load(self, load: Callable):
        """The pipeline that `load(**components)` reads, in main memory, but for a sharded transformer on the device.

        Only the main process reads the transformer's weights, into main memory. The others have only what they hold
        of it, so all networks together are in main memory once and not once for each process.

        Raises:
            UserError: on all processes, what `load` raises on the main one.
        """
        if self.mesh is None:
            return load()
        pipeline, message = None, [None]
        if self.is_main:
            try:
                pipeline = load()
                message = [_hollow(pipeline.transformer, torch.device("meta"))]
            except UserError as error:
                message = [error]
        dist.broadcast_object_list(message, src=0)
        if isinstance(message[0], UserError):
            raise message[0]
        if not self.is_main:
            pipeline = load(transformer=message[0])
        pipeline.transformer = self.shard(pipeline.transformer)
        return pipeline

    def shard(self, network: torch.nn.Module) -> torch.nn.Module:
        """A sharded network with the main process's weights; on the others, `network` may be on the meta device."""
        sharded = self._assemble(_hollow(network, torch.device("meta")), OffloadPolicy())
        self.fill(sharded, network.state_dict() if self.is_main else {})
        return sharded

    def fill(self, network: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
        """Put whole `weights` into `network`; of a sharded one only the main process needs to have them."""
        if network not in self.shells:
            network.load_state_dict(weights)
            return
        set_model_state_dict(
            network, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        )

    def release(self, pipeline, dtype: torch.dtype) -> torch.nn.Module:
        """The pipeline's transformer, to be used with weights of `dtype`; still in main memory if it is not sharded.

        It leaves an empty transformer of its class behind, with which the pipeline still encodes and decodes: without
        its weights on the device, and each process by itself, where a sharded one would have all come together.
        """
        transformer = pipeline.transformer
        pipeline.transformer = _hollow(self.shells.get(transformer, transformer), self.device, empty=True)
        if self.mesh is None:
            return cast(transformer, dtype)
        if dtype != floating_dtype(transformer):  # it has run, and the buffers of its precision are there
            transformer = self._twin(transformer, dtype, OffloadPolicy())
        return transformer

    def copy(self, network: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
        """A copy to train; of a sharded network, each process copies what it holds."""
        if network not in self.shells:
            return plain_copy(network, dtype)
        twin = self._twin(network, dtype, self.offload).requires_grad_(True)
        # What the reduction's precision is, is settled when a unit is first gathered, and only for what is to be
        # trained: the generator's first pass is one without gradient.
        for module in twin.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
                module.reshard()
        return twin

    def gather(self, network: torch.nn.Module) -> torch.nn.Module | None:
        """`network` whole and in main memory, on the main process; None on the others. All have to call it.

        Of a role, a role on a base that is whole.
        """
        if self.mesh is None:
            return network
        sharded = network.shared.transformer if isinstance(network, Role) else network
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(sharded, options=options)
        if not self.is_main:
            return None
        gathered = copy.deepcopy(self.shells[sharded]).requires_grad_(False)
        if sharded is network:
            attach_as(gathered, network)
        gathered.load_state_dict(without_adapters(weights), assign=True)
        return network.on(gathered) if isinstance(network, Role) else gathered

    def add(self, network: torch.nn.Module, module: torch.nn.Module, *, offload=None) -> torch.nn.Module:
        """`module`, which `network` is to have too, on the device; in shards where that is a sharded one of `copy`."""
        if network not in self.shells:
            return module.to(self.device)
        offload = self.offload if offload is None else offload
        module.to("cpu" if isinstance(offload, CPUOffloadPolicy) else self.device)
        fully_shard(module, **self._settings(offload))
        module.unshard()  # as in `copy`
        module.reshard()
        return module

    def _twin(self, network, dtype, offload):
        twin = self._assemble(self.shells[network], offload, dtype)
        attach_as(twin, network, functools.partial(self.add, offload=offload))
        with torch.no_grad():
            for mine, theirs in zip(twin.state_dict().values(), network.state_dict().values(), strict=True):
                local(mine).copy_(local(theirs))
        return twin

    def _settings(self, offload) -> dict:
        """Of `fully_shard`."""
        return {
            "mesh": self.mesh,
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
            "offload_policy": offload,
            # For the outermost unit too: after a pass without gradient it would stay whole, for the average and the
            # optimizer to find.
            "reshard_after_forward": True,
        }

    def _assemble(self, shell, offload, dtype=None):
        """A sharded network of the architecture of `shell`, with any values."""
        network = copy.deepcopy(shell)
        if dtype is not None:
            cast(network, dtype)
        buffers = dict(network.named_buffers(remove_duplicate=False))
        settings = self._settings(offload)
        for unit in [*_units_of_another_dtype(network), *sharding_units(network), network]:
            name = type(unit).__name__  # by which the contract and `sharding_units` tell it
            type(fully_shard(unit, **settings)).__name__ = name
        network.to_empty(device="cpu" if isinstance(offload, CPUOffloadPolicy) else self.device)
        for name, buffer in buffers.items():
            owner, _, last = name.rpartition(".")
            setattr(network.get_submodule(owner), last, buffer.to(self.device))
        self.shells[network] = shell
        return network


def _units_of_another_dtype(network: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules that a class keeps in float32 in a network of lower precision: a unit has one dtype, so each is its own.

    Raises:
        UserError: a weight beside others is kept so.
    """
    dtype, units, inside = floating_dtype(network), [], set()
    for module in network.modules():  # outer modules come before inner ones
        weights = list(module.parameters())
        if weights and module not in inside and all(weight.dtype != dtype for weight in weights):
            units.append(module)
            inside.update(module.modules())
    for module in network.modules():
        own = module._parameters.values() if module not in inside else ()
        if any(weight is not None and weight.dtype != dtype for weight in own):
            raise UserError(
                f"{type(network).__name__} keeps some weights in float32, which shards in "
                f"{str(dtype).removeprefix('torch.')} cannot have: train it with --mixed_precision bf16 instead of "
                "--weight_dtype bfloat16, or without --sharding."
            )
    return units


def _hollow(network: torch.nn.Module, device, *, empty: bool = False) -> torch.nn.Module:
    """A copy of `network` with its buffers but without its parameters' values, or, if `empty`, even their shapes."""

    def hollow(parameter):
        tensor = torch.empty(0 if empty else parameter.shape, dtype=parameter.dtype, device=device)
        return torch.nn.Parameter(tensor, requires_grad=parameter.requires_grad)

    return copy.deepcopy(network, {id(parameter): hollow(parameter) for parameter in network.parameters()})
