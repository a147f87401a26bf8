# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""More numbers that a transformer is told: how far it jumps, and how it is guided. FreeFlow App. B.

Each is embedded as a time is, and added to the time's embedding, where `time_layers` has found it to end. The last
layers are zero at the start, so that the network begins as what it was, bit for bit.

The embeddings are a module of the network itself, `network.flow_map`: trained, saved, copied and averaged with it.
What is embedded belongs to one call, `velocity`, and elsewhere nothing is added. At sigma 1 and for fixed numbers,
what is added is a constant: `folded` puts it into the weights of the stock class.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_flowdistill.flow.draws import normal
from hf_flowdistill.teachers.precision import floating_dtype


JUMP, GUIDANCE = "jump", "guidance"
FREQUENCIES = 128


def sinusoids(numbers: Tensor) -> Tensor:
    """Cosines and sines of numbers [n] at frequencies from 1 down to 1/10000, [n, 256].

    The numbers are taken as they are: multiplied by 1000, as times are, their derivative would be a thousand times as
    large.
    """
    steps = torch.arange(FREQUENCIES, dtype=torch.float32, device=numbers.device) / FREQUENCIES
    angles = numbers[:, None] * torch.exp(-math.log(10000) * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class FlowMap(torch.nn.Module):
    """The embeddings of some numbers, and where they are added.

    Args:
        layers: full names of the transformer's, whose outputs they are added to.
        width: of these outputs.
        names: of the numbers.
        seed: of the first layers; the last ones are zero.
    """

    def __init__(self, layers: Sequence[str], width: int, names: Sequence[str], *, seed: int = 0):
        super().__init__()
        self.layers, self.width = list(layers), width
        self.embedders = torch.nn.ModuleDict()
        for name in names:
            first, last = torch.nn.Linear(2 * FREQUENCIES, width), torch.nn.Linear(width, width)
            for parameter in (first.bias, last.weight, last.bias):
                torch.nn.init.zeros_(parameter)
            with torch.no_grad():
                first.weight.copy_(0.02 * normal(first.weight.shape, seed, "flow map", name))  # as DiT's
            self.embedders[name] = torch.nn.Sequential(first, torch.nn.SiLU(), last)
        self.calls: list[Mapping[str, Tensor]] | None = None  # the numbers of those that are to come; None: no numbers
        self.numbers: Mapping[str, Tensor] | None = None  # of the call that runs

    def forward(self, numbers: Mapping[str, Tensor]) -> Tensor:
        """What is added for these numbers, each [n]: [n, width]."""
        dtype = next(self.parameters()).dtype
        return sum(embedder(sinusoids(numbers[name]).to(dtype)) for name, embedder in self.embedders.items())

    @contextlib.contextmanager
    def told(self, calls: Sequence[Mapping[str, Tensor]]):
        """Inside, the network is called as often as there are `calls`, with these numbers, each [n] for n samples."""
        self.calls = list(calls)
        try:
            yield
        finally:
            self.calls = self.numbers = None

    def begin(self, transformer, args) -> None:
        """Before a call of the transformer."""
        if self.calls is not None:
            self.numbers = self.calls.pop(0)

    def add(self, layer, args, output: Tensor) -> Tensor:
        """After a call of one of the layers, [n, ..., width]; of those that see several times of a sample, the samples
        come once for each time."""
        if self.numbers is None:
            return output
        added = self(self.numbers)
        added = added.repeat(len(output) // len(added), 1).reshape(-1, *[1] * (output.ndim - 2), self.width)
        return output + added.to(output.dtype)


def attach(network, layers: Sequence[str], names: Sequence[str], *, seed: int = 0, place=None) -> FlowMap:
    """Give `network`, a transformer or a role on one, the embeddings of the numbers called `names`.

    Args:
        layers: of `find_time_layers`.
        seed: of the first layers.
        place: (network, its flow map) -> the flow map where it is to be; by default where the network is.
    """
    transformer = transformer_of(network)
    width = transformer.get_submodule(layers[0]).out_features
    dtype = torch.float32 if transformer is not network else floating_dtype(network)
    flow_map = FlowMap(layers, width, names, seed=seed).to(dtype=dtype)
    flow_map = flow_map.to(next(transformer.parameters()).device) if place is None else place(network, flow_map)
    network.flow_map = flow_map
    # Bound methods and no closures: a copy of the network then has hooks of its own flow map.
    transformer.register_forward_pre_hook(flow_map.begin)
    for name in layers:
        transformer.get_submodule(name).register_forward_hook(flow_map.add)
    remember_in_checkpoints(network)
    return flow_map


def attach_as(network, other, place=None) -> None:
    """Give `network` a flow map of the kind of `other`'s, if that has one; its values are to be filled in."""
    if (theirs := flow_map_of(other)) is not None:
        attach(network, theirs.layers, list(theirs.embedders), place=place)


def flow_map_of(network) -> FlowMap | None:
    return getattr(network, "flow_map", None)


def transformer_of(network) -> torch.nn.Module:
    """The transformer itself, of a role (`networks.adapters.Role`) the one that it shares."""
    return network.shared.transformer if hasattr(network, "shared") else network


def velocity(network, contract, x_t: Tensor, sigma: Tensor, conditioning, **numbers: Tensor) -> Tensor:
    """`Contract.velocity` of a network that is told `numbers` too, each [B]; those without an embedding are left out.

    Gradient flows to the numbers as well.
    """
    flow_map = flow_map_of(network)
    if flow_map is None:
        return contract.velocity(network, x_t, sigma, conditioning)
    conditioning = conditioning.expand(len(x_t))
    told = {name: numbers[name] for name in flow_map.embedders}
    calls = [{name: values[rows] for name, values in told.items()} for rows in contract.groups(conditioning)]
    with flow_map.told(calls):
        return contract.velocity(network, x_t, sigma, conditioning)


@dataclass
class Recomputed:
    """diffusers' function for gradient checkpointing, with which a recomputed block is told what it was told before.

    Attributes:
        function: the one that does it otherwise.
        flow_maps: those on the transformer.
    """

    function: Callable
    flow_maps: list[FlowMap]

    def __call__(self, module, *args):
        kept = [flow_map.numbers for flow_map in self.flow_maps]

        def told(*args):
            before = [flow_map.numbers for flow_map in self.flow_maps]
            self._tell(kept)
            try:
                return module(*args)
            finally:
                self._tell(before)

        return self.function(told, *args)

    def _tell(self, numbers) -> None:
        for flow_map, values in zip(self.flow_maps, numbers):
            flow_map.numbers = values


def remember_in_checkpoints(network) -> None:
    """Where gradient checkpointing is on in `network`, recompute with the numbers of the call: some transformers embed
    their time inside of what is recomputed, when the call is long over."""
    transformer = transformer_of(network)
    flow_maps = [flow_map for flow_map, _ in _hooks(transformer)]
    for module in transformer.modules() if flow_maps else ():
        function = vars(module).get("_gradient_checkpointing_func")
        if function is not None:
            function = function.function if isinstance(function, Recomputed) else function
            module._gradient_checkpointing_func = Recomputed(function, list(dict.fromkeys(flow_maps)))


def _hooks(transformer) -> list[tuple[FlowMap, Callable]]:
    """(flow map, a function that removes its hook), of all hooks of flow maps on a transformer."""
    found = []
    for module in transformer.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                flow_map = getattr(hook, "__self__", None)
                if isinstance(flow_map, FlowMap):
                    found.append((flow_map, lambda hooks=hooks, key=key: hooks.pop(key)))
    return found


@torch.no_grad()
def folded(network, transformer, predict: Callable[[torch.nn.Module], object], **numbers: float) -> torch.nn.Module:
    """A transformer of the stock class that does at sigma 1 what `network` does there when it is told `numbers`.

    What is added to the outputs of the time's last layers is then a constant. It goes into their biases, or, of layers
    without, into the weights: W + added d^T, where d^T h = 1 for the input h that they have at sigma 1, and as short.

    Args:
        transformer: the network as a transformer of its own, see `networks.adapters.merged`; it is left as it is, and
            shares its weights with what is returned, but for these layers.
        predict: calls a transformer once, at sigma 1.
    """
    flow_map = flow_map_of(network)
    stock = copy.deepcopy(transformer, {id(p): p for p in transformer.parameters()})
    for _, remove in _hooks(stock):
        remove()
    stock._modules.pop("flow_map", None)
    if stock.is_gradient_checkpointing:
        stock.disable_gradient_checkpointing()
    told = {
        name: torch.tensor([numbers[name]], device=next(flow_map.parameters()).device) for name in flow_map.embedders
    }
    added = flow_map(told)[0]
    layers = {name: stock.get_submodule(name) for name in flow_map.layers}
    inputs = _inputs([layer for layer in layers.values() if layer.bias is None], lambda: predict(stock))
    for layer in layers.values():
        added = added.to(layer.weight)
        if layer.bias is not None:
            layer.bias = torch.nn.Parameter(layer.bias + added, requires_grad=False)
        else:
            h = torch.cat([one.flatten(0, -2) for one in inputs[layer]]).unique(dim=0).double()
            direction = (torch.linalg.pinv(h) @ h.new_ones(len(h))).to(added)
            layer.weight = torch.nn.Parameter(layer.weight + torch.outer(added, direction), requires_grad=False)
    return stock


def _inputs(layers: list[torch.nn.Module], predict: Callable[[], object]) -> dict[torch.nn.Module, list[Tensor]]:
    """What these layers are given in `predict`, which is not called for none."""
    found: dict[torch.nn.Module, list[Tensor]] = {layer: [] for layer in layers}
    hooks = [layer.register_forward_hook(lambda layer, args, _: found[layer].append(args[0])) for layer in layers]
    if layers:
        predict()
    for hook in hooks:
        hook.remove()
    return found
