# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""One update of a training without values: the real turns on the real configuration, and the memory that they take.

Every tensor is a fake one (`torch._subclasses.FakeTensor`), with a shape and a storage but nothing in it, so twelve
billion parameters are rehearsed on any machine. What is counted are the storages of all tensors that operations
return; what an operation takes only inside itself, such as the workspace of a matrix product, is not.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_flowdistill.methods.sid import SiDBatch, SiDConfig, fake_score_turn, generator_turn
from hf_flowdistill.networks import Networks
from hf_flowdistill.skeleton import Shapes
from hf_flowdistill.teachers.arguments import Slot
from hf_flowdistill.teachers.conditioning import Conditioning
from hf_flowdistill.teachers.contract import Contract


@dataclass(frozen=True)
class Peak:
    """The moment at which the most memory is taken: when that is, and component -> bytes."""

    when: str
    components: Mapping[str, float]

    @property
    def bytes(self) -> float:
        return sum(self.components.values())


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all tensors that operations inside it return, for as long as these live.

    A tensor belongs to the component that `component` names while it is made, unless `assign` says otherwise later.

    Args:
        views: functions from a component to the share of it that counts, e.g. an eighth of what is sharded; there is a
            peak for each of them.

    Attributes:
        peaks: `Peak` of each view.
        when: what the peaks call the present.
    """

    def __init__(self, views: Sequence[Callable[[str], float]] = (lambda component: 1.0,)):
        super().__init__()
        self.views, self.shares = views, {}
        self.live, self.storages = Counter(), {}
        self.name, self.when = "activations", ""
        self.totals = [0.0] * len(views)
        self.peaks = [Peak("", {})] * len(views)
        self.largest = [0.0] * len(views)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        before = len(self.storages)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage(), self.name)
        if len(self.storages) > before:
            self._look()
        return output

    @contextlib.contextmanager
    def component(self, name: str):
        before, self.name = self.name, name
        try:
            yield
        finally:
            self.name = before

    def assign(self, tensors, name: str) -> None:
        """Count `tensors`, seen before or not, to the component called `name`."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) in self.storages:
                reference, old, size = self.storages[id(storage)]
                self._count(old, -size)
                self._count(name, size)
                self.storages[id(storage)] = reference, name, size
            else:
                self._see(storage, name)

    def forget_peaks(self) -> None:
        self.largest = [0.0] * len(self.views)

    def _see(self, storage, name):
        key = id(storage)
        if key not in self.storages:
            reference = weakref.ref(storage, lambda _: self._gone(key))
            self.storages[key] = reference, name, storage.nbytes()
            self._count(name, storage.nbytes())

    def _gone(self, key):
        _, name, size = self.storages.pop(key)
        self._count(name, -size)

    def _count(self, name, size):
        self.live[name] += size
        for i, share in enumerate(self._shares(name)):
            self.totals[i] += size * share

    def _shares(self, name):
        if name not in self.shares:
            self.shares[name] = [view(name) for view in self.views]
        return self.shares[name]

    def _look(self):
        for i, total in enumerate(self.totals):
            if total > self.largest[i]:
                self.largest[i] = total
                parts = {name: size * self._shares(name)[i] for name, size in self.live.items()}
                self.peaks[i] = Peak(self.when, {name: size for name, size in parts.items() if size})


def stand_in_contract(shapes: Shapes, *, height: int, width: int) -> Contract:
    """A contract with which the transformer is called with tensors of the right shapes, but nothing about values."""
    slots, repeated, static, time = {}, {}, {}, None
    name, shape = shapes.latent
    for key, value in shapes.call.items():
        tensor = isinstance(value, torch.Tensor)
        if key == name:
            continue
        if tensor and value.ndim < 2 and "time" in key:
            time = key
        elif key in shapes.conditioning:
            row = shapes.conditioning[key][0]
            dims = range(value.ndim) if tensor else ()
            dim = next((dim for dim in dims if tuple(value.select(dim, 0).shape) == row), 0)
            slots[key] = Slot("tensor" if tensor else "list", dim, None, row)
        else:
            if tensor and value.ndim == 1 and len(value) == shapes.batch:
                repeated[key], value = Slot("tensor"), value[:1]
            static[key] = value
    if time is None:
        raise NotImplementedError("no argument of the transformer is the time")
    dtypes = {key: shapes.call[key][0].dtype for key in slots}
    return Contract(
        pipeline_class="",
        transformer_class="",
        height=height,
        width=width,
        pipeline_kwargs={},
        latent_shape=shape,
        latent_argument=name,
        latent_input_shape=shape,
        latent_is_list=isinstance(shapes.call[name], (list, tuple)),
        time_argument=time,
        time_scale=1.0,
        time_offset=0.0,
        output_shape=shape,
        output_sign=1,
        output_part=None,
        dtype=torch.float32,
        slots=slots,
        repeated=repeated,
        static=static,
        dtypes=dtypes,
    )


