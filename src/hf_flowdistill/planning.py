# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a run needs, before it starts: read from configurations and the shapes they make, without any weights."""

import functools
import importlib
import inspect
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from torch.utils._pytree import tree_map_only

from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.networks import read_index
from hf_flowdistill.teachers.watch import call_arguments, check_flow_matching, plain_scheduler


@dataclass(frozen=True)
class Shapes:
    """What one sample is to the transformer. Shapes are without the batch dimension.

    Attributes:
        latent: (argument, shape) that holds the noisy latents.
        image_tokens: how many the transformer makes of them; None where its last layer is no projection of tokens.
        conditioning: argument -> (shape, bytes) of what comes with a prompt.
    """

    latent: tuple[str, tuple[int, ...]]
    image_tokens: int | None
    conditioning: dict[str, tuple[tuple[int, ...], int]]

    @property
    def text_tokens(self) -> int:
        """Sequence lengths of the embeddings together: of [tokens, width], and of [layers, tokens, width]."""
        return sum(max(shape[:-1]) for shape, _ in self.conditioning.values() if len(shape) > 1)

    @property
    def bytes_per_prompt(self) -> int:
        return sum(size for _, size in self.conditioning.values())


def load_skeleton(path, *, revision=None, cache_dir=None) -> diffusers.DiffusionPipeline:
    """The pipeline at `path` (a folder or Hub id) with every network on the meta device: no weights are read.

    Configurations, tokenizers and the scheduler are the pipeline's own.

    Raises:
        UserError: as `networks.load_pipeline`, or a component's configuration is missing or does not fit its class.
    """
    path, where = str(path), {"revision": revision, "cache_dir": cache_dir}
    index = read_index(path, **where)
    cls = getattr(diffusers, str(index["_class_name"]), None)
    if cls is None:
        raise UserError(f"{path} is a {index['_class_name']}, which the installed diffusers does not have: update it.")
    arguments = {**dict.fromkeys(cls._optional_components), **index}
    for name, entry in index.items():
        if isinstance(entry, (list, tuple)) and len(entry) == 2:
            arguments[name] = None if entry[0] is None else _component(path, name, *entry, where)
    accepted = inspect.signature(cls.__init__).parameters
    try:
        pipeline = cls(**{name: value for name, value in arguments.items() if name in accepted})
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} does not load as a diffusers pipeline: {first_line(error)}") from error
    check_flow_matching(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _component(path, name: str, library: str, class_name: str, where: dict):
    try:
        # what is neither library's own lives beside the pipeline class that uses it
        places = {"diffusers": diffusers, "transformers": transformers}
        place = places.get(library) or getattr(diffusers.pipelines, library, None) or importlib.import_module(library)
        cls = getattr(place, class_name)
        if issubclass(cls, diffusers.ModelMixin):
            config = cls.load_config(path, subfolder=name, **where)
            with torch.device("meta"):
                return cls.from_config(config).eval()
        if issubclass(cls, transformers.PreTrainedModel):
            config = cls.config_class.from_pretrained(path, subfolder=name, **where)
            with torch.device("meta"):
                return cls._from_config(config, dtype=torch.float32).eval()
        return cls.from_pretrained(path, subfolder=name, **where)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise UserError(
            f"the component {name} of {path}, a {class_name}, has no configuration that fits it: {first_line(error)}"
        ) from error


def measure_shapes(skeleton, *, height: int, width: int, pipeline_kwargs: dict[str, Any] | None = None) -> Shapes:
    """Call `skeleton` for one step and look at what its transformer is given; the skeleton is used up.

    Every network runs on the meta device, where values do not exist; what comes out of it are zeros of the right
    shape. So the pipeline checks its arguments, and the networks check shapes, as with weights.

    Raises:
        UserError: the pipeline cannot make this size, or does not take `pipeline_kwargs`.
        NotImplementedError: a network needs values to know its shapes.
    """
    name, calls, last_linear = type(skeleton).__name__, [], []
    for module in skeleton.components.values():
        for method in ("forward", "decode"):
            if isinstance(module, torch.nn.Module) and hasattr(module, method):
                setattr(module, method, _zeros_from_meta(getattr(module, method)))
    for module in skeleton.transformer.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, args, output: last_linear.append(module))
    signature = inspect.signature(skeleton.transformer.forward)

    def record(module, args, kwargs, output):
        calls.append((signature.bind(*args, **kwargs).arguments, output[0]))

    skeleton.transformer.register_forward_hook(record, with_kwargs=True)
    skeleton.scheduler = plain_scheduler(skeleton)
    # everything outside the networks has values, and is on the CPU
    skeleton.__class__ = type(name, (type(skeleton),), {"_execution_device": torch.device("cpu")})

    seen = []
    for prompts in (["a cat"], ["a cat", "two dogs"]):
        settings = {"height": height, "width": width, "pipeline_kwargs": dict(pipeline_kwargs or {})}
        arguments = call_arguments(skeleton, prompts, **settings, num_inference_steps=1, output_type="np")
        calls.clear()
        try:
            images = skeleton(**arguments)[0]
        except UserError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            if "meta" in str(error):
                raise NotImplementedError(first_line(error)) from error
            raise UserError(
                f"{name} fails when called with height {height}, width {width}: {first_line(error)}"
            ) from error
        seen.append(calls[0])
    if images.shape[1:3] != (height, width):
        made = f"height {images.shape[1]}, width {images.shape[2]}"
        raise UserError(f"{name} makes {made} when asked for height {height}, width {width}: ask for {made}.")
    return _compare(*seen, last_linear[-1])


