# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The passes of both turns, put together from what is around the networks and from the networks' calls.

What is around them is recorded once for a precision and a batch size, with stand-ins that take the memory of outputs
and gradients alone; every kind of call is recorded by itself (`calls`).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from hf_flowdistill.networks.roles import ROLES, Networks
from hf_flowdistill.planning.calls import BACKWARD, END, EXIT, FORWARD, RETURN, Call, Ghostly, Given
from hf_flowdistill.planning.ghosts import Ghost, Home, ghost, seen
from hf_flowdistill.planning.rehearsal import play
from hf_flowdistill.planning.traces import NotAlike, Recorder, Stay


RUN, BACK = "run", "back"  # regions of calls, `of` their numbers; others are parts of turns, `of` the turn


class Asked(NamedTuple):
    """A call as it is made: of which role, whether in its own turn, with gradient, and with which arguments."""

    role: str
    trained: bool
    grad: bool
    given: Given
    gradients: tuple | None = None  # of its outputs, `Ghostly`; None before it is known


@dataclass
class Place:
    """Where a call is among the rest.

    Attributes:
        asked: what is called.
        turn: in whose turn.
        arguments, outputs, gradients: stays of the arguments, the outputs and the outputs' gradients; None for those
            that are no ghosts, or were there before.
        input_gradient: the stay of it.
    """

    asked: Asked
    turn: str
    arguments: list[Stay | None]
    outputs: list[Stay | None] = field(default_factory=list)
    gradients: list[Stay | None] = field(default_factory=list)
    input_gradient: Stay | None = None


class Frame:
    """Both turns around the networks, recorded.

    Args:
        find: `Asked` -> the `Call`.
        dtypes: role -> in what its network is given arguments.
        settings: more of `play`.

    Attributes:
        regions, stays, places: what is recorded.
        faces: of the calls in it.

    Raises:
        NotAlike: a network's graph is not gone back through.
        Exception: by `find`.
    """

    def __init__(self, find: Callable[[Asked], Call], dtypes: dict[str, torch.dtype], contract, config, **settings):
        self.recorder, self.find, self.places = Recorder(), find, []
        networks = Networks(*(_StandIn(self, role, dtypes[role]) for role in ROLES))
        with self.recorder:
            play(networks, contract, config, self._stage, **settings)
            self.recorder.enter("end")
        self.regions, self.stays = self.recorder.regions, self.recorder.stays
        calls = [find(place.asked) for place in self.places]
        self.faces = [call.face for call in calls]
        gone_back = {region.of for region in self.regions if region.name == BACK}
        for number, call in enumerate(calls):
            if _graph(call) and number not in gone_back:
                raise NotAlike("a network has a graph that is not gone back through")

    def _stage(self, turn, part):
        self.turn, self.part = turn, part
        self.recorder.enter(part, turn)

    def run(self, role: str, anchor, args, kwargs):
        """What the network in this role returns."""
        asked = Asked(role, role == self.turn, torch.is_grad_enabled(), Given.of((args, kwargs)))
        call, recorder, number = self.find(asked), self.recorder, len(self.places)
        leaves = tree_leaves((args, kwargs))
        arguments = [recorder.find(leaf) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
        self.places.append(Place(asked, self.turn, arguments))
        recorder.enter(RUN, number)
        made = [tensor if tensor is None else seen(tensor) for tensor in call.returned.tensors()]
        self.places[-1].outputs = [tensor if tensor is None else recorder.find(tensor) for tensor in made]
        graph = _graph(call)
        if graph:
            x = [leaf for leaf in leaves if isinstance(leaf, Ghost) and leaf.requires_grad]
            outputs = _Back.apply(self, number, [made[i] for i in graph], anchor, *x)
            for i, output in zip(graph, outputs):
                made[i] = output
            outputs[0].grad_fn.register_prehook(lambda gradients: recorder.enter(BACK, number) and None)
            for tensor in x:
                tensor.grad_fn.register_prehook(lambda gradients: recorder.enter(self.part, self.turn) and None)
        recorder.enter(self.part, self.turn)
        return call.returned.filled(made)

    def back(self, number: int, gradients) -> Ghost | None:
        """The gradient of the input, from those of the outputs."""
        place = self.places[number]
        forms = tuple(Ghostly(one.form, i, one.home.size, False) for i, one in enumerate(gradients))
        place.asked = place.asked._replace(gradients=forms)
        place.gradients = [self.recorder.find(gradient) for gradient in gradients]
        call = self.find(place.asked)
        if call.input_gradient is None:
            return None
        form, _, size, _ = call.input_gradient[0]
        made = seen(ghost(form, Home(size)))
        place.input_gradient = self.recorder.find(made)
        return made


class _StandIn(torch.nn.Module):
    """A network that takes nothing besides its outputs and the gradient of its input."""

    def __init__(self, frame: Frame, role: str, dtype: torch.dtype):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
        self.frame, self.role = frame, role

    def forward(self, *args, **kwargs):
        return self.frame.run(self.role, self.anchor, args, kwargs)


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx, frame, number, made, anchor, *x):
        ctx.frame, ctx.number, ctx.inputs = frame, number, len(x)
        return tuple(made)

    @staticmethod
    def backward(ctx, *gradients):
        made = ctx.frame.back(ctx.number, gradients)
        return None, None, None, None, *([made] * ctx.inputs)


def _graph(call: Call) -> list[int]:
    """Which outputs have one."""
    return [i for i, leaf in enumerate(call.returned.leaves) if isinstance(leaf, Ghostly) and leaf.requires_grad]


