# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the rows of a cache depend on besides the text or the image: if any of it differs, the cache is another one.

Keys are flat and as JSON, so that a refusal can name what differs. What comes from where a pipeline was loaded, or
from how it was called last, is left out: the same teacher has the same key.
"""

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from diffusers import DiffusionPipeline

from hf_flowdistill.data.shards import json_digest
from hf_flowdistill.networks.loading import weights_digest
from hf_flowdistill.teachers.encode import ImageEncoder
from hf_flowdistill.teachers.pictures import READING
from hf_flowdistill.teachers.tokens import fed_to_encoders


NO_ENCODERS = "transformer", "vae", "scheduler"
TOKENIZED = "A photo of 2 CATS (8k), naïve café — 猫 🐈\n  don't"
# of a tokenizer's arguments: where it is from, how it was called last, or told in the key by other names
ELSEWHERE = {"name_or_path", "is_local", "local_files_only", "backend", "added_tokens_decoder", "model_max_length"}
ELSEWHERE |= {"chat_template", "tokenizer_class", "processor_class", "padding_side", "truncation_side"}
ELSEWHERE |= {"max_length", "stride", "truncation_strategy", "pad_token_type_id", "pad_to_multiple_of", "padding"}
TOLD_APART = {"transformers_version", "dtype", "torch_dtype", "architectures"}  # by versions, dtypes and class


def encoder_key(
    pipeline, contract, *, components: dict[str, str] | None = None, fed: list | None = None
) -> dict[str, Any]:
    """Everything that a prompt's conditioning depends on besides its text, as JSON.

    That is the text encoders (weights, configuration, dtype) and tokenizers; what encoders are fed for a few texts, at
    the pipeline's own length; the pipeline's source code (its prompt template), settings and arguments; the image
    size, the kind of guidance, and the dtypes; and versions of the libraries.

    Args:
        components: from `component_digests`, which reads all weights; made here if None.
        fed: from `teachers.tokens.fed_to_encoders`, which runs the encoders; made here if None.
    """
    guidance = {**dataclasses.asdict(contract.guidance), "embedded": contract.embedded_guidance}
    key = {
        "pipeline": type(pipeline).__name__,
        "pipeline_source": _source_digest(type(pipeline)),
        "pipeline_kwargs": contract.pipeline_kwargs,
        **{f"pipeline.{name}": value for name, value in _settings(pipeline).items()},
        "size": [contract.height, contract.width],
        "dtypes": {str(name): str(dtype) for name, dtype in contract.dtypes.items()},
        "guidance": guidance,
        **(component_digests(pipeline) if components is None else components),
        "fed": json_digest(fed_to_encoders(pipeline, contract) if fed is None else fed)[:16],
        **_versions("diffusers", "transformers", "tokenizers"),
    }
    return json.loads(json.dumps(key, default=str))


def image_encoder_key(encoder: ImageEncoder) -> dict[str, Any]:
    """Everything that an image's latents depend on besides the image and how it is cropped, as JSON."""
    vae = encoder.vae
    layout = [tensor.tolist() for tensor in (encoder.source, encoder.scale, encoder.shift)]
    key = {
        "vae": type(vae).__name__,
        "vae_weights": weights_digest(vae),
        "vae_dtype": _dtypes(vae),
        **{f"vae.{name}": value for name, value in _configuration(vae).items()},
        "vae.use_tiling": getattr(vae, "use_tiling", False),
        "size": [encoder.height, encoder.width],
        "layout": json_digest([encoder.mode, encoder.latent_shape, encoder.vae_shape, *layout])[:16],
        "reading": READING,
        **_versions("diffusers", "Pillow"),
    }
    return json.loads(json.dumps(key, default=str))


def component_digests(pipeline) -> dict[str, str]:
    """Of everything in `pipeline` that encodes text: name -> digest. All weights are read, which takes its time."""
    return {
        name: _component_digest(component)
        for name, component in sorted(pipeline.components.items())
        if component is not None and name not in NO_ENCODERS
    }


