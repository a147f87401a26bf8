# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Arguments of a transformer by path ("encoder_hidden_states", "rope.0", "attention_kwargs.mask"), and their rows.

A `Slot` says how one of them holds the samples of a batch. The other direction, one argument for a batch from its
rows, is here too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """Where the samples of a batch are in an argument.

    Attributes:
        kind: "tensor" (along `dim`), "list" (one entry per sample), or "shared" (no batch dimension: one value, which
            all samples of a call must have in common).
        dim: batch dimension of a tensor.
        ragged: dimension of a row whose length differs between prompts; None if rows have one shape.
        shape: of a row, in all dimensions but that one.
    """

    kind: str
    dim: int = 0
    ragged: int | None = None
    shape: tuple[int, ...] = ()

    def rows(self, value) -> list:
        """The samples in an argument, in order; the only one of a shared argument."""
        if self.kind == "tensor":
            return list(value.movedim(self.dim, 0))
        return list(value) if self.kind == "list" else [value]

    def fits(self, value) -> bool:
        """Whether the samples in an argument have the learned shape."""
        return value is not None and all(
            len(row.shape) == len(self.shape)
            and all(a == b for dim, (a, b) in enumerate(zip(row.shape, self.shape)) if dim != self.ragged)
            for row in self.rows(value)
        )

    def argument(self, rows: list) -> Any:
        """The argument that holds `rows`. All have one shape, unless they go into a list."""
        if self.kind == "tensor":
            return torch.stack(rows, dim=self.dim)
        return list(rows) if self.kind == "list" else rows[0]


def get(arguments: dict[str, Any], path: str) -> Any:
    """The entry of nested dicts, lists and tuples at `path`."""
    value = arguments
    for key in path.split("."):
        value = value[key] if isinstance(value, dict) else value[int(key)]
    return value


def put(arguments: dict[str, Any], path: str, entry: Any) -> dict[str, Any]:
    """A copy of `arguments` with `entry` at `path`; what lies beside the path is shared with the original."""
    return _replaced(arguments, path.split("."), entry)


def _replaced(value, keys: list[str], entry):  # no function inside `put`: one that calls itself keeps `entry` alive
    if not keys:
        return entry
    if isinstance(value, dict):
        return {**value, keys[0]: _replaced(value.get(keys[0]), keys[1:], entry)}
    index = int(keys[0])
    return type(value)(
        _replaced(item, keys[1:], entry) if position == index else item for position, item in enumerate(value)
    )


def pad(rows: list[Tensor]) -> Tensor:
    """Rows of different lengths as one tensor, zeros behind the shorter ones."""
    shape = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
    padded = rows[0].new_zeros(len(rows), *shape)
    for target, row in zip(padded, rows, strict=True):
        target[tuple(slice(size) for size in row.shape)] = row
    return padded
