# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A pipeline without weights: its own configurations, tokenizers and code, every network on the meta device."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers
from torch.utils._pytree import tree_leaves, tree_map_only

from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.networks.loading import check_not_quantized, read_index
from hf_flowdistill.planning.ghosts import RememberedOnMeta
from hf_flowdistill.teachers.watch import (
    call_arguments,
    check_flow_matching,
    check_many_steps,
    check_size,
    plain_scheduler,
)


@dataclass(frozen=True)
class Shapes:
    """What one sample is to the transformer. Shapes are without the batch dimension.

    Attributes:
        latent: (argument, shape) that holds the noisy latents.
        image_tokens: how many the transformer makes of them; None where that cannot be told.
        text_tokens: lengths of the embeddings together, for a prompt of two words.
        longer_with_prompt: whether they grow with the prompt, so that all of this holds for such a prompt only.
        conditioning: argument -> (shape, bytes) of what comes with a prompt.
        call: all arguments of a call of the transformer, of `batch` samples.
        batch: 2 if the pipeline guides by itself in one call, else 1.
        runs: (component, method, arguments, named arguments) of every run of a network in a call for one prompt.
    """

    latent: tuple[str, tuple[int, ...]]
    image_tokens: int | None
    text_tokens: int
    longer_with_prompt: bool
    conditioning: dict[str, tuple[tuple[int, ...], int]]
    call: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    batch: int = 1
    runs: list[tuple[str, Callable, tuple, dict]] = field(default_factory=list, repr=False, compare=False)

    @property
    def bytes_per_prompt(self) -> int:
        return sum(size for _, size in self.conditioning.values())


NO_VALUES = "meta tensor", "unsupported scalarType"  # the latter is what autocast says of the meta device
PROMPTS = ["a cat", "two dogs run after a red ball on a long white beach"]


def load_skeleton(path, *, revision=None, cache_dir=None) -> diffusers.DiffusionPipeline:
    """The pipeline at `path` (a folder or Hub id) with every network on the meta device: no weights are read.

    Configurations, tokenizers and the scheduler are the pipeline's own.

    Raises:
        UserError: as `networks.loading.load_pipeline`, or a component's configuration is missing or does not fit its
            class.
    """
    path, where = str(path), {"revision": revision, "cache_dir": cache_dir}
    index = read_index(path, **where)
    check_not_quantized(path, index, **where)
    cls = getattr(diffusers, str(index["_class_name"]), None)
    if cls is None:
        raise UserError(f"{path} is a {index['_class_name']}, which the installed diffusers does not have: update it.")
    arguments = {**dict.fromkeys(cls._optional_components), **index}
    for name, entry in index.items():
        if isinstance(entry, (list, tuple)) and [type(part) for part in entry] == [str, str]:
            arguments[name] = _component(path, name, *entry, where)
        elif entry == [None, None]:
            arguments[name] = None
    accepted = inspect.signature(cls.__init__).parameters
    try:
        pipeline = cls(**{name: value for name, value in arguments.items() if name in accepted})
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} does not load as a diffusers pipeline: {first_line(error)}") from error
    check_flow_matching(pipeline)
    check_many_steps(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _component(path, name: str, library: str, class_name: str, where: dict):
    try:
        # what is neither library's own lives beside the pipeline that uses it; nothing else is imported
        place = {"diffusers": diffusers, "transformers": transformers}.get(library)
        cls = getattr(place or getattr(diffusers.pipelines, library), class_name)
        where = {"subfolder": name, **where}
        if issubclass(cls, (diffusers.ModelMixin, diffusers.AutoModel)):
            config, make = cls.load_config(path, **where), cls.from_config
        elif issubclass(cls, transformers.PreTrainedModel):
            config = cls.config_class.from_pretrained(path, **where)
            make = functools.partial(cls._from_config, dtype=torch.float32)
        elif place is transformers and hasattr(cls, "from_config"):  # AutoModel and its like, which are no models
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, **where)
            make = functools.partial(cls.from_config, dtype=torch.float32, trust_remote_code=False)
        else:  # no network: its files hold no weights
            return cls.from_pretrained(path, **where)
        with torch.device("meta"):
            return make(config).eval()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"the component {name} of {path}, a {class_name}, has no configuration that fits it: {first_line(error)}"
        ) from error


def measure_shapes(skeleton, *, height: int, width: int, pipeline_kwargs: dict[str, Any] | None = None) -> Shapes:
    """Call `skeleton` for one step and look at what its transformer is given; the skeleton is used up.

    Every network runs on the meta device, where values do not exist; what comes out of it are zeros of the right
    shape. So the pipeline checks its arguments, and the networks check shapes, as with weights.

    Raises:
        UserError: the pipeline cannot make this size, or does not take `pipeline_kwargs`.
        NotImplementedError: a network does not run without values.
    """
    watch = _Watch(skeleton)
    settings = {"height": height, "width": width, "pipeline_kwargs": dict(pipeline_kwargs or {})}
    one, runs = watch.call(PROMPTS[:1], **settings), list(watch.runs)
    skeleton.transformer.register_forward_pre_hook(_stop)  # the second call is for its arguments only
    two = watch.call(PROMPTS, **settings)

    rows = {key: found for key, value in one.items() if (found := _rows(value, two[key])) is not None}
    first = {key: row for key, (_, row, _) in rows.items()}
    embeddings = {key: row for key, row in first.items() if row.ndim > 1 and row.is_floating_point()}
    # what text encoders return is zero here, so only the latents, which are noise, are not
    latent = next((key for key, row in embeddings.items() if row.any()), None)
    if latent is None:
        raise NotImplementedError("no argument of the transformer holds the latents")
    batch = rows[latent][0]
    image_tokens, rest = divmod(watch.tokens[0], batch) if watch.tokens else (None, 0)
    shape = tuple(first.pop(latent).shape)
    return Shapes(
        latent=(latent, shape),
        image_tokens=None if rest else image_tokens,
        # [tokens, width], or [layers, tokens, width]
        text_tokens=sum(max(row.shape[:-1]) for key, row in embeddings.items() if key != latent),
        longer_with_prompt=any(row.shape != last.shape for _, row, last in rows.values()),
        conditioning={key: (tuple(row.shape), row.numel() * row.element_size()) for key, row in first.items()},
        call=dict(one),
        batch=batch,
        runs=runs,
    )


