# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What is on an accelerator before training: while a contract is learned, and while texts are encoded.

Weights come from main memory layer by layer there (`networks.placement.streamed`), but for text encoders, which stay
while they encode if there is room (`networks.placement.has_room`).
"""

from dataclasses import dataclass, replace

import torch
import transformers
from torch.utils._pytree import tree_map_only

from hf_flowdistill.networks.placement import has_room
from hf_flowdistill.planning.few_blocks import shortened
from hf_flowdistill.planning.ghosts import empty, seen
from hf_flowdistill.planning.memory_tracker import MemoryTracker
from hf_flowdistill.planning.rehearsal import fill
from hf_flowdistill.planning.skeleton import Shapes


PROMPTS_AT_ONCE = 16  # that are encoded
REPLAYED_AT_ONCE = 6  # samples of the transformer's, when a contract is checked


@dataclass(frozen=True)
class Start:
    """Bytes of one process, all networks in float32.

    Attributes:
        encoders: the weights of all text encoders.
        layer: the weights of the largest layer of any network.
        encoding: what encoding sixteen prompts takes besides weights.
        learning: what any network takes besides weights, in learning a contract and decoding an image.
        shard: what there is of a sharded transformer all the time.
    """

    encoders: float
    layer: float
    encoding: float
    learning: float
    shard: float = 0.0

    def bytes(self, memory: float) -> float:
        """The most at a time, on an accelerator with `memory` bytes."""
        weights = self.encoders if has_room(self.encoders, memory - self.shard) else self.layer
        return self.shard + max(self.encoding + weights, self.learning + self.layer)

    def beside(self, shard: float) -> "Start":
        """The same with a sharded transformer, of which a process holds `shard` bytes."""
        return replace(self, shard=shard)


def measure_start(shapes: Shapes, transformer: torch.nn.Module) -> Start:
    """Run every network that `shapes` saw running once more, without values; all but the transformer are used up.

    Args:
        transformer: the pipeline's own on the meta device, which is left as it is.
    """
    encoders = 0.0
    layers, encoding, learning = [_largest_layer(transformer)], [0.0], [0.0]
    runs = {name: (function, args, kwargs) for name, function, args, kwargs in shapes.runs}  # one of each network
    for name, (function, args, kwargs) in runs.items():
        module = function.__self__
        is_encoder = isinstance(module, transformers.PreTrainedModel)
        rows = {"transformer": REPLAYED_AT_ONCE}.get(name, PROMPTS_AT_ONCE if is_encoder else 1)
        if name == "transformer":
            module = shortened(transformer)
        layers.append(_largest_layer(module))
        if is_encoder:
            encoders += sum(4 * parameter.numel() for parameter in module.parameters())
        batch = shapes.batch if name == "transformer" else 1
        taken = _run(module, function.__func__, *_in_rows((args, kwargs), batch, rows))
        (encoding if is_encoder else learning).append(taken)
    return Start(encoders, max(layers), max(encoding), max(learning))


def _run(module, function, args, kwargs) -> float:
    """Bytes of all tensors but the weights, at the most, in a run without gradient."""
    tracker = MemoryTracker()
    with tracker, torch.no_grad():
        with tracker.component("weights"):
            fill(module)
        tracker.forget_peaks()
        args, kwargs = tree_map_only(torch.Tensor, lambda value: seen(empty(value.shape, value.dtype)), (args, kwargs))
        function(module, *args, **kwargs)
    peak = tracker.peaks[0].get(("", None))
    return 0.0 if peak is None else peak.bytes - peak.components.get("weights", 0)


def _in_rows(arguments, batch: int, rows: int):
    """The arguments of a run of `batch` samples as those of `rows`."""

    def scaled(value):
        return value.new_empty(rows, *value.shape[1:]) if value.ndim and len(value) == batch else value

    return tree_map_only(torch.Tensor, scaled, arguments)


def _largest_layer(module) -> float:
    return max(4 * sum(p.numel() for p in part.parameters(recurse=False)) for part in module.modules())
