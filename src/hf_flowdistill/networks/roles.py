# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The three networks of a distillation, each its own or in a role on a shared base."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_leaves

from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.networks.adapters import Role, SharedBase, quantize
from hf_flowdistill.networks.blocks import linear_layers
from hf_flowdistill.networks.flow_map import remember_in_checkpoints
from hf_flowdistill.networks.names import RANK, ROLES, TRAINED
from hf_flowdistill.teachers.precision import cast


def check_gradient_checkpointing(network: torch.nn.Module, predict: Callable[[torch.nn.Module], torch.Tensor]) -> None:
    """Freeze `network` and compare `predict(network)` without gradient checkpointing and with it; then it is off.

    diffusers writes it anew for every class, and for some it fails or leaves out an argument of the blocks.

    Raises:
        UserError: it fails, or changes what is predicted.
    """
    name = type(network).__name__
    network.requires_grad_(False)
    with torch.enable_grad():
        expected = predict(network)
        try:
            network.enable_gradient_checkpointing()
            found = predict(network)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the installed diffusers cannot recompute the activations of {name} ({first_line(error)}): "
                "leave out --gradient_checkpointing."
            ) from error
    network.disable_gradient_checkpointing()
    difference = ((found - expected).norm() / expected.norm()).item()
    if not difference < 1e-3:
        raise UserError(
            f"with gradient checkpointing the installed diffusers computes something else in {name} (relative "
            f"difference {difference:.1e}): leave out --gradient_checkpointing."
        )


def plain_copy(network: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A copy of a network that is not sharded, in `dtype`."""
    return cast(copy.deepcopy(network), dtype)


@dataclass(frozen=True)
class RoleSettings:
    """Which networks a distillation has, and what is trained of them.

    Attributes:
        networks: "full", three networks; "lora_fake", the generator is one of its own and the fake score a LoRA
            adapter on the teacher; or "lora", generator and fake score are two adapters on the teacher.
        rank, lora_alpha: of the adapters; an alpha of None is the rank, which scales by 1.
        lora_layers: as `wanted` in `linear_layers`.
        base_quantization: of the teacher under two adapters, "none", "8bit" or "nf4"; see
            `networks.adapters.quantize`.
    """

    networks: str = "full"
    rank: int = RANK
    lora_alpha: float | None = None
    lora_layers: str | None = None
    base_quantization: str = "none"

    @property
    def alpha(self) -> float:
        return self.rank if self.lora_alpha is None else self.lora_alpha

    def layers(self, transformer: torch.nn.Module) -> list[str]:
        """Full names of what gets adapters, as `linear_layers`; nothing with three networks."""
        return [] if self.networks == "full" else linear_layers(transformer, self.lora_layers)

    def share(self, teacher: torch.nn.Module, *, seed: int = 0, device=None) -> SharedBase:
        """`teacher`, in place, as the base of adapters, on `device`, quantized on its way there if it is to be.

        Raises:
            UserError: as `linear_layers`.
        """
        targets, quantized = self.layers(teacher), []
        if self.base_quantization != "none":
            quantized = linear_layers(teacher)
            quantize(teacher, quantized, self.base_quantization, device)
        if device is not None:
            teacher.to(device)
        return SharedBase(teacher, targets, rank=self.rank, alpha=self.alpha, seed=seed, quantized=quantized)


FULL = RoleSettings()


def role_settings(args) -> RoleSettings:
    """What the arguments of `networks.arguments` say."""
    return RoleSettings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(RoleSettings)})


@dataclass
class Networks:
    """The three networks of a score distillation. All run in eval mode (no dropout), as the teacher does.

    Each is called as the teacher's transformer is. Where they share it, they are roles on it
    (`networks.adapters.Role`).

    Attributes:
        teacher: frozen; gradient passes through it to its input, never into its parameters.
        generator: the student.
        fake_score: follows the distribution of what the generator makes; None for a method that has none.
    """

    teacher: torch.nn.Module
    generator: torch.nn.Module
    fake_score: torch.nn.Module | None

    @classmethod
    def from_teacher(
        cls,
        teacher: torch.nn.Module,
        dtype: torch.dtype = torch.float32,
        roles: RoleSettings = FULL,
        *,
        copy: Callable[[torch.nn.Module, torch.dtype], torch.nn.Module] = plain_copy,
        trains: Collection[str] = TRAINED,
        seed: int = 0,
        device=None,
    ) -> "Networks":
        """Networks that all start as `teacher` in `dtype`, which is itself frozen and made `dtype`, in place.

        All three have one precision, because training follows small differences between their predictions; adapters
        are float32. Autocast still serves all three. A teacher that is shared gets the adapters' layers, in place, and
        is quantized if `roles` says so: then training follows the quantized teacher.

        Args:
            copy: makes what is trained whole, e.g. `Sharding.copy`.
            trains: names of those of generator and fake score that there are; the generator is always one.
            seed: of the adapters.
            device: where all of them are to be; by default where the teacher is. Of one that is quantized, no more
                than a layer is there as it was.

        Raises:
            UserError: as `linear_layers`.
        """
        cast(teacher.eval(), dtype).requires_grad_(False)
        if device is not None and roles.networks != "lora":
            teacher.to(device)
        if roles.networks == "full":
            whole = (copy(teacher, dtype).requires_grad_(True) if name in trains else None for name in TRAINED)
            return cls(teacher, *whole)
        generator = copy(teacher, dtype).requires_grad_(True) if roles.networks == "lora_fake" else None
        shared = roles.share(teacher, seed=seed, device=device)
        generator = generator or shared.add("generator")
        return cls(Role(shared), generator, shared.add("fake_score") if "fake_score" in trains else None)

    def trained(self) -> dict[str, torch.nn.Module]:
        """What a checkpoint has to hold, by name: networks, or adapters, each with exactly what is trained of it."""
        return {name: getattr(self, name) for name in TRAINED if getattr(self, name) is not None}

    def enable_gradient_checkpointing(self, names: Iterable[str] = ROLES) -> None:
        """Recompute activations in the backward pass, in the networks called `names`.

        By default in all: gradient also passes through the frozen ones.
        """
        for name in names:
            if getattr(self, name) is not None:
                getattr(self, name).enable_gradient_checkpointing()
        for network in (self.teacher, *self.trained().values()):
            remember_in_checkpoints(network)

    @contextlib.contextmanager
    def training(self, name: str):
        """The turn of the network called `name` ("generator" or "fake_score"): only it can receive gradient inside.

        The backward pass belongs inside too. Later the other network may have its turn, where this one is frozen, and
        its gradient would silently be none; so a backward pass outside, of what was computed inside, is an error.

        Raises:
            RuntimeError: from such a backward pass.
        """
        others = [network for other, network in self.trained().items() if other != name]
        over = False

        def check(gradient):
            if over:
                raise RuntimeError(
                    f"a backward pass through the turn of the {name} after its end: keep loss.backward() inside "
                    f"`with networks.training({name!r})`"
                )

        def guard(network, arguments, output):
            for tensor in tree_leaves(output):
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(check)

        networks = (self.teacher, *self.trained().values())
        hooks = [network.register_forward_hook(guard) for network in networks]
        for other in others:
            other.requires_grad_(False)
        try:
            yield getattr(self, name)
        finally:
            over = True
            for other in others:
                other.requires_grad_(True)
            for hook in hooks:
                hook.remove()
