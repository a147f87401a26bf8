# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The blocks of a transformer: what is sharded, and what gets adapters."""

import torch

from hf_flowdistill.errors import UserError


def sharding_units(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of `transformer`: what is gathered, computed and released at a time where networks are sharded.

    They are the members of its lists of modules that diffusers says must not be split (`_no_split_modules`), or that
    have such a module inside if none is one, or all members where diffusers says nothing; lists inside a block do not
    count.
    """
    named = set(getattr(transformer, "_no_split_modules", None) or ())

    def is_named(member):
        return not named or type(member).__name__ in named

    return _members(transformer, is_named) or _members(
        transformer, lambda member: any(map(is_named, member.modules()))
    )


def _members(transformer, wanted) -> list[torch.nn.Module]:
    units, inside = [], set()
    for module in transformer.modules():  # outer modules come before inner ones
        if isinstance(module, torch.nn.ModuleList) and module not in inside:
            members = [member for member in module if wanted(member)]
            units += members
            inside.update(inner for member in members for inner in member.modules())
    return units


def linear_layers(transformer: torch.nn.Module, wanted: str | None = None) -> list[str]:
    """Full names of the linear layers of `transformer` that get a LoRA adapter.

    Args:
        wanted: comma-separated names, each a full one or the end of one, e.g. "to_k,to_q,to_v,to_out.0"; None is
            every linear layer in `sharding_units`: attention, feed-forward and modulation, whatever they are called.

    Raises:
        UserError: a name is that of no linear layer, or there is none in the blocks.
    """
    names = {module: name for name, module in transformer.named_modules() if type(module) is torch.nn.Linear}
    if wanted is None:
        inside = {module for unit in sharding_units(transformer) for module in unit.modules()}
        found = [name for module, name in names.items() if module in inside]
        if not found:
            raise UserError(
                f"{type(transformer).__name__} has no blocks with linear layers: name some in --lora_layers."
            )
        return found
    chosen = set()
    for end in (part.strip() for part in wanted.split(",")):
        found = {name for name in names.values() if f".{name}".endswith(f".{end}")}
        if not found:
            raise UserError(
                f"--lora_layers has {end!r}, which is the end of no linear layer's name in "
                f"{type(transformer).__name__}: one of them is {max(names.values(), key=len, default='none')}."
            )
        chosen |= found
    return [name for name in names.values() if name in chosen]
