# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the loaders of diffusers and transformers report of weight files, heard: they would fill gaps at random."""

import contextlib
import functools
import logging
from pathlib import Path

import diffusers
import torch
import transformers

from hf_flowdistill.errors import UserError, first_line


logger = logging.getLogger(__name__)


@contextlib.contextmanager
def complete_weights(where):
    """Inside, a network whose file lacks a weight, or has one of another shape, raises; surplus ones are logged.

    It holds for every `from_pretrained` of both libraries, so also for those that a pipeline's makes of its
    components; everything is loaded once. Tied weights, and those that a class says it can do without, are not
    missing, nor is the projection of a language model to its vocabulary, which no encoder of a text uses.

    Args:
        where: what is loaded, a folder or an id on the Hub, for the message.

    Raises:
        UserError: with the name of the component and of the first such weight, or what else its loader says.
    """
    bases = (diffusers.ModelMixin, transformers.PreTrainedModel)
    own = {base: base.__dict__["from_pretrained"] for base in bases}
    try:
        for base, method in own.items():
            base.from_pretrained = classmethod(_heard(where, method.__func__, base))
        yield
    finally:
        for base, method in own.items():
            base.from_pretrained = method


def _heard(where, load, base):
    @functools.wraps(load)
    def from_pretrained(cls, path, *args, output_loading_info=False, **kwargs):
        name = kwargs.get("subfolder") or Path(str(path)).name
        if base is transformers.PreTrainedModel:  # whose own error names no weight
            kwargs.setdefault("ignore_mismatched_sizes", True)
        try:
            network, report = load(cls, path, *args, output_loading_info=True, **kwargs)
        except (UserError, OSError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of the file's format, of a shape
            reason = first_line(error).partition(" If you want to instead")[0]  # advice for who writes the call
            raise UserError(f"the component {name} of {where} does not load: {reason}") from error
        _check(where, name, network, report)
        return (network, report) if output_loading_info else network

    return from_pretrained


def _check(where, name: str, network, report) -> None:
    missing = sorted(set(report["missing_keys"]) - _vocabulary_head(network))
    mismatched = sorted(report["mismatched_keys"])
    surplus = sorted(report["unexpected_keys"])
    if missing:
        raise UserError(
            f"the component {name} of {where} lacks {_count(missing)} of its {type(network).__name__}, "
            f"{missing[0]} for one, which would be made up: get its files again."
        )
    if mismatched:
        weight, found, wanted = mismatched[0]
        raise UserError(
            f"the component {name} of {where} has {weight} of shape {list(found)}, where its configuration says "
            f"{list(wanted)}: get its files again."
        )
    if surplus:
        logger.warning(
            f"the component {name} of {where} has {_count(surplus)} that its {type(network).__name__} does not use, "
            f"{surplus[0]} for one"
        )


def _vocabulary_head(network) -> set[str]:
    """The names of the weights that turn a language model's hidden states into words."""
    head = network.get_output_embeddings() if isinstance(network, transformers.PreTrainedModel) else None
    own = set() if head is None else {id(parameter) for parameter in head.parameters()}
    return {name for name, parameter in network.named_parameters(remove_duplicate=False) if id(parameter) in own}


def _count(names: list) -> str:
    return f"{len(names)} weight{'s' * (len(names) > 1)}"
