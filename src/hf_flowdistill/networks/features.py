# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Discriminator features without a discriminator: what a transformer projects to its output, pooled. SiD-DiT Sec. 3.

They are the hidden states after the final, modulated norm and before the output projection, averaged over the image
tokens: [B, C], each of the C channels a logit. Nothing is added to the network; a hook on the projection reads them
from a call that is made anyway.

Image tokens are told from text and padding by what they do: a token belongs to the sample whose velocity its
projection becomes, which the gradient of what follows the projection says, usually nothing but reshaping. So no order
of tokens, no place of the batch dimension and no length of a text has to be known.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from hf_flowdistill.errors import UserError
from hf_flowdistill.networks.adapters import Role
from hf_flowdistill.teachers.conditioning import Conditioning, encode_batch
from hf_flowdistill.teachers.contract import Contract
from hf_flowdistill.teachers.guidance import guided_velocity
from hf_flowdistill.teachers.learning import PROMPTS
from hf_flowdistill.teachers.watch import first_output, undisturbed


TRIED = 4  # of the linear layers, the last that are called: a final norm may have its own after the last block's


def velocity_and_features(
    network: torch.nn.Module,
    contract: Contract,
    module: str,
    x_t: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
) -> tuple[Tensor, Tensor]:
    """`Contract.velocity`, and from the same calls the discriminator features, [B, C] in float32.

    Gradient flows through both to x_t and to the parameters before the projection; gradient mode has to be on.

    Args:
        network: the transformer, or a role on it.
        module: full name of its output projection, from `find_projection`.
        x_t, sigma, conditioning: as `Contract.velocity`.

    Raises:
        RuntimeError: gradient mode is off.
        ValueError: as `Contract.velocity`.
    """
    if not torch.is_grad_enabled():
        raise RuntimeError("discriminator features are read with gradient mode on")
    parts = []

    def read(output, calls):
        parts.append(_pooled(contract.velocity_from_output(first_output(output)), calls[module]))

    with _watched(network, [module], read):
        velocity = contract.velocity(network, x_t, sigma, conditioning)
    features = torch.cat(parts)[contract.places(conditioning.expand(len(x_t))).to(x_t.device)]
    # A backward pass from features alone would not pass the output, where shards are gathered for it.
    return velocity, features + 0 * velocity.flatten(1).sum(1, keepdim=True)


def guided_velocity_and_features(
    network, contract: Contract, module: str, x_t, sigma, conditional, unconditional, scale: float, mode=None
) -> tuple[Tensor, Tensor]:
    """`Contract.guided_velocity`, and the discriminator features of its conditional half, [B, C] in float32.

    Arguments, gradient and errors as there and in `velocity_and_features`.
    """
    of_calls = []

    def velocity_fn(*inputs):
        velocity, features = velocity_and_features(network, contract, module, *inputs)
        of_calls.append(features)
        return velocity

    velocity = guided_velocity(velocity_fn, x_t, sigma, conditional, unconditional, scale, mode)
    return velocity, of_calls[0][-len(x_t) :]


