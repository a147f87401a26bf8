# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""How many bytes live tensors take, by what they are, and when that is the most."""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_flowdistill.planning.ghosts import call, memory_of


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
        peaks: of each view, (`when`, `place`) at that time -> the `Peak` of it.
        when: what the present is called.
        place: more of it, which tells peaks apart.
    """

    def __init__(self, views: Sequence[Callable[[str], float]] = (lambda component: 1.0,)):
        super().__init__()
        self.views, self.shares = views, {}
        self.live, self.storages = Counter(), {}
        self.name, self.when, self.place = "activations", "", None
        self.totals = [0.0] * len(views)
        self.forget_peaks()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = call(func, args, kwargs or {})
        before = len(self.storages)
        for tensor in (output,) if isinstance(output, torch.Tensor) else tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._see(memory_of(tensor), self.name)
        if len(self.storages) > before:
            self._look()
        return output

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would cost as much as all the rest for every operation

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
            storage = memory_of(tensor)
            if id(storage) in self.storages:
                reference, old, size = self.storages[id(storage)]
                self._count(old, -size)
                self._count(name, size)
                self.storages[id(storage)] = reference, name, size
            else:
                self._see(storage, name)

    def forget_peaks(self) -> None:
        self.peaks: list[dict[tuple, Peak]] = [{} for _ in self.views]
        self.largest = [Counter() for _ in self.views]

    def _see(self, storage, name):
        key = id(storage)
        if key not in self.storages:
            reference = weakref.ref(storage, lambda _: self._gone(key))
            size = storage.nbytes()
            self.storages[key] = reference, name, size
            self._count(name, size)

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
            if total > self.largest[i][self.when, self.place]:
                self.largest[i][self.when, self.place] = total
                parts = {name: size * self._shares(name)[i] for name, size in self.live.items()}
                self.peaks[i][self.when, self.place] = Peak(
                    self.when, {name: size for name, size in parts.items() if size}
                )