def _zeros_from_meta(function):
    """`function` on the meta device, its result as zeros on the CPU."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        args, kwargs = tree_map_only(torch.Tensor, lambda value: value.to("meta"), (args, kwargs))
        return tree_map_only(torch.Tensor, lambda v: torch.zeros(v.shape, dtype=v.dtype), function(*args, **kwargs))

    return wrapped


def _compare(call_for_one, call_for_two, last_linear) -> Shapes:
    """What of a call's arguments there is twice as often for two prompts as for one."""
    (one, output), (two, _) = call_for_one, call_for_two
    rows = {name: row for name in one if (row := _row(one[name], two[name])) is not None}
    # what text encoders return is zero here, so only the latents, which are noise, are not
    (latent,) = (name for name, (_, row) in rows.items() if row.is_floating_point() and row.any())
    batch, row = rows.pop(latent)
    tokens, rest = divmod(output.numel(), batch * last_linear.out_features)
    conditioning = {name: (tuple(row.shape), row.numel() * row.element_size()) for name, (_, row) in rows.items()}
    return Shapes((latent, tuple(row.shape)), None if rest else tokens, conditioning)


def _row(one, two) -> tuple[int, torch.Tensor] | None:
    """(batch size of `one`, its first row), if `two` is twice as long; None for single numbers and constants."""
    if isinstance(one, (list, tuple)) and len(two) == 2 * len(one) and isinstance(one[0], torch.Tensor):
        return len(one), one[0]
    if isinstance(one, torch.Tensor) and one.ndim > 1:
        for dim, size in enumerate(one.shape):
            if two.shape[dim] == 2 * size and size:
                return size, one.select(dim, 0)
    return None


def count(module: torch.nn.Module) -> tuple[int, int]:
    """(parameters, values saved with them that are not trained, such as a table of positions)."""
    saved = module.state_dict().keys()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return parameters, sum(buffer.numel() for name, buffer in module.named_buffers() if name in saved)


