# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Networks of ghosts that are called, and what they and their optimizers take besides."""

import contextlib
import copy
from collections.abc import Callable
from typing import NamedTuple

import torch

from hf_flowdistill.networks.adapters import Role
from hf_flowdistill.networks.roles import RoleSettings
from hf_flowdistill.planning.few_blocks import block_rows
from hf_flowdistill.planning.ghosts import Ghost, empty, memory_of
from hf_flowdistill.planning.rehearsal import fill, no_draws
from hf_flowdistill.planning.traces import Recorder
from hf_flowdistill.teachers.precision import cast, floating_dtype


class Actor:
    """A transformer of ghosts in `dtype`, whole, or with an adapter where `roles` says that the teacher is shared.

    Attributes:
        rows: of `block_rows`.
        network: what is trained: the transformer, or the role with the adapter.
        plain: the transformer as it is, which is a role too where it has an adapter.
        input_dtype: of what they are given.
    """

    def __init__(self, transformer, dtype: torch.dtype, roles: RoleSettings | None):
        with torch.device("meta"):
            transformer = cast(copy.deepcopy(transformer).eval(), dtype).requires_grad_(False)
            self.rows, self.transformer = block_rows(transformer), transformer
            self.saved = set(transformer.state_dict())
            self.plain = self.network = transformer
            if roles is not None:
                shared = roles.share(transformer)
                self.network, self.plain = shared.add("adapter"), Role(shared)
        self.input_dtype = floating_dtype(self.plain)
        self.network.requires_grad_(False)
        self.adapter = {id(module) for module in self.network.modules()} if roles is not None else set()
        fill(transformer)
        self.parameters = [*self.network.parameters()]
        self._memories = [memory_of(tensor) for tensor in (*transformer.parameters(), *transformer.buffers())]

    def memories(self):
        """Of all parameters, their gradients, and buffers."""
        yield from self._memories
        for parameter in self.parameters:
            if parameter.grad is not None:
                yield memory_of(parameter.grad)

    @contextlib.contextmanager
    def ready(self, plain: bool, trained: bool, checkpointed: bool):
        """The network, or the plain one, trained or frozen, with its activations kept or computed a second time."""
        network = self.plain if plain else self.network
        for parameter in self.parameters if trained else ():
            parameter.requires_grad_(True).grad = empty(parameter.shape, parameter.dtype)
        if checkpointed:
            network.enable_gradient_checkpointing()
        try:
            yield network
        finally:
            for parameter in self.parameters if trained else ():
                parameter.requires_grad_(False).grad = None
            if checkpointed:
                self.transformer.disable_gradient_checkpointing()
                if isinstance(network, Role):
                    network.shared.checkpointed.clear()

    def trained(self, left_out: frozenset) -> list[torch.nn.Parameter]:
        """What is trained of the network, without that in the blocks `left_out`."""
        inside = {id(parameter) for block in self._blocks(left_out) for parameter in block.parameters()}
        return [parameter for parameter in self.parameters if id(parameter) not in inside]

    def sizes(self, left_out: frozenset, average: bool = False) -> tuple[int, int]:
        """Bytes of the transformer's parameters, without those of an adapter, and of its buffers, without those in the
        blocks `left_out`; of its average, which is in float32."""
        skipped = self.adapter | {id(module) for block in self._blocks(left_out) for module in block.modules()}
        sizes = [0, 0]
        for prefix, module in self.transformer.named_modules():
            for number, store in enumerate((module._parameters, module._buffers)):
                for name, tensor in store.items() if id(module) not in skipped else ():
                    if tensor is None or not (number or isinstance(tensor, Ghost)):
                        continue
                    saved = (f"{prefix}.{name}" if prefix else name) in self.saved
                    wide = average and saved and tensor.is_floating_point()
                    sizes[number] += tensor.numel() * 4 if wide else memory_of(tensor).nbytes()
        return sizes[0], sizes[1]

    def _blocks(self, left_out: frozenset):
        for row, number in left_out:
            blocks, start, _ = self.rows[row]
            yield blocks[start + number]


class Update(NamedTuple):
    """What the optimizer of a network takes, in bytes.

    Attributes:
        moments, gradients: as long as it trains, and in the turn of the network.
        taken: at the peak of an update, besides; None where no update takes anything.
    """

    moments: int
    gradients: int
    taken: int | None


class _Network(NamedTuple):
    trained: list[torch.nn.Parameter]

    def parameters(self):
        return iter(self.trained)


def measure_update(parameters, build_optimizer: Callable) -> Update:
    """Of an optimizer (`build_optimizer(network)`) of parameters of these shapes, in its second update."""
    network = _Network([torch.nn.Parameter(empty(one.shape, one.dtype)) for one in parameters])
    recorder, optimizer = Recorder(), build_optimizer(network)
    if type(optimizer) is torch.optim.Adam:  # accelerators update all parameters at once, which takes more
        for group in optimizer.param_groups:
            group["foreach"] = True
    with recorder, no_draws():
        for step in ("first", "second"):
            for parameter in network.parameters():
                recorder.expect(memory_of(parameter))
                parameter.grad = empty(parameter.shape, parameter.dtype)
                recorder.expect(memory_of(parameter.grad))
            recorder.enter(step)
            optimizer.step()
            gradients = sum(memory_of(parameter.grad).nbytes() for parameter in network.parameters())
            optimizer.zero_grad(set_to_none=True)
    state = [value for kept in optimizer.state.values() for value in kept.values() if isinstance(value, torch.Tensor)]
    moments = {id(memory_of(value)): memory_of(value).nbytes() for value in state}
    own = {id(recorder.find(value)) for value in state}
    looks = len(recorder.regions[1].places)
    live = [0] * (looks + 1)
    for stay in recorder.stays:
        if id(stay) not in own:
            begin = stay.born.looks if stay.born.region == 1 else 0
            end = looks if stay.dead is None else stay.dead.looks if stay.dead.region == 1 else -1
            for look in range(begin, end + 1):
                live[look] += stay.size
    return Update(sum(moments.values()), gradients, max(live[1:], default=None))
