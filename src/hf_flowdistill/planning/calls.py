# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""One call of a network, its backward pass included, recorded by itself: what it takes while it runs and in between.

A network is called many times in the ways of training a teacher, and in few kinds of calls.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from hf_flowdistill.planning.ghosts import Ghost, Home, empty, form_of, ghost, memory_of
from hf_flowdistill.planning.traces import NotAlike, Recorder, Region, Stay, table, without


# Regions, in order; `of` a block is (row, number in the row).
FORWARD, RETURN, EXIT, BACKWARD, INPUT, END = "forward", "return", "exit", "backward", "input", "end"


class Ghostly(NamedTuple):
    """A ghost among arguments or outputs: its form, and which of the homes there it has, of how many bytes."""

    form: tuple
    home: int
    size: int
    requires_grad: bool


@dataclass(frozen=True)
class Given:
    """Arguments or outputs of a call, without their tensors.

    Attributes:
        leaves: `Ghostly`, or any other value as it is.
        key: tells them from others.
    """

    leaves: tuple
    spec: TreeSpec
    key: tuple

    @classmethod
    def of(cls, values) -> "Given":
        found, spec = tree_flatten(values)
        homes, leaves, key = {}, [], []
        for leaf in found:
            told = leaf
            if isinstance(leaf, Ghost):
                number = homes.setdefault(id(leaf.home), len(homes))
                leaf = told = Ghostly(leaf.form, number, leaf.home.size, leaf.requires_grad)
            elif isinstance(leaf, torch.Tensor):
                with no_dispatch(), torch.no_grad():  # which nobody sees, and which keeps nothing
                    leaf = leaf.clone()
                    told = form_of(leaf), leaf.flatten().view(torch.uint8).numpy().tobytes()
            leaves.append(leaf)
            key.append((type(leaf), told))
        return cls(tuple(leaves), spec, (str(spec), *key))

    def tensors(self) -> list[torch.Tensor | None]:
        """New tensors of the leaves; None for other values."""
        homes = {leaf.home: Home(leaf.size) for leaf in self.leaves if isinstance(leaf, Ghostly)}
        with no_dispatch(), torch.no_grad():
            return [
                ghost(leaf.form, homes[leaf.home])
                if isinstance(leaf, Ghostly)
                else leaf.clone()
                if isinstance(leaf, torch.Tensor)
                else None
                for leaf in self.leaves
            ]

    def filled(self, tensors: Sequence) -> Any:
        """The values, with `tensors` in the places of its own."""
        leaves = [leaf if tensor is None else tensor for leaf, tensor in zip(self.leaves, tensors)]
        return tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class Call:
    """What is recorded of a call.

    Attributes:
        regions, stays: of memory that is taken in the forward and backward pass, but for outputs and gradients of
            inputs; a `table`.
        arguments: of each leaf of the arguments, its stay, if it is a tensor.
        outputs, returned: the same of what is returned; and its form.
        gradients: the same of the gradients of the outputs, which are used up.
        input_gradient: its `Ghostly` and stay, if there is one.
        forms: of the gradients of the outputs.
    """

    regions: list[Region]
    stays: np.ndarray
    arguments: list[Stay | None]
    outputs: list[Stay | None]
    returned: Given
    gradients: list[Stay]
    input_gradient: tuple[Ghostly, Stay] | None
    forms: tuple[Ghostly, ...]

    @property
    def face(self):
        """What is seen of it from outside."""
        return self.returned.key, self.input_gradient and self.input_gradient[0]

    @functools.cached_property
    def rows(self) -> list[np.ndarray]:
        """Of the looks of every region, the row of the last block to start; -1 for none."""
        return [np.array([-1 if row is None else row for row in one.places], int) for one in self.regions]

    def without(self, blocks: Collection) -> "Call":
        """The same of a network without these `blocks`, each of which is between others like it.

        Raises:
            NotAlike: as `traces.without`, or what is given or returned begins or ends in one of them.
        """
        regions, stays = self.regions, self.stays
        for block in blocks:
            regions, stays = without(regions, stays, block)
        gone = {number for number, region in enumerate(regions) if region.of in blocks}
        faces = [*self.arguments, *self.outputs, *self.gradients]
        faces += [self.input_gradient[1]] if self.input_gradient else []
        if any(moment and moment.region in gone for face in faces if face for moment in (face.born, face.dead)):
            raise NotAlike("what a network is given or returns begins or ends in one of its blocks")
        return replace(self, regions=regions, stays=stays)


class _Input(torch.autograd.Function):
    """In place of what an argument was made from: notes its gradient."""

    @staticmethod
    def forward(ctx, anchor, made, noted):
        ctx.noted = noted
        return made.pop()

    @staticmethod
    def backward(ctx, gradient):
        ctx.noted(gradient)
        return None, None, None


class _Output(torch.autograd.Function):
    """In place of all that an output is used for: gives the gradients that `make` makes."""

    @staticmethod
    def forward(ctx, make, *outputs):
        ctx.make = make
        return empty(())

    @staticmethod
    def backward(ctx, gradient):
        return None, *ctx.make()