def find_projection(pipeline, contract: Contract, name: str | None = None) -> str:
    """The full name of the transformer's output projection: the module whose input the discriminator features are.

    It is the last linear layer of which every element of the velocity is an element, but for the sign: what follows
    only reshapes. That is checked element by element on two calls of the transformer (or one more for each length,
    where the texts of two prompts differ in length). The pipeline is left as it was.

    Args:
        name: a module to take instead. Then anything may follow it that keeps samples apart; its input and its output
            must be tokens, [..., channels], in the same places, and the input must depend on the latents.

    Raises:
        UserError: there is no such layer, or the module called `name` is none whose input can be the features.
    """
    transformer = pipeline.transformer
    where, found, hidden = type(transformer).__name__, [], []
    modules = dict(transformer.named_modules())
    linear = [key for key, module in modules.items() if isinstance(module, torch.nn.Linear)]
    if name is not None and name not in modules:
        raise UserError(
            f"--discriminator_features {name} is no module of {where}: its last linear layers are "
            f"{', '.join(linear[-3:])}."
        )
    conditioning = encode_batch(pipeline, contract, PROMPTS)
    with undisturbed(pipeline):
        noise = torch.randn(2, *contract.latent_shape).to(pipeline._execution_device)
        inputs = noise, noise.new_full((2,), 0.5), conditioning
        called = [name] if name else _called(transformer, contract, linear, inputs)[-TRIED:]

        def read(output, calls):
            velocity = contract.velocity_from_output(first_output(output))
            fits = _are_tokens if name else _is_reshaped
            found.append([key for key in called if calls[key] and fits(velocity, calls[key])])
            if name in found[-1]:
                hidden.extend(source.detach().clone() for source, _ in calls[name])

        with _watched(transformer, called, read, cut=True):
            contract.velocity(transformer, *inputs)
            if name:
                contract.velocity(transformer, -noise, *inputs[1:])
    fitting = [key for key in called if all(key in of_call for of_call in found)]
    if name and fitting and all(map(torch.equal, hidden, hidden[len(hidden) // 2 :])):  # it sees the texts or the time
        fitting = []
    if fitting:
        return fitting[-1]
    if name is not None:
        raise UserError(
            f"--discriminator_features {name} does not hold them: the input and the output of that module of {where} "
            "must be tokens that depend on the latents, and some of which make the image."
        )
    raise UserError(
        f"{contract.pipeline_class} has no discriminator features that can be found: none of the last linear layers "
        f"of {where} becomes its output by reshaping alone; name the output projection with --discriminator_features."
    )


def _called(transformer, contract: Contract, names: list[str], inputs) -> list[str]:
    """Those of the modules called `names` that run, in the order of their last calls."""
    order: list[str] = []
    hooks = [
        transformer.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
        for name in names
    ]
    try:
        contract.velocity(transformer, *inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(reversed(order)))[::-1]


@contextlib.contextmanager
def _watched(network, names: list[str], read: Callable, *, cut: bool = False):
    """Inside, every call of the transformer ends with `read(output, calls)`: name -> (input, output) of its calls.

    With `cut`, there is a graph of what follows these modules, between them and to the output, and of nothing else,
    whatever the gradient mode; so nothing is traced back through the weights of another one, which shards may have
    released by then.
    """
    enabled = torch.is_grad_enabled()
    transformer = network.shared.transformer if isinstance(network, Role) else network
    calls: dict[str, list] = {name: [] for name in names}

    def keep(name, module, args, output):
        if not (isinstance(output, Tensor) and args and isinstance(args[0], Tensor)):  # of a module that was named
            calls[name].append((None, output))
            return output
        if cut:
            torch.set_grad_enabled(True)
        if cut or not output.requires_grad:  # the latter of a frozen network and an input without gradient
            output = output.detach().requires_grad_()
        calls[name].append((args[0], output))
        return output

    def end(module, args, output):
        read(output, calls)
        for of_module in calls.values():
            of_module.clear()
        torch.set_grad_enabled(enabled)

    hooks = [
        transformer.get_submodule(name).register_forward_hook(lambda *inside, name=name: keep(name, *inside))
        for name in names
    ]
    # Before the hooks of sharded networks, which would take the gradient that tells tokens for the backward pass.
    hooks.append(transformer.register_forward_hook(end, prepend=True))
    try:
        yield
    finally:
        torch.set_grad_enabled(enabled)
        for hook in hooks:
            hook.remove()


def _traced(velocity: Tensor, numbers: Tensor, count: int, source: Tensor) -> Tensor:
    """The number, in 1..`count`, of the elements of `velocity` that an element of `source` influences; 0 for none.

    Numbers go bit by bit, so that whatever follows `source` and the precision of it may scale the gradient as they
    like. Elements of `velocity` may share a number.
    """
    traced = torch.zeros(source.shape, dtype=torch.long, device=source.device)
    for bit in range(count.bit_length()):
        chosen = (numbers >> bit & 1).to(velocity.dtype).expand_as(velocity)
        (gradient,) = torch.autograd.grad(velocity, source, chosen, retain_graph=True, allow_unused=True)
        if gradient is not None:
            traced |= (gradient != 0).long() << bit
    return traced


def _samples(velocity: Tensor, source: Tensor) -> Tensor:
    """For each element of `source`, the sample of `velocity` that it influences, from 1; 0 for none."""
    batch = len(velocity)
    numbers = torch.arange(1, batch + 1, device=velocity.device).reshape(-1, *[1] * (velocity.ndim - 1))
    return _traced(velocity, numbers, batch, source)


def _pooled(velocity: Tensor, calls: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean over the tokens of each sample of the inputs of a projection, [B, C]."""
    samples = torch.arange(1, len(velocity) + 1, device=velocity.device)
    sums, counts = 0, 0
    with torch.autocast(velocity.device.type, enabled=False):
        for hidden, projected in calls:
            of_token = _samples(velocity, projected).amax(-1).flatten()
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            member = (of_token == samples[:, None]).to(dtype)
            # a product and no scattered sum, whose order, and so last digit, is left to chance on accelerators
            sums = sums + member @ hidden.flatten(0, -2).to(dtype)
            counts = counts + member.sum(1, keepdim=True)
        return sums / counts


def _are_tokens(velocity: Tensor, calls: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether inputs and outputs of a module are tokens, each of one sample or none, and every sample has some."""
    seen = set()
    for hidden, projected in calls:
        if not isinstance(hidden, Tensor) or hidden.shape[:-1] != projected.shape[:-1]:
            return False
        samples = _samples(velocity, projected)
        of_token = samples.amax(-1, keepdim=True)
        if not ((samples == of_token) | (samples == 0)).all():
            return False
        seen |= set(of_token.unique().tolist())
    return seen - {0} == set(range(1, len(velocity) + 1))


def _is_reshaped(velocity: Tensor, calls: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether `velocity` has exactly the elements of what a module returned for some tokens, up to signs."""
    if not _are_tokens(velocity, calls):
        return False
    numbers = torch.arange(1, velocity.numel() + 1, device=velocity.device).reshape(velocity.shape)
    values, targets = [], []
    for _, projected in calls:
        traced = _traced(velocity, numbers, velocity.numel(), projected)
        values.append(projected[traced > 0])
        targets.append(traced[traced > 0] - 1)
    values, targets = torch.cat(values), torch.cat(targets)
    complete = torch.equal(targets.sort().values, torch.arange(velocity.numel(), device=velocity.device))
    return complete and torch.equal(values.abs(), velocity.flatten()[targets].abs())
