# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Loading a teacher pipeline, and telling its weights from others."""

import hashlib
import json
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoModel, DiffusionPipeline
from torch.distributed.tensor import DTensor

from hf_flowdistill.cli import check_model
from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.networks.reports import complete_weights
from hf_flowdistill.teachers.watch import check_flow_matching


def read_index(path, *, revision=None, cache_dir=None) -> dict:
    """The pipeline's model_index.json: component -> [library, class].

    Raises:
        UserError: there is nothing at `path`, it is no diffusers pipeline, or one without a transformer.
    """
    path, where = str(path), {"revision": revision, "cache_dir": cache_dir}
    check_model(path)
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
        UserError: there is nothing at `path`, it is no diffusers pipeline, has weights that are not in safetensors, is
            quantized, lacks weights, or has not a flow-matching transformer.
    """
    path, where = str(path), {"revision": revision, "cache_dir": cache_dir}
    index = read_index(path, **where)
    check_not_quantized(path, index, **where)
    given = {name: None for name, component in index.items() if component == [None, None]} | components
    try:
        # Pickles can run any code when they are loaded.
        how = {"variant": variant, "dtype": dtype, "use_safetensors": True}
        with complete_weights(path):
            pipeline = DiffusionPipeline.from_pretrained(path, **how, **where, **given)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever kind a file of whatever kind is broken in
        raise UserError(f"{path} does not load as a diffusers pipeline: {first_line(error)}") from error
    check_flow_matching(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_not_quantized(path, index: dict, *, revision=None, cache_dir=None) -> None:
    """Refuse a pipeline of which a network is quantized, from the configurations alone.

    Args:
        index: from `read_index`.

    Raises:
        UserError: naming the component.
    """
    networks = (name for name, entry in index.items() if _is_network(entry))
    for name in networks:
        try:
            config = AutoModel.load_config(str(path), subfolder=name, revision=revision, cache_dir=cache_dir)
        except (OSError, ValueError):  # loading it will say what is wrong
            continue
        if config.get("quantization_config"):
            raise UserError(
                f"the component {name} of {path} is quantized already: give the model it was made from"
                + (", and --base_quantization." if name == "transformer" else ".")
            )


def _is_network(entry) -> bool:
    """Whether an entry of an index, [library, class], names one: nothing else has weights."""
    if not isinstance(entry, (list, tuple)) or [type(part) for part in entry] != [str, str]:
        return False
    library, kind = entry
    cls = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), kind, None)
    # of other libraries and of code beside the pipeline nothing is known
    return cls is None or (isinstance(cls, type) and issubclass(cls, torch.nn.Module))


def configuration(pipeline) -> dict:
    """What a teacher's networks of diffusers and its scheduler are configured as: "transformer.norm_eps" -> a value.

    JSON; where they come from, and with which version they were saved, is not in it.
    """
    configs = {name: getattr(part, "config", None) for name, part in pipeline.components.items()}
    values = {
        f"{name}.{key}": value
        for name, config in configs.items()
        if isinstance(config, dict)  # of diffusers; the conditioning of text encoders is known by its cache
        for key, value in config.items()
        if not key.startswith("_")
    }
    return json.loads(json.dumps(values, default=str))


def weights_digest(network: torch.nn.Module) -> str:
    """16 hexadecimal digits that change with every weight of `network`; all processes ask for a sharded one's."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