def record(network, given: Given, grad: bool, autocast: Callable, gradients: tuple | None, actor) -> Call:
    """Call a network on ghosts, and go back through it if there is a graph.

    Args:
        network: filled with ghosts, as it is called in training; those of its parameters that are trained have
            gradients.
        given: its arguments.
        grad, autocast: whether it is called with gradient, and makes the context besides.
        gradients: of the outputs that have a graph, `Ghostly`; None for contiguous ones.
        actor: whose network it is (`actors.Actor`).

    Raises:
        NotAlike: something outlives the call, or more than one argument has a gradient.
    """
    recorder, inputs, roots = Recorder(), [], []
    tensors = given.tensors()
    arguments = [None if tensor is None else recorder.expect(memory_of(tensor)) for tensor in tensors]
    _give_gradients(given, tensors, recorder, inputs)
    with _blocks_noted(recorder, actor.rows), recorder, torch.set_grad_enabled(grad):
        for memory in actor.memories():
            recorder.expect(memory)
        recorder.enter(FORWARD)
        args, kwargs = given.filled(tensors)
        del tensors
        with autocast():
            output = network(*args, **kwargs)
            leaves, returned = tree_leaves(output), Given.of(output)
            outputs = [recorder.find(leaf) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
            recorder.enter(RETURN)
            with_graph = [leaf for leaf in leaves if isinstance(leaf, Ghost) and leaf.requires_grad]
            gradients = gradients or tuple(_plain(leaf, number) for number, leaf in enumerate(with_graph))
            root = _Output.apply(lambda: _made(gradients, recorder, roots), *with_graph) if with_graph else None
            del args, kwargs, output, leaves, with_graph
            recorder.enter(EXIT)
        if root is not None:
            root.backward()
        recorder.enter(END)
        del root
    faces = {id(stay) for stay in [*outputs, *roots, *(stay for _, stay in inputs)] if stay}
    stays = [stay for stay in recorder.stays if recorder.regions[stay.born.region].name in (FORWARD, BACKWARD)]
    stays = [stay for stay in stays if id(stay) not in faces]
    if any(stay.dead is None or recorder.regions[stay.dead.region].name == RETURN for stay in stays):
        raise NotAlike("what a network makes outlives its call")
    if any(stay.dead is None for stay in [*arguments, *outputs, *roots] if stay):
        raise NotAlike("what a network is given or returns outlives its call")
    if any(stay.born is None for stay in outputs if stay) or any(stay.born is None for _, stay in inputs):
        raise NotAlike("a network returns what it was given")
    return Call(
        recorder.regions, table(stays), arguments, outputs, returned, roots, inputs[0] if inputs else None, gradients
    )


def _give_gradients(given: Given, tensors: list, recorder, inputs: list) -> None:
    """Make the argument that has a gradient one with a graph; its gradient is noted in `inputs`."""
    wanted = [place for place, leaf in enumerate(given.leaves) if isinstance(leaf, Ghostly) and leaf.requires_grad]
    if len(wanted) > 1:
        raise NotAlike("several arguments of a network have gradients")

    def noted(gradient):
        inputs.append((Ghostly(gradient.form, 0, gradient.home.size, False), recorder.find(gradient)))

    for place in wanted:
        anchor = torch.zeros(1, requires_grad=True)
        tensors[place] = _Input.apply(anchor, [tensors[place]], noted)
        tensors[place].grad_fn.register_prehook(lambda gradients: recorder.enter(INPUT) and None)


def _plain(tensor, home: int) -> Ghostly:
    made = empty(tensor.shape, tensor.dtype)
    return Ghostly(made.form, home, made.home.size, False)


def _made(gradients, recorder, roots: list) -> list[Ghost]:
    homes = {}
    made = [ghost(one.form, homes.setdefault(one.home, Home(one.size))) for one in gradients]
    roots += [recorder.expect(tensor.home) for tensor in made]
    recorder.enter(BACKWARD)
    return made


@contextlib.contextmanager
def _blocks_noted(recorder: Recorder, rows):
    """A region for every block, in the forward and in the backward pass; and the row of the last block to start."""
    hooks = []
    for row, (blocks, start, length) in enumerate(rows):
        for number in range(length):
            before, after = _hooks(recorder, (row, number))
            hooks.append(blocks[start + number].register_forward_pre_hook(before))
            hooks.append(blocks[start + number].register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hooks(recorder: Recorder, block: tuple[int, int]):
    def before(module, args):  # once more where activations are recomputed
        recorder.place = block[0]
        if recorder.regions[-1].name == FORWARD:
            recorder.enter(FORWARD, block)

    def after(module, args, kwargs, output):
        if recorder.regions[-1].name == FORWARD:
            for node in _nodes(output) - _nodes((args, kwargs)):
                node.register_prehook(back)

    def back(gradients):
        if recorder.regions[-1].of != block:
            recorder.enter(BACKWARD, block)

    return before, after


def _nodes(values) -> set:
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
    return {tensor.grad_fn for tensor in tensors} - {None}
