# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A generator that starts as a student of an earlier training, and not as the teacher."""

from pathlib import Path

import torch
from diffusers import AutoModel
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file

from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.hub.settings import read_settings
from hf_flowdistill.networks.adapters import LORA_FILE, Role
from hf_flowdistill.networks.loading import read_index
from hf_flowdistill.networks.reports import complete_weights
from hf_flowdistill.training.distributed import together


def check_no_student(path, *, revision=None, cache_dir=None) -> None:
    """Refuse a teacher at `path` that is a student which this library has exported.

    Raises:
        UserError: naming the teacher of that student.
    """
    settings = read_settings(path, revision=revision, cache_dir=cache_dir)
    if settings is not None:
        teacher = settings["student"].get("teacher") or "the model it was distilled from"
        raise UserError(
            f"{path} is itself a student of few steps, so it cannot be a teacher: give {teacher} as "
            "--pretrained_model_name_or_path, and this one as --student_model_name_or_path to go on with it."
        )


def check_student(path, teacher, *, revision=None, cache_dir=None) -> None:
    """Refuse a student that is none of this teacher, from their configurations alone. A `path` of None is no student.

    Raises:
        UserError: one of them is no pipeline, or the student's transformer is another one than the teacher's.
    """
    if path is None:
        return
    places = (path, {"cache_dir": cache_dir}), (teacher, {"cache_dir": cache_dir, "revision": revision})
    of_student, of_teacher = (read_index(where, **how)["transformer"][1] for where, how in places)
    if of_student != of_teacher:
        raise UserError(
            f"the student {path} has a {of_student}, but the teacher a {of_teacher}: choose a student of this teacher."
        )
    config, expected = (_load(AutoModel.load_config, where, subfolder="transformer", **how) for where, how in places)
    for name in sorted(config.keys() & expected.keys()):
        if not name.startswith("_") and config[name] != expected[name]:
            raise UserError(
                f"the student {path} has a transformer with {name} {config[name]}, but the teacher one with "
                f"{expected[name]}: choose a student of this teacher."
            )


def load_weights(path, generator: torch.nn.Module, transformer: torch.nn.Module, sharding, *, cache_dir=None) -> None:
    """Give `generator` the weights of the student at `path`; a role gets those of the student's LoRA file.

    Every process calls this. Of a sharded generator's weights only the main process reads the file.

    Args:
        generator: of `Networks.from_teacher`, in the layout of `sharding`.
        transformer: the teacher's, or an empty one of its class.

    Raises:
        UserError: on all processes, if the weights cannot be read or are of another network.
    """
    weights = {}

    def read():
        if isinstance(generator, Role):
            weights.update(_lora(path, generator, cache_dir))
        elif sharding.is_main:
            load = type(transformer).from_pretrained
            how = {"subfolder": "transformer", "dtype": torch.float32, "use_safetensors": True}
            with complete_weights(path):
                weights.update(_load(load, path, cache_dir=cache_dir, **how).state_dict())
        else:
            return
        expected = {name: tensor.shape for name, tensor in generator.state_dict().items()}
        if {name: tensor.shape for name, tensor in weights.items()} != expected:
            what = (
                "LoRA is of other layers or of another rank" if isinstance(generator, Role) else "weights do not fit"
            )
            raise UserError(
                f"the student {path} cannot be gone on with, its {what}: choose a student of this teacher."
            )

    try:
        together(read)
    except OSError as error:
        raise UserError(str(error)) from error
    sharding.fill(generator, weights)


def _lora(path, role: Role, cache_dir) -> dict[str, torch.Tensor]:
    """What `adapters.save_lora` wrote, with the factor alpha / rank taken out of it again."""
    if Path(path).is_dir():
        file = Path(path, LORA_FILE)
        if not file.is_file():
            raise UserError(
                f"the student {path} has no {LORA_FILE} for the generator of --networks lora to start from: choose "
                "--networks lora_fake or full."
            )
    else:
        file = _load(hf_hub_download, path, filename=LORA_FILE, cache_dir=cache_dir)
    scale = role.shared.alpha / role.shared.rank
    return {
        name.removeprefix("transformer."): tensor / (scale if ".lora_B." in name else 1)
        for name, tensor in load_file(file).items()
    }


def _load(load, path, **arguments):
    try:
        return load(path, **arguments)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
