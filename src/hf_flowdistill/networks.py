# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Loading a teacher pipeline, and the three networks of a distillation."""

import contextlib
import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch.distributed.tensor import DTensor

from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.teachers.watch import check_flow_matching


def read_index(path, *, revision=None, cache_dir=None) -> dict:
    """The pipeline's model_index.json: component -> [library, class].

    Raises:
        UserError: there is nothing at `path`, it is no diffusers pipeline, or one without a transformer.
    """
    path, where = str(path), {"revision": revision, "cache_dir": cache_dir}
    looks_like_hub_id = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    if not Path(path).exists() and not looks_like_hub_id:
        raise UserError(f"{path} does not exist: give a diffusers pipeline folder or a Hub id.")
    try:
        index = DiffusionPipeline.load_config(path, **where)
    except (OSError, ValueError) as error:
        if Path(path).exists():
            raise UserError(
                f"{path} is not a diffusers pipeline, it has no readable model_index.json: give the folder that the "
                "pipeline's save_pretrained wrote, not one of its components."
            ) from None
        raise UserError(f"{path} is no folder, and as a Hub id it cannot be read: {first_line(error)}") from error
    if index.get("transformer", [None])[0] is None:
        has = "a UNet" if "unet" in index else "no transformer"
        raise UserError(
            f"{path} cannot be a teacher: {index.get('_class_name')} has {has} instead of a flow-matching transformer."
        )
    return index


def load_pipeline(
    path, *, revision=None, variant=None, cache_dir=None, dtype=torch.float32, **components
) -> DiffusionPipeline:
    """Load a diffusers flow-matching pipeline from a folder or from the Hub.

    Its index is read first, so that what cannot be a teacher is refused before any weights are read. Components that
    the index lists as absent (SD3 without T5, say) are absent. Those that are given as `components` are not read.

    Raises:
        UserError: there is nothing at `path`, it is no diffusers pipeline, or not a flow-matching transformer.
    """
    path, where = str(path), {"revision": revision, "cache_dir": cache_dir}
    index = read_index(path, **where)
    absent = {name: None for name, component in index.items() if component == [None, None]}
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            path, variant=variant, dtype=dtype, **where, **absent, **components
        )
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} does not load as a diffusers pipeline: {first_line(error)}") from error
    check_flow_matching(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def weights_digest(network: torch.nn.Module) -> str:
    """16 hexadecimal digits that change with every weight of `network`; all processes ask for a sharded one's."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def move_all_but_transformer(pipeline, device) -> None:
    """Text encoders and VAE to `device`: they are needed before training and for decoding only."""
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module) and name != "transformer":
            component.to(device)


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
    return copy.deepcopy(network).to(dtype)


@dataclass
class Networks:
    """The three networks of a score distillation. All run in eval mode (no dropout), as the teacher does.

    Attributes:
        teacher: frozen; gradient passes through it to its input, never into its parameters.
        generator: the student.
        fake_score: follows the distribution of what the generator makes.
    """

    teacher: torch.nn.Module
    generator: torch.nn.Module
    fake_score: torch.nn.Module

    @classmethod
    def from_teacher(
        cls,
        teacher: torch.nn.Module,
        dtype: torch.dtype = torch.float32,
        copy: Callable[[torch.nn.Module, torch.dtype], torch.nn.Module] = plain_copy,
    ) -> "Networks":
        """Generator and fake score as copies of `teacher` in `dtype`, which is itself frozen and made `dtype`.

        `copy` makes them, e.g. `Sharding.copy`. All three have one precision, because training follows small
        differences between their predictions. Autocast still serves all three.
        """
        teacher.eval().to(dtype).requires_grad_(False)
        return cls(teacher, *(copy(teacher, dtype).requires_grad_(True) for _ in range(2)))

    def trained(self) -> dict[str, torch.nn.Module]:
        """The networks that a checkpoint has to hold, by name."""
        return {"generator": self.generator, "fake_score": self.fake_score}

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, in all three: gradient also passes through the frozen ones."""
        for network in (self.teacher, self.generator, self.fake_score):
            network.enable_gradient_checkpointing()

    @contextlib.contextmanager
    def training(self, name: str):
        """Only the network called `name` ("generator" or "fake_score") can receive gradient inside this context.

        Keep the backward pass inside too: with gradient checkpointing the forward pass is run again there.
        """
        other = {"generator": self.fake_score, "fake_score": self.generator}[name]
        other.requires_grad_(False)
        try:
            yield getattr(self, name)
        finally:
            other.requires_grad_(True)