def sharding_units(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of `transformer`: what is gathered, computed and released at a time where networks are sharded.

    They are the members of its lists of modules that diffusers says must not be split (`_no_split_modules`), or all
    members where it says nothing; lists inside a block do not count.
    """
    whole = set(getattr(transformer, "_no_split_modules", None) or ())
    units, inside = [], set()
    for module in transformer.modules():  # outer modules come before inner ones
        if isinstance(module, torch.nn.ModuleList) and module not in inside:
            members = [member for member in module if not whole or type(member).__name__ in whole]
            units += members
            inside.update(inner for member in members for inner in member.modules())
    return units


def training_memory(transformer, dtype: torch.dtype) -> list[tuple[str, str, int]]:
    """(what, precision, bytes) of all that a process keeps for as long as it trains, activations aside.

    The weights of the three networks, their gradients and Adam's moments are in `dtype`, the average in float32.
    Gradients are there for one network at a time.
    """
    parameters, others = count(transformer)
    size, precision = dtype.itemsize, _name(dtype)
    weights = [(name, precision, (parameters + others) * size) for name in ("teacher", "generator", "fake score")]
    moments = [
        (f"Adam's moments of the {name}", precision, 2 * parameters * size) for name in ("generator", "fake score")
    ]
    average = ("average of the generator", "float32", (parameters + others) * 4)
    return [*weights, average, *moments, ("gradients of one network", precision, parameters * size)]


def describe_plan(
    path,
    *,
    revision=None,
    cache_dir=None,
    height: int,
    width: int,
    pipeline_kwargs: dict[str, Any] | None = None,
    weight_dtype: torch.dtype = torch.float32,
    autocast: str = "no",
    prompts: int,
    max_train_images: int,
    batch_size: int,
    accumulation: int,
    processes: int,
    images_per_second: float | None = None,
) -> str:
    """What a training run of the teacher at `path` is, in lines: networks, sizes, memory, images, time.

    Args:
        pipeline_kwargs: of every call of the teacher's pipeline.
        weight_dtype, autocast: of the weights, gradients and moments; of the computation ("no" or "bf16").
        prompts: how many distinct ones.
        batch_size, accumulation, processes: whose product is the number of images per update.
        images_per_second: of all processes together; None leaves the time out.

    Raises:
        UserError: as `load_skeleton` and `measure_shapes`.
    """
    skeleton = load_skeleton(path, revision=revision, cache_dir=cache_dir)
    lines = [
        f"teacher: {path}",
        f"pipeline: {type(skeleton).__name__}",
        f"transformer: {type(skeleton.transformer).__name__}",
        *describe_networks(skeleton),
    ]
    try:
        shapes = measure_shapes(skeleton, height=height, width=width, pipeline_kwargs=pipeline_kwargs)
        lines += describe_shapes(shapes, height=height, width=width)
        together = prompts * shapes.bytes_per_prompt
        lines.append(f"prompts: {prompts:,} distinct, {together / 1e9:,.2f} GB of conditioning")
    except NotImplementedError as error:
        lines.append(f"image and text: their sizes are not known without the weights ({error})")
    lines.append(f"precision: {_name(weight_dtype)} weights, {autocast} autocast")
    lines += describe_memory(skeleton.transformer, weight_dtype)
    per_update = batch_size * accumulation * processes
    updates = math.ceil(max_train_images / per_update)
    images = updates * per_update
    lines.append(
        f"images per update: {per_update:,} = {processes} processes x {accumulation} micro-batches x {batch_size}"
    )
    lines.append(f"images: {images:,} in {updates:,} updates of each trained network")
    if images_per_second is not None:
        hours = images / images_per_second / 3600
        lines.append(f"time: {hours:,.1f} hours at {images_per_second:g} images per second")
    return "\n".join(lines)


def describe_networks(pipeline) -> list[str]:
    """Lines: how large the transformer is and which blocks it consists of; the other networks' sizes."""
    transformer = pipeline.transformer
    parameters, others = count(transformer)
    units = sharding_units(transformer)
    kinds = " + ".join(f"{number} {kind}" for kind, number in Counter(type(unit).__name__ for unit in units).items())
    share = sum(count(unit)[0] for unit in units) / parameters
    rest = {
        name: sum(count(module))
        for name, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module) and module is not transformer
    }
    return [
        f"parameters: {parameters:,}" + (f", and {others:,} values that are not trained" if others else ""),
        f"sharding units: {kinds}, with {share:.1%} of the parameters" if units else "sharding units: none found",
        "other networks: " + (", ".join(f"{name} {size / 1e6:,.0f}M" for name, size in rest.items()) or "none"),
    ]


def describe_shapes(shapes: Shapes, *, height: int, width: int) -> list[str]:
    """Lines: the image and the text as the transformer sees them, and what is kept of the latter."""
    name, shape = shapes.latent
    tokens = "" if shapes.image_tokens is None else f", {shapes.image_tokens:,} tokens"
    return [
        f"image: {height}x{width}, {name} {list(shape)}{tokens}",
        f"text: {shapes.text_tokens:,} tokens",
        describe_conditioning(shapes.conditioning),
    ]


def describe_memory(transformer, dtype: torch.dtype) -> list[str]:
    """Lines: what each process keeps, by role and precision."""
    rows = training_memory(transformer, dtype)
    rows.append(("together", "", sum(size for *_, size in rows)))
    table = [f"  {what:<32} {precision:<8} {size / 1e9:>8,.2f} GB" for what, precision, size in rows]
    return ["memory of each process, before activations:", *table]


def describe_conditioning(conditioning: dict[str, tuple[tuple[int, ...], int]]) -> str:
    """A line: what is kept for each prompt, from argument -> (shape, bytes)."""
    parts = ", ".join(f"{name} {list(shape)}" for name, (shape, _) in conditioning.items())
    return f"kept for each prompt: {parts}; {sum(size for _, size in conditioning.values()):,} bytes"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