class _Watch:
    """Makes a skeleton callable, and sees what its networks are given.

    Attributes:
        calls: argument -> value, of every run of the transformer in the last call.
        tokens: of every run of the transformer to its end, how many image tokens there were: the values that it
            returned over the width of its last projection.
        runs: as `Shapes.runs`.
    """

    def __init__(self, skeleton):
        self.skeleton, self.calls, self.tokens, self.runs = skeleton, [], [], []
        for name, module in skeleton.components.items():
            for method in ("forward", "decode"):
                if isinstance(module, torch.nn.Module) and hasattr(module, method):
                    function = getattr(module, method)
                    setattr(module, method, _zeros_from_meta(function, functools.partial(self._note, name, function)))
        self._watch_transformer(skeleton.transformer)
        skeleton.scheduler = plain_scheduler(skeleton)
        # everything outside the networks has values, and is on the CPU
        cls = type(skeleton)
        skeleton.__class__ = type(cls.__name__, (cls,), {"_execution_device": torch.device("cpu")})

    def call(self, prompts, *, height: int, width: int, pipeline_kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the transformer is first given in a call of one step; errors as of `measure_shapes`."""
        name, size = type(self.skeleton).__name__, {"height": height, "width": width}
        settings = {"pipeline_kwargs": pipeline_kwargs, "num_inference_steps": 1, "output_type": "np"}
        arguments = call_arguments(self.skeleton, prompts, **size, **settings)
        self.calls.clear()
        try:
            check_size(name, self.skeleton(**arguments)[0], height, width)
        except UserError:
            raise
        except NotImplementedError:
            if not self.calls:  # otherwise these are known, though the transformer or the decoder did not run
                raise
        except Exception as error:  # of any kind: it is the pipeline's own code
            size = f"height {height}, width {width}"
            raise UserError(f"{name} fails when called with {size}: {first_line(error)}") from error
        return self.calls[0]

    def _note(self, name, function, args, kwargs):
        self.runs.append((name, function, args, kwargs))

    def _watch_transformer(self, transformer):
        signature, widths = inspect.signature(transformer.forward), []

        def before(module, args, kwargs):
            self.calls.append(signature.bind(*args, **kwargs).arguments)

        def after(module, args, output):
            tokens, rest = divmod(sum(value.numel() for value in tree_leaves(output[0])), widths[-1])
            if not rest:
                self.tokens.append(tokens)

        for module in transformer.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda module, args, output: widths.append(module.out_features))
        transformer.register_forward_pre_hook(before, with_kwargs=True)
        transformer.register_forward_hook(after)


_REMEMBERED = RememberedOnMeta()


def _stop(module, args):
    raise NotImplementedError


def _zeros_from_meta(function, note):
    """`function` of a network on the meta device, its result as zeros on the CPU; `note` gets the arguments."""
    text_encoder = isinstance(function.__self__, transformers.PreTrainedModel)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        args, kwargs = tree_map_only(torch.Tensor, lambda value: value.to("meta"), (args, kwargs))
        mask = kwargs.get("attention_mask")
        if text_encoder and mask is not None and mask.ndim == 2:
            # transformers asks for the values of a mask of tokens, and takes one of pairs of tokens as it is
            kwargs["attention_mask"] = mask.bool()[:, None, None].expand(-1, -1, mask.shape[1], -1)
        note(args, kwargs)
        try:
            with _REMEMBERED:
                output = function(*args, **kwargs)
        except RuntimeError as error:
            if any(sign in str(error) for sign in NO_VALUES):
                raise NotImplementedError(first_line(error)) from error
            raise
        return tree_map_only(torch.Tensor, lambda value: torch.zeros(value.shape, dtype=value.dtype), output)

    return wrapped


def _rows(one, two) -> tuple[int, torch.Tensor, torch.Tensor] | None:
    """(batch size of `one`, its first row, the last row of `two`), if `two` is twice as long, else None.

    None for single numbers too: times, scales.
    """
    if isinstance(one, (list, tuple)) and len(two) == 2 * len(one) and isinstance(one[0], torch.Tensor):
        return len(one), one[0], two[-1]
    if isinstance(one, torch.Tensor) and one.ndim > 1:
        for dim, size in enumerate(one.shape):
            if two.shape[dim] == 2 * size and size:
                return size, one.select(dim, 0), two.select(dim, -1)
    return None
