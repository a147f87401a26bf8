# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""When memory comes and goes: noted once, and put together anew.

Time is counted in looks: one for every operation that takes new memory. They are in regions, stretches of what runs,
so that a region can be left out, or take the place of another.
"""

import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_flowdistill.planning.ghosts import call, memory_of


class NotAlike(Exception):
    """What runs does not consist of parts that are alike: it has to be rehearsed as a whole."""


class Moment(NamedTuple):
    """After so many looks of the region with this number."""

    region: int
    looks: int


@dataclass
class Region:
    """A stretch of what runs.

    Attributes:
        name: what runs.
        of: more of it, as the recorder of it has it.
        places: of every look, the row of blocks of which the last one has started; None before the first.
    """

    name: str
    of: Any = None
    places: list[int | None] = field(default_factory=list)


@dataclass(slots=True)
class Stay:
    """The memory of one tensor and its views. It counts in the looks from `born` (None: it was there) up to `dead`.

    Attributes:
        viewed: whether an operation returned it although it was there.
    """

    size: int
    born: Moment | None
    dead: Moment | None = None
    viewed: bool = False


class Recorder(TorchDispatchMode):
    """Notes the regions that run inside it, and the stays of all tensors that operations return.

    Attributes:
        regions, stays: what is noted.
        place: of the looks that come.
    """

    def __init__(self):
        super().__init__()
        self.regions, self.stays = [], []
        self.place: int | None = None
        self._live: dict[int, tuple] = {}

    def enter(self, name: str, of=None) -> int:
        """A new region begins; its number."""
        self.regions.append(Region(name, of))
        return len(self.regions) - 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = call(func, args, kwargs or {})
        born = None
        for tensor in (output,) if isinstance(output, torch.Tensor) else tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                memory = memory_of(tensor)
                if (known := self._live.get(id(memory))) is not None:
                    known[1].viewed = True
                else:
                    born = born or self._look()
                    self.stays.append(self.expect(memory, born))
        return output

    def _look(self) -> Moment:
        self.regions[-1].places.append(self.place)
        return self.now()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would cost as much as all the rest for every operation

    def expect(self, memory, born: Moment | None = None) -> Stay:
        """The stay of `memory`; it is none of `stays` if it was there before."""
        key = id(memory)
        if key not in self._live:
            stay = Stay(memory.nbytes(), born)
            self._live[key] = weakref.ref(memory, lambda _: self._gone(key)), stay
        return self._live[key][1]

    def find(self, tensor) -> Stay | None:
        return self._live.get(id(memory_of(tensor)), (None, None))[1]

    def _gone(self, key):
        _, stay = self._live.pop(key)
        stay.dead = self.now()

    def now(self) -> Moment:
        return Moment(len(self.regions) - 1, len(self.regions[-1].places))


SIZE, BORN, LOOK, DEAD, LAST = range(5)  # columns of a table of stays: bytes, and two moments


def table(stays: list[Stay]) -> np.ndarray:
    """[n, 5], of stays that begin and end."""
    return np.array([(stay.size, *stay.born, *stay.dead) for stay in stays], int).reshape(-1, 5)


def without(regions: list[Region], stays: np.ndarray, block) -> tuple[list[Region], np.ndarray]:
    """Without the regions `of` a block that is between others like it, which are then next to each other.

    What enters that block and ends there stays for as long as what leaves it for one of them.

    Args:
        stays: a `table`, in the order in which they begin.

    Raises:
        NotAlike: these are not as many, or of other sizes.
    """
    inside = np.array([region.of == block for region in regions])
    between = np.array([region.of is not None for region in regions])
    kind = np.unique([region.name for region in regions], return_inverse=True)[1]
    begins, ends = inside[stays[:, BORN]], inside[stays[:, DEAD]]
    enter = stays[~begins & ends]
    leave = stays[begins & ~ends & between[stays[:, DEAD]]]  # others are its own until the end of all blocks
    groups = [np.stack([kind[some[:, BORN]], some[:, SIZE]]) for some in (enter, leave)]
    orders = [np.lexsort(group) for group in groups]
    if not np.array_equal(*(group[:, order] for group, order in zip(groups, orders))):
        raise NotAlike("a block keeps something else than the one before it")
    enter = enter[orders[0]]
    enter[:, DEAD:] = leave[orders[1]][:, DEAD:]
    stays = np.concatenate([stays[~begins & ~ends], enter])
    stays = stays[np.lexsort((stays[:, LOOK], stays[:, BORN]))]
    regions = [Region(region.name, region.of) if gone else region for region, gone in zip(regions, inside)]
    return regions, stays
