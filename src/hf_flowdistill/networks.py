# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Loading a teacher pipeline, and the three networks of a distillation, each its own or in a role on a shared base."""

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from hf_flowdistill.adapters import Role, SharedBase, quantize
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
        UserError: there is nothing at `path`, it is no diffusers pipeline, has weights that are not in safetensors, or
            not a flow-matching transformer.
    """
    path, where = str(path), {"revision": revision, "cache_dir": cache_dir}
    index = read_index(path, **where)
    given = {name: None for name, component in index.items() if component == [None, None]} | components
    try:
        # Pickles can run any code when they are loaded.
        how = {"variant": variant, "dtype": dtype, "use_safetensors": True}
        pipeline = DiffusionPipeline.from_pretrained(path, **how, **where, **given)
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


@contextlib.contextmanager
def streamed(modules: Iterable[torch.nn.Module], device):
    """Inside, `modules` compute on `device` with weights that come from main memory, layer by layer; then as before.

    With those that are on such a device already, nothing is done. What is computed is the same.
    """
    device = torch.device(device)
    waiting = [module for module in modules if waits(module, device)]
    if waiting:  # accelerate is there where anything trains
        from accelerate import cpu_offload
        from accelerate.hooks import remove_hook_from_submodules
    for module in waiting:
        cpu_offload(module, device, offload_buffers=bool(module._parameters))  # as diffusers' pipelines do
    try:
        yield
    finally:
        for module in waiting:
            remove_hook_from_submodules(module)


def waits(module: torch.nn.Module, device: torch.device) -> bool:
    """Whether the weights of `module` are in main memory, and it is to run on an accelerator."""
    return any(parameter.device.type != device.type for parameter in module.parameters())


def modules_of(pipeline) -> dict[str, torch.nn.Module]:
    """The networks among the components of `pipeline`, by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def has_room(size: float, memory: float) -> bool:
    """Whether text encoders of `size` bytes stay on an accelerator with `memory` bytes free while they encode.

    If not, they are streamed. Half as much again is left for what they compute.
    """
    return 1.5 * size <= memory


def place_text_encoders(pipeline, device) -> None:
    """Everything that encodes text to `device`, if there is room for it."""
    device = torch.device(device)
    encoders = [module for name, module in modules_of(pipeline).items() if name not in ("transformer", "vae")]
    size = sum(parameter.nbytes for module in encoders for parameter in module.parameters())
    if device.type != "cuda" or has_room(size, torch.cuda.mem_get_info(device)[0]):
        for module in encoders:
            module.to(device)


def move_all_but_transformer(pipeline, device) -> None:
    """Text encoders and VAE to `device`: they are needed before training and for decoding only."""
    for name, module in modules_of(pipeline).items():
        if name != "transformer":
            module.to(device)


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


NETWORKS = ("full", "lora_fake", "lora")
ROLES = ("teacher", "generator", "fake_score")


@dataclass(frozen=True)
class RoleSettings:
    """Which networks a distillation has, and what is trained of them.

    Attributes:
        networks: "full", three networks; "lora_fake", the generator is one of its own and the fake score a LoRA
            adapter on the teacher; or "lora", generator and fake score are two adapters on the teacher.
        rank, lora_alpha: of the adapters; an alpha of None is the rank, which scales by 1.
        lora_layers: as `wanted` in `linear_layers`.
        base_quantization: of the teacher under two adapters, "none", "8bit" or "nf4"; see `adapters.quantize`.
    """

    networks: str = "full"
    rank: int = 64
    lora_alpha: float | None = None
    lora_layers: str | None = None
    base_quantization: str = "none"

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
        alpha = self.rank if self.lora_alpha is None else self.lora_alpha
        return SharedBase(teacher, targets, rank=self.rank, alpha=alpha, seed=seed, quantized=quantized)


FULL = RoleSettings()


@dataclass
class Networks:
    """The three networks of a score distillation. All run in eval mode (no dropout), as the teacher does.

    Each is called as the teacher's transformer is. Where they share it, they are roles on it (`adapters.Role`).

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
        roles: RoleSettings = FULL,
        *,
        copy: Callable[[torch.nn.Module, torch.dtype], torch.nn.Module] = plain_copy,
        seed: int = 0,
        device=None,
    ) -> "Networks":
        """Networks that all start as `teacher` in `dtype`, which is itself frozen and made `dtype`, in place.

        All three have one precision, because training follows small differences between their predictions; adapters
        are float32. Autocast still serves all three. A teacher that is shared gets the adapters' layers, in place, and
        is quantized if `roles` says so: then training follows the quantized teacher.

        Args:
            copy: makes what is trained whole, e.g. `Sharding.copy`.
            seed: of the adapters.
            device: where all of them are to be; by default where the teacher is. Of one that is quantized, no more
                than a layer is there as it was.

        Raises:
            UserError: as `linear_layers`.
        """
        teacher.eval().to(dtype).requires_grad_(False)
        if device is not None and roles.networks != "lora":
            teacher.to(device)
        if roles.networks == "full":
            return cls(teacher, *(copy(teacher, dtype).requires_grad_(True) for _ in range(2)))
        generator = copy(teacher, dtype).requires_grad_(True) if roles.networks == "lora_fake" else None
        shared = roles.share(teacher, seed=seed, device=device)
        return cls(Role(shared), generator or shared.add("generator"), shared.add("fake_score"))

    def trained(self) -> dict[str, torch.nn.Module]:
        """What a checkpoint has to hold, by name: networks, or adapters, each with exactly what is trained of it."""
        return {"generator": self.generator, "fake_score": self.fake_score}

    def enable_gradient_checkpointing(self, names: Iterable[str] = ROLES) -> None:
        """Recompute activations in the backward pass, in the networks called `names`.

        By default in all three: gradient also passes through the frozen ones.
        """
        for name in names:
            getattr(self, name).enable_gradient_checkpointing()

    @contextlib.contextmanager
    def training(self, name: str):
        """The turn of the network called `name` ("generator" or "fake_score"): only it can receive gradient inside.

        The backward pass belongs inside too. Later the other network may have its turn, where this one is frozen, and
        its gradient would silently be none; so a backward pass outside, of what was computed inside, is an error.

        Raises:
            RuntimeError: from such a backward pass.
        """
        other = {"generator": self.fake_score, "fake_score": self.generator}[name]
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

        networks = (self.teacher, self.generator, self.fake_score)
        hooks = [network.register_forward_hook(guard) for network in networks]
        other.requires_grad_(False)
        try:
            yield getattr(self, name)
        finally:
            over = True
            other.requires_grad_(True)
            for hook in hooks:
                hook.remove()
