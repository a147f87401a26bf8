# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Blocks that are alike take alike: the peaks of a transformer from those of few of its blocks."""

import copy
import itertools
from collections.abc import Callable, Sequence

import torch

from hf_flowdistill.networks.blocks import sharding_units
from hf_flowdistill.planning.memory_tracker import Peak


KEPT = 2  # of blocks in a row that are alike


def rehearse_blocks(transformer: torch.nn.Module, rehearse_one: Callable) -> list[Peak]:
    """The peaks of `transformer` for each view, from rehearsals with few of its blocks.

    Of blocks in a row that are alike two are kept, the first and the last, then three: what that adds to every
    component at the peak of a part of the update, each of the blocks left out adds as well.

    Args:
        rehearse_one: transformer -> what `rehearse` returns; called with transformers that it may use up.
    """
    rows = [length for *_, length in block_rows(transformer)]
    kept = [min(length, KEPT) for length in rows]
    base, added = rehearse_one(shortened(transformer, kept)), []
    for row, length in enumerate(rows):
        if length > KEPT:
            more = [number + (i == row) for i, number in enumerate(kept)]
            added.append((length - KEPT, rehearse_one(shortened(transformer, more))))
    return extrapolated(base, added)


def extrapolated(base, added: Sequence[tuple[int, list]]) -> list[Peak]:
    """The peak for each view, from those of all parts (what `rehearse` returns), and from (how many more blocks, those
    with one more)."""
    peaks = []
    for view, parts in enumerate(base):
        whole = []
        for part, peak in parts.items():
            components = dict(peak.components)
            for times, longer in added:
                other = longer[view][part].components
                for name in components.keys() | other.keys():
                    difference = other.get(name, 0) - peak.components.get(name, 0)
                    components[name] = components.get(name, 0) + times * difference
            whole.append(Peak(peak.when, components))
        peaks.append(max(whole, key=lambda peak: peak.bytes, default=Peak("", {})))
    return peaks


def block_rows(transformer: torch.nn.Module) -> list[tuple[torch.nn.ModuleList, int, int]]:
    """(list, start, length) of the blocks (`sharding_units`) in a row that are alike, to their parameters' shapes."""

    def alike(pair):
        block = pair[1]
        return repr(block), [tuple(parameter.shape) for parameter in block.parameters()], block in units

    rows, units = [], set(sharding_units(transformer))
    for module in transformer.modules():
        if isinstance(module, torch.nn.ModuleList) and units.intersection(module):
            for (*_, is_unit), row in itertools.groupby(enumerate(module), alike):
                row = list(row)
                rows += [(module, row[0][0], len(row))] if is_unit else []
    return rows


def shortened(transformer, lengths: Sequence[int] | None = None):
    """A copy of a transformer with so many blocks of each row; one of each by default."""
    rows, left_out = block_rows(transformer), {}
    for (blocks, start, length), kept in zip(rows, lengths or [1] * len(rows), strict=True):
        left_out.setdefault(blocks, set()).update(range(start + kept, start + length))
    memo = {  # what takes the place of a list of blocks in the copy
        id(blocks): torch.nn.ModuleList(copy.deepcopy(block) for i, block in enumerate(blocks) if i not in numbers)
        for blocks, numbers in left_out.items()
    }
    return copy.deepcopy(transformer, memo)