def embeds_guidance(contract: Contract) -> bool:
    """Whether the transformer is given a number for each sample besides the time, as those with embedded guidance."""
    return any(contract.static[key].is_floating_point() for key in contract.repeated)


def rehearse(
    networks: Networks,
    average: torch.nn.Module,
    contract: Contract,
    build_optimizer: Callable,
    *,
    batch_size: int,
    config: SiDConfig,
    autocast: bool = False,
    autocast_cache: bool = True,
    foreach: bool | None = None,
    share_rollout: bool = False,
    views: Sequence[Callable[[str], float]] = (lambda component: 1.0,),
) -> list[Peak]:
    """A micro-batch that is not the first, and an update, of both networks; a peak for each view.

    So there are moments of Adam and gradients of the network whose turn it is, from the beginning.

    Components are "teacher", "generator", "fake score", "average of the generator", "Adam's moments", "gradients",
    "update" (what optimizers take besides) and "activations" (all else).

    Args:
        networks, average: on the meta device; their parameters are replaced by fake ones.
        contract: of `stand_in_contract`.
        build_optimizer: network -> its optimizer.
        config: of the turns, which stop at the generator's first sampler step: what others have before their last step
            runs without a graph, and leaves nothing.
        autocast: to bfloat16; with `autocast_cache`, a weight's copy in bfloat16 is kept until the backward pass.
        foreach: how Adam goes through the parameters; accelerators do it all at once, which takes more memory.
        views: as for `MemoryTracker`.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tracker = MemoryTracker(views)
    with tracker:
        named = {"teacher": networks.teacher, "generator": networks.generator, "fake score": networks.fake_score}
        named["average of the generator"] = average
        for name, network in named.items():
            with tracker.component(name):
                _fill(network, mode)
        optimizers = {}
        for name, network in networks.trained().items():
            optimizers[name] = _optimizer(tracker, network, build_optimizer, foreach)
        tracker.forget_peaks()
        turns = [("fake_score", fake_score_turn), ("generator", generator_turn)]
        x0 = None
        for turn, loss_of in turns[::-1] if share_rollout else turns:
            tracker.when = f"turn of the {turn.replace('_', ' ')}"
            _make_gradients(tracker, networks.trained()[turn])
            batch = _batch(mode, contract, batch_size)
            batch.x0 = x0
            with networks.training(turn):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=autocast_cache):
                    loss, _ = loss_of(networks, contract, batch, config)
                loss.backward()
            x0 = batch.x0 if share_rollout else None
            del batch, loss
            tracker.when = f"update of the {turn.replace('_', ' ')}"
            _update(tracker, optimizers[turn])
    return tracker.peaks


def _fill(network, mode) -> None:
    """Fake tensors in place of the parameters and buffers of a network on the meta device."""
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or tensor.device.type != "meta":
                    continue
                with mode:
                    made = torch.empty(tensor.shape, dtype=tensor.dtype)
                if isinstance(tensor, torch.nn.Parameter):
                    made = torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
                tensors[name] = made


def _optimizer(tracker, network, build_optimizer, foreach):
    """The optimizer of a network, with its moments."""
    optimizer = build_optimizer(network)
    if foreach is not None and type(optimizer) is torch.optim.Adam:
        for group in optimizer.param_groups:
            group["foreach"] = foreach
    _make_gradients(tracker, network)
    _update(tracker, optimizer)
    moments = (value for state in optimizer.state.values() for value in state.values())
    tracker.assign((value for value in moments if isinstance(value, torch.Tensor)), "Adam's moments")
    return optimizer


def _make_gradients(tracker, network) -> None:
    with tracker.component("gradients"):
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None


def _update(tracker, optimizer) -> None:
    with tracker.component("update"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _batch(mode, contract: Contract, size: int) -> SiDBatch:
    def made(*shape, dtype=torch.float32):
        with mode:
            return torch.zeros(*shape, dtype=dtype)

    def rows(number):
        return Conditioning(
            {key: made(number, *slot.shape, dtype=contract.dtypes[key]) for key, slot in contract.slots.items()}
        )

    return SiDBatch(
        conditional=rows(size),
        unconditional=rows(1),
        k=1,
        noises=lambda i: made(size, *contract.latent_shape),
        sigma=made(size),
        noise=made(size, *contract.latent_shape),
    )
