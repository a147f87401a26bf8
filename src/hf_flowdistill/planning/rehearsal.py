# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""One update of a training without values: the real turns on the real configuration, and the memory that they take.

Blocks that are alike take alike, so a transformer is rehearsed with few of them (`few_blocks`).

Every tensor is a ghost (`ghosts`), with a shape and a size but nothing in it, so twelve
billion parameters are rehearsed on any machine. What is counted are the storages of all tensors that operations
return; what an operation takes only inside itself, such as the workspace of a matrix product, is not.

Components are "teacher", "generator", "fake score", "average of the generator", "Adam's moments", "gradients",
"update" (what optimizers take besides) and "activations" (all else). Those that are of an adapter have " (LoRA)"
behind their names, and the values of networks that are not trained, such as tables of positions, " (buffers)".
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from hf_flowdistill.methods.sid import SiDBatch, SiDConfig, fake_score_turn, generator_turn
from hf_flowdistill.networks.adapters import Role
from hf_flowdistill.networks.roles import ROLES, Networks
from hf_flowdistill.planning.few_blocks import block_rows
from hf_flowdistill.planning.ghosts import empty, seen
from hf_flowdistill.planning.memory_tracker import MemoryTracker, Peak
from hf_flowdistill.planning.skeleton import Shapes
from hf_flowdistill.teachers.arguments import Slot
from hf_flowdistill.teachers.conditioning import Conditioning
from hf_flowdistill.teachers.contract import Contract
from hf_flowdistill.training import optimizers


LORA, BUFFERS = " (LoRA)", " (buffers)"  # at the end of a component's name


def joined(components, *marks: str) -> Counter:
    """Component -> bytes, with those that have one of these `marks` behind their names counted to what they are of."""
    sizes = Counter()
    for name, size in components.items():
        for mark in marks:
            name = name.removesuffix(mark)
        sizes[name] += size
    return sizes


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
    autocast: Callable = contextlib.nullcontext,
    share_rollout: bool = False,
    views: Sequence[Callable[[str], float]],
) -> list[dict[tuple, Peak]]:
    """A micro-batch that is not the first, and an update, of both networks: for each view, part of it -> its peak.

    Parts are told apart by the turn, by forward and backward pass and update, and by the last kind of block to start.

    So there are moments of Adam and gradients of the network whose turn it is, from the beginning.

    Args:
        networks, average: on the meta device; their parameters are replaced by ghosts.
        contract: of `stand_in_contract`.
        build_optimizer: network -> its optimizer.
        config: of the turns, which stop at the generator's first sampler step: what others have before their last step
            runs without a graph, and leaves nothing.
        autocast: makes the context in which networks run forward.
        views: as for `MemoryTracker`; the components are in the text at the top.
    """
    tracker = MemoryTracker(views)
    with tracker, no_draws():
        _fill_networks(tracker, networks, average)
        built = {}
        for name, network in networks.trained().items():
            built[name] = _optimizer(tracker, network, build_optimizer)
        tracker.forget_peaks()

        def stage(turn, part):
            trained = networks.trained()[turn]
            tracker.when = WHEN[part].format(turn.replace("_", " "))
            if part == "forward":
                _make_gradients(tracker, trained)
            if part == "update":
                _update(tracker, built[turn], trained)

        play(networks, contract, config, stage, batch_size=batch_size, autocast=autocast, share_rollout=share_rollout)
    return tracker.peaks


WHEN = {
    "forward": "forward pass of the {}'s turn",
    "backward": "backward pass of the {}'s turn",
    "update": "update of the {}",
}


def play(networks, contract, config, stage, *, batch_size: int, autocast: Callable, share_rollout: bool) -> None:
    """The passes of a micro-batch of both turns; arguments as for `rehearse`.

    Args:
        stage: called with the turn, and with what of it begins: a key of `WHEN`.
    """
    turns = [("fake_score", fake_score_turn), ("generator", generator_turn)]
    x0 = None
    for turn, loss_of in turns[::-1] if share_rollout else turns:
        stage(turn, "forward")
        batch = _batch(contract, batch_size)
        batch.x0 = x0
        with networks.training(turn):
            with autocast():
                loss, _ = loss_of(networks, contract, batch, config)
            stage(turn, "backward")
            loss.backward()
        x0 = batch.x0 if share_rollout else None
        del batch, loss
        stage(turn, "update")


def _fill_networks(tracker, networks: Networks, average) -> None:
    """Ghosts of parameters and buffers in all networks, counted to their components; their blocks' places noted."""
    named = {"generator": networks.generator, "fake score": networks.fake_score}
    named["average of the generator"] = average
    for name, network in named.items():
        with tracker.component(name + _mark(network)):
            fill(network)
        if not isinstance(network, Role):
            tracker.assign(network.buffers(), name + BUFFERS)
    teacher = networks.teacher  # after the adapters, which are inside where they share it
    transformer = teacher.shared.transformer if isinstance(teacher, Role) else teacher
    with tracker.component("teacher"):
        fill(transformer)
    tracker.assign(transformer.buffers(), "teacher" + BUFFERS)
    for name in ROLES:
        network = getattr(networks, name)
        if name == "teacher" or not isinstance(network, Role):  # other roles are on the teacher
            _note_places(tracker, name, network)


def _note_places(tracker, name, network) -> None:
    """Tell `tracker` which kind of block of the network called `name` starts."""

    def note(row):
        def hook(block, args):
            tracker.place = name, row

        return hook

    network = network.shared.transformer if isinstance(network, Role) else network
    for row, (blocks, start, length) in enumerate(block_rows(network)):
        for block in blocks[start : start + length]:
            block.register_forward_pre_hook(note(row))


def _mark(network) -> str:
    return LORA if isinstance(network, Role) else ""


def fill(network) -> None:
    """Ghosts in place of the parameters and buffers of a network on the meta device."""
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or tensor.device.type != "meta":
                    continue
                made = seen(empty(tensor.shape, tensor.dtype))
                if isinstance(tensor, torch.nn.Parameter):
                    made = torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
                tensors[name] = made


@contextlib.contextmanager
def no_draws():
    """Stochastic rounding draws numbers for every parameter, which would take most of the time, and counts no bytes of
    them: inside, it draws none."""
    drawn, optimizers.half_words = optimizers.half_words, lambda *args: NO_DRAWS
    try:
        yield
    finally:
        optimizers.half_words = drawn


NO_DRAWS = torch.zeros((), dtype=torch.int32)


def _optimizer(tracker, network, build_optimizer):
    """The optimizer of a network, with its moments; accelerators update all parameters at once, which takes more."""
    optimizer = build_optimizer(network)
    if type(optimizer) is torch.optim.Adam:
        for group in optimizer.param_groups:
            group["foreach"] = True
    _make_gradients(tracker, network)
    _update(tracker, optimizer, network)
    moments = (value for state in optimizer.state.values() for value in state.values())
    tracker.assign((value for value in moments if isinstance(value, torch.Tensor)), "Adam's moments" + _mark(network))
    return optimizer


def _make_gradients(tracker, network) -> None:
    with tracker.component("gradients" + _mark(network)):
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None


def _update(tracker, optimizer, network) -> None:
    with tracker.component("update" + _mark(network)):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _batch(contract: Contract, size: int) -> SiDBatch:
    def made(*shape, dtype=torch.float32):
        return seen(empty(shape, dtype))

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
