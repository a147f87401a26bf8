# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""When memory comes and goes: noted once, and put together anew.

Time is counted in looks: one for every operation that takes new memory. They are in regions, stretches of what runs,
so that a region can be left out, or take the place of another.
"""

import weakref
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

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


@dataclass
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


def without(regions: list[Region], stays: list[Stay], block) -> tuple[list[Region], list[Stay]]:
    """Without the regions `of` a block that is between others like it, which are then next to each other.

    What enters that block and ends there stays for as long as what leaves it for one of them.

    Raises:
        NotAlike: these are not as many, or of other sizes.
    """
    left_out = {number for number, region in enumerate(regions) if region.of == block}
    enter, leave, kept = {}, {}, []
    for stay in stays:
        begins, ends = (moment is not None and moment.region in left_out for moment in (stay.born, stay.dead))
        if begins != ends:
            if stay.born is None:
                raise NotAlike("an argument of the network is no longer kept after a block")
            if begins and regions[stay.dead.region].of is None:
                continue  # its own, until the end of all blocks
            group = regions[stay.born.region].name
            (leave if begins else enter).setdefault((group, stay.size), []).append(stay)
        elif not begins:
            kept.append(stay)
    if {key: len(group) for key, group in enter.items()} != {key: len(group) for key, group in leave.items()}:
        raise NotAlike("a block keeps something else than the one before it")
    for key, group in enter.items():
        kept += [replace(stay, dead=last.dead) for stay, last in zip(group, leave[key])]
    regions = [
        Region(region.name, region.of) if number in left_out else region for number, region in enumerate(regions)
    ]
    return regions, kept
