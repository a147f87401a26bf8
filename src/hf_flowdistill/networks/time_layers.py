# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Where a transformer embeds its time: the last linear layers of the networks that it puts its time through.

They are told from their calls, not from names: their outputs change with the time and with nothing else, what is
computed before them is not yet an embedding, and nothing else tells the transformer its time. What is added to their
outputs reaches whatever the time reaches.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.draws import normal
from hf_flowdistill.teachers.conditioning import encode_batch
from hf_flowdistill.teachers.learning import PROMPTS
from hf_flowdistill.teachers.watch import undisturbed


SIGMAS = 0.9, 0.4


class Call(NamedTuple):
    """What a transformer is called with: the numbers of its latents and of its conditioning, 0 or 1, and sigma."""

    latents: int
    sigma: float
    conditioning: int


FIRST = Call(0, SIGMAS[0], 0)
LATER = Call(0, SIGMAS[1], 0)


def find_time_layers(pipeline, contract) -> list[str]:
    """The full names of the layers of `pipeline`'s transformer that end its embeddings of time.

    The pipeline is left as it was.

    Raises:
        UserError: there are none such that everything which depends on time comes from them.
    """
    conditioning = encode_batch(pipeline, contract, PROMPTS)
    with undisturbed(pipeline), torch.no_grad():
        device = pipeline._execution_device
        latents = [normal((1, *contract.latent_shape), 0, "time layers", number).to(device) for number in range(2)]

        def predict(transformer, call: Call) -> Tensor:
            sigma = latents[0].new_full((1,), call.sigma)
            return contract.velocity(transformer, latents[call.latents], sigma, conditioning[[call.conditioning]])

        return time_layers(pipeline.transformer, predict)


@torch.no_grad()
def time_layers(transformer, predict: Callable[[torch.nn.Module, Call], Tensor]) -> list[str]:
    """As `find_time_layers`, of a transformer that `predict` calls with one sample.

    Raises:
        UserError: as there.
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    known = {call: _prints(transformer, linear, predict, call) for call in (FIRST, LATER)}
    for call in (Call(1, SIGMAS[0], 0), Call(0, SIGMAS[0], 1)):
        other = _prints(transformer, linear, predict, call)
        linear = [name for name in linear if name in other and other[name] == known[FIRST].get(name)]
    linear = [name for name in linear if known[FIRST][name] != known[LATER].get(name)]
    chosen = _ends(transformer, linear, predict) if linear else []
    if not chosen:
        raise UserError(
            f"{type(transformer).__name__} cannot be told how far to jump: no linear layers, of one width, were found "
            "in it through which all that depends on time has to come."
        )
    return chosen


def _ends(transformer, linear: list[str], predict) -> list[str]:
    """Of the layers that see nothing but time, those that end its embeddings, all of one width; none if they let time
    pass by."""
    (expected, first), (_, later) = (_calls(transformer, linear, predict, call) for call in (FIRST, LATER))
    # With all outputs of LATER, what still has its input of FIRST is fed with the time itself.
    _, fed = _calls(transformer, linear, predict, FIRST, {name: later[name][1] for name in linear})
    begins = [name for name in linear if _same(fed[name][0], first[name][0])]
    inner = {name: first[name][1] for name in linear if name not in begins}
    _, fed = _calls(transformer, linear, predict, LATER, inner)
    second = [name for name in inner if not _same(fed[name][0], first[name][0])]
    for chosen in [second, *([name] for name in reversed(linear))]:  # else the last that all of it comes through
        if len({transformer.get_submodule(name).out_features for name in chosen}) != 1:
            continue
        output, _ = _calls(transformer, chosen, predict, LATER, {name: first[name][1] for name in chosen})
        if torch.equal(output, expected):
            return chosen
    return []


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def _prints(transformer, names: list[str], predict, call: Call) -> dict[str, list]:
    """Name of a layer -> something small of each of its outputs, which is another for other outputs."""
    found: dict[str, list] = {}

    def read(name, module, args, output):
        values = output.double()
        found.setdefault(name, []).append((*output.shape, values.sum().item(), values.square().sum().item()))

    with _hooked(transformer, names, read):
        predict(transformer, call)
    return found


def _calls(transformer, names: list[str], predict, call: Call, outputs: dict[str, list[Tensor]] | None = None):
    """What `predict` returns, and name -> (inputs, outputs) of the layers' calls, with `outputs` in their place."""
    found: dict[str, tuple[list, list]] = {name: ([], []) for name in names}

    def read(name, module, args, output):
        inputs, returned = found[name]
        inputs.append(args[0].clone())
        returned.append(output.clone())
        return outputs[name][len(returned) - 1] if outputs and name in outputs else output

    with _hooked(transformer, names, read):
        return predict(transformer, call), found


@contextlib.contextmanager
def _hooked(transformer, names: list[str], read: Callable):
    hooks = [
        transformer.get_submodule(name).register_forward_hook(lambda *inside, name=name: read(name, *inside))
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