def assemble(frame: Frame, calls: Sequence[Call], names: dict[str, str]) -> dict[tuple, int]:
    """(turn, part of it, (network, row of blocks) of the last block to start) -> the most bytes of activations then.

    Args:
        calls: in the places of the frame.
        names: role -> the network that it has the blocks of.
    """
    starts, bases, looks = _lie(frame, calls)
    parts = [*dict.fromkeys(part for part, *_ in looks)]
    networks = [*dict.fromkeys(names.values())]
    rows = max(len(call.regions) for call in calls)  # more than there are
    places = np.concatenate(
        [np.where(row < 0, row, row + rows * networks.index(names[role])) for _, role, row in looks]
    )
    lasts = np.maximum.accumulate(np.where(places >= 0, np.arange(len(places)), -1))
    places = np.where(lasts >= 0, places[lasts], -1) + 1
    part = np.repeat([parts.index(part) for part, *_ in looks], [len(row) for *_, row in looks])

    size, born, dead = (np.concatenate(arrays) for arrays in zip(*_stays(frame, calls, starts, bases)))
    moments = np.concatenate([born, np.minimum(dead, len(places)) + 1])
    live = np.cumsum(np.bincount(moments, np.concatenate([size, -size])))[1 : len(places) + 1].astype(int)
    codes = part * (rows * len(networks) + 1) + places
    codes, first, number = np.unique(codes, return_index=True, return_inverse=True)
    most = np.zeros(len(codes), int)
    np.maximum.at(most, number, live)
    found = {}
    for i in np.argsort(first).tolist():
        network, row = divmod(int(places[first[i]]) - 1, rows)
        place = None if network < 0 else (networks[network], row)
        found[(*parts[part[first[i]]], place)] = int(most[i])
    return found


def _lie(frame: Frame, calls):
    """Where regions begin, counted in looks from the first: of the frame's regions, and of each call's; and the looks,
    in pieces of (turn and part, role, row of the last block to start or -1)."""
    starts, looks, count = [], [], 0
    bases, last = [np.zeros(len(call.regions), int) for call in calls], None
    for region in frame.regions:
        if region.name in (RUN, BACK):
            place, call, name = frame.places[region.of], calls[region.of], {RUN: FORWARD, BACK: BACKWARD}[region.name]
            for number, inner in enumerate(call.regions):
                if inner.name == name:
                    bases[region.of][number] = count
                    looks.append((last, place.asked.role, call.rows[number]))
                    count += len(inner.places)
            starts.append(count)
        else:
            last = (region.of, region.name)
            starts.append(count)
            places = [None] if region.name == "update" else region.places  # the update comes in between
            looks.append((last, ROLES[0], np.full(len(places), -1)))
            count += len(places)
    for place, call, base in zip(frame.places, calls, bases):
        where = {(region.of, region.name): start for region, start in [*zip(frame.regions, starts)][::-1]}
        ends = {EXIT: where[place.turn, "backward"], END: where[place.turn, "update"]}
        returned = max((base[i] + len(r.places) for i, r in enumerate(call.regions) if r.name == FORWARD), default=0)
        gone_back = max((base[i] + len(r.places) for i, r in enumerate(call.regions) if r.name == BACKWARD), default=0)
        for number, region in enumerate(call.regions):
            if region.name not in (FORWARD, BACKWARD):
                base[number] = ends.get(region.name, gone_back or returned)
    return starts, bases, looks


def _stays(frame: Frame, calls, starts, bases):
    """(bytes, look in which it begins, last look) of all stays, in arrays."""
    for call, base in zip(calls, bases):
        size, born, look, dead, last = call.stays.T
        inside = np.array([region.name in (FORWARD, BACKWARD) for region in call.regions])
        yield size, base[born] + look, base[dead] + last * inside[dead]
    begins, ends, kept = _faces(frame, calls, bases)
    rows = []
    for stay in frame.stays:
        region, looks = stay.born
        begin = begins.get(id(stay), starts[region] + looks)
        end = 2**60
        if stay.dead is not None:
            name = frame.regions[stay.dead.region].name
            after = {RUN: 0, BACK: 0, "update": 1}  # what goes in an update has been there in it
            end = starts[stay.dead.region] + after.get(name, stay.dead.looks)
        rows.append((stay.size, begin, max(ends.get(id(stay), end), kept.get(id(stay), 0))))
    yield tuple(np.array(rows, int).reshape(-1, 3).T)


def _faces(frame: Frame, calls, bases) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
    """id of a stay of the frame -> the look in which it begins, where that is in a call; the last, where it ends in
    a call; and the one up to which a call keeps it.

    Raises:
        NotAlike: memory that counts from when a network looks at it.
    """
    begins, ends, kept = {}, {}, {}
    for number, (place, call, base) in enumerate(zip(frame.places, calls, bases)):
        at = functools.partial(_look, call, base)
        if any(stay is None and own and own.viewed for stay, own in zip(place.arguments, call.arguments)):
            raise NotAlike("a network looks at what nothing has made")
        pairs = [*zip(place.arguments, call.arguments), *zip(place.outputs, call.outputs)]
        for stay, own in pairs:
            if stay is not None and call.regions[own.dead.region].name != RETURN:
                kept[id(stay)] = max(kept.get(id(stay), 0), at(own.dead))
        begins |= {id(stay): at(own.born) for stay, own in zip(place.outputs, call.outputs) if stay is not None}
        for stay, own in zip(place.gradients, call.gradients):
            region = stay and stay.dead and frame.regions[stay.dead.region]
            if region and region.name == BACK and region.of == number:
                ends[id(stay)] = at(own.dead)
        if place.input_gradient is not None:
            begins[id(place.input_gradient)] = at(call.input_gradient[1].born)
    return begins, ends, kept


def _look(call: Call, base, moment) -> int:
    inside = call.regions[moment.region].name in (FORWARD, BACKWARD)
    return int(base[moment.region]) + moment.looks * inside