def _component_digest(component) -> str:
    """Of a network's weights, configuration and dtype, or of how a tokenizer (or a processor's) cuts text."""
    if isinstance(component, torch.nn.Module):
        configuration = _configuration(component)
        how = getattr(getattr(component, "config", None), "_attn_implementation", None)
        return _digest([type(component).__name__, weights_digest(component), configuration, how, _dtypes(component)])
    parts = [type(component).__name__, _own_settings(component)] if not hasattr(component, "get_vocab") else []
    tokenizer = getattr(component, "tokenizer", component)
    if hasattr(tokenizer, "get_vocab"):
        parts += [getattr(component, "chat_template", None), _tokenizer_parts(tokenizer)]
    return _digest(parts)


def _tokenizer_parts(tokenizer) -> dict[str, Any]:
    """Not its files: they also hold where it came from and how it was called last."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    given = {
        name: value
        for name, value in getattr(tokenizer, "init_kwargs", {}).items()
        if value is not None and name not in ELSEWHERE and not name.startswith("_") and not name.endswith("_file")
    }
    return {
        "vocabulary": tokenizer.get_vocab(),
        "example": tokenizer(TOKENIZED)["input_ids"],
        "rules": {name: value for name, value in rules.items() if name not in ("truncation", "padding")},
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "given": {name: str(value) for name, value in given.items()},
        **{name: getattr(tokenizer, name, None) for name in ("padding_side", "truncation_side", "chat_template")},
        "model_max_length": tokenizer.model_max_length,
    }


def _own_settings(component) -> dict[str, Any]:
    """Of a processor, an image processor or a guider, those that are not of a tokenizer inside."""
    settings = component.to_dict() if hasattr(component, "to_dict") else _configuration(component)
    return _plain({name: value for name, value in settings.items() if name not in ELSEWHERE and name != "tokenizer"})


def _settings(pipeline) -> dict[str, Any]:
    """What `pipeline` was told when it was made (numbers, templates), registered or kept as an attribute."""
    settings = {**dict(pipeline.config), **vars(pipeline)}
    return _plain({name: value for name, value in sorted(settings.items()) if name not in pipeline.components})


def _configuration(component) -> dict[str, Any]:
    """A network's configuration, without where it was loaded from and by which version."""
    config = getattr(component, "config", None)
    if hasattr(config, "to_diff_dict"):
        config = config.to_diff_dict()
    settings = dict(config) if isinstance(config, Mapping) else {}
    return _plain(settings)


def _plain(value: Any) -> Any:
    """What of `value` JSON can hold, at any depth; without names that begin with an underscore, and `TOLD_APART`."""
    if isinstance(value, Mapping):
        named = {str(name): part for name, part in value.items()}
        kept = {name: _plain(part) for name, part in named.items() if name[:1] != "_" and name not in TOLD_APART}
        return {name: part for name, part in kept.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if isinstance(value, (str, int, float, bool)) else None


def _dtypes(module: torch.nn.Module) -> str:
    return ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()}))


def _versions(*libraries: str) -> dict[str, str]:
    """Major and minor version of each: patches are taken to compute the same."""
    return {library: ".".join(version(library).split(".")[:2]) for library in libraries}


def _source_digest(cls: type) -> str:
    """Of the files that define `cls` and what it is made of besides diffusers' own base classes.

    A class that was typed into an interpreter has none.
    """
    digest = hashlib.sha256()
    for part in cls.__mro__:
        if part not in DiffusionPipeline.__mro__ and not part.__module__.startswith("diffusers.loaders."):
            try:
                digest.update(inspect.getsource(inspect.getmodule(part)).encode())
            except (OSError, TypeError):
                digest.update(part.__qualname__.encode())
    return digest.hexdigest()[:16]


def _digest(value: Any) -> str:
    return json_digest(value)[:16]
