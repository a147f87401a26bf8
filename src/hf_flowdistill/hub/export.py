# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A student as an ordinary diffusers repository: it loads with the stock class, and with its own pipeline.py."""

import copy
import json
import os
import re
import shutil
from pathlib import Path

import diffusers
import torch

import hf_flowdistill
from hf_flowdistill.errors import UserError
from hf_flowdistill.hub.card import is_hub_id, local_license, write_card
from hf_flowdistill.hub.student import SETTINGS_FILE, read_settings, render_pipeline, student_scheduler
from hf_flowdistill.teachers.watch import guiders


GUIDANCE_OFF = {"guidance_scale": 1.0}
SECRET_NAMES = re.compile("token|secret|password|api_?key", re.IGNORECASE)
PATH_NAMES = re.compile("(dir|file|path|config|checkpoint)s?$")
SECRET_VALUES = re.compile(r"hf_[A-Za-z0-9]{16,}")


def export_student(
    pipeline,
    output_dir,
    *,
    num_steps,
    transformer=None,
    noise_type="fresh",
    guidance_off=None,
    pipeline_kwargs=None,
    dtype=None,
    teacher=None,
    license=None,
    training_args=None,
    method="sid",
    repo_id=None,
    **card,
) -> Path:
    """Write `pipeline` with the student's transformer, sampler, pipeline.py, settings and card into `output_dir`.

    Args:
        pipeline: the teacher's pipeline. It is left as it is.
        num_steps: sampler steps of the student; sigma = 1, 1 - 1/n, ..., 1/n.
        transformer: the student's, of the same class as the teacher's and not wrapped; default: `pipeline`'s own.
        noise_type: "fresh" | "fixed" | "ddim", as in training. The stock scheduler cannot do "fixed": such a
            student is meant to be used through its pipeline.py.
        guidance_off: the arguments of the pipeline's call that turn guidance off, with their values; default
            `{"guidance_scale": 1.0}`.
        pipeline_kwargs: further arguments of the call that the student was trained with, which become its defaults.
        dtype: of the transformer's weights; default: as they are.
        teacher: Hub id or path for the card; default: where `pipeline` was loaded from.
        license: of the teacher, hence of the student; default: what the card in a local teacher's folder says.
        training_args: mapping for training_args.json. Secrets and the directories of absolute paths are left out.
        repo_id: where the student will be published, for the card's snippets.
        card: further arguments of `card.write_card`: report, protocol, example_prompt.

    Returns:
        The folder.

    Raises:
        UserError: if `output_dir` holds something else than an earlier export, if the pipeline's class is not one of
            diffusers', or if its call does not take an argument of `pipeline_kwargs`.
        TypeError: if `transformer` is not of the class of the pipeline's transformer.
    """
    folder = check_export_dir(output_dir)
    base = type(pipeline).__name__
    if getattr(diffusers, base, None) is None:
        raise UserError(f"{base} is not a class of diffusers: a student of it could not be loaded by anyone else.")
    guidance_off = GUIDANCE_OFF if guidance_off is None else guidance_off
    call_defaults = {"num_inference_steps": num_steps, **guidance_off, **(pipeline_kwargs or {})}
    # Stable Diffusion 3 without its T5, for instance. The stock class wants to be told so again when it loads.
    optional = type(pipeline)._optional_components
    absent = [name for name, part in pipeline.components.items() if part is None and name not in optional]
    code = render_pipeline(type(pipeline), noise_type, call_defaults, absent)
    teacher = str(teacher or pipeline.config.get("_name_or_path") or base)

    student = copy.copy(pipeline)
    student._optional_components = [*optional, *absent]
    transformer = _cast(pipeline.transformer if transformer is None else transformer, dtype)
    if type(transformer) is not type(pipeline.transformer):
        raise TypeError(f"the student's {type(transformer).__name__} is no {type(pipeline.transformer).__name__}.")
    num_train_timesteps = pipeline.scheduler.config.get("num_train_timesteps", 1000)
    student.register_modules(
        transformer=transformer,
        scheduler=student_scheduler(num_steps, noise_type, num_train_timesteps),
        **{name: _switched_off(getattr(pipeline, name)) for name in guiders(pipeline)},
    )
    settings = {
        "exported_by": f"hf_flowdistill {hf_flowdistill.__version__}",
        "student": {
            "pipeline_class": base,
            "num_steps": num_steps,
            "noise_type": noise_type,
            "call_defaults": call_defaults,
            "absent_components": absent,
            "dtype": str(transformer.dtype).removeprefix("torch."),
            "teacher": teacher if is_hub_id(teacher) else Path(teacher).name,
            "base_model": teacher if is_hub_id(teacher) else None,
            "license": license or local_license(teacher),
            "method": method,
            "repo_id": repo_id,
        },
        "training_args": without_secrets(training_args or {}),
    }

    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    student.save_pretrained(unfinished)
    _forget_origin(unfinished)
    (unfinished / "pipeline.py").write_text(code)
    (unfinished / SETTINGS_FILE).write_text(json.dumps(settings, indent=2, default=str) + "\n")
    _move_contents(unfinished, folder)
    write_card(folder, **card)
    return folder


def check_export_dir(output_dir) -> Path:
    """`output_dir` as a path, if `export_student` may write there: it is new, empty, or holds an earlier export."""
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose a folder for the student.")
    if folder.is_dir() and any(folder.iterdir()) and read_settings(folder) is None:
        raise UserError(f"{folder} is not empty and holds no earlier export of a student: choose another folder.")
    return folder


def without_secrets(arguments) -> dict:
    """`arguments` as they may be published: no tokens, wherever they are, and no directories of this machine."""
    removed = [value for name, value in os.environ.items() if name.startswith("HF_TOKEN")] + _secrets(arguments)
    secrets = [value for value in removed if isinstance(value, str) and len(value) > 5]

    def clean(value, name=""):
        if isinstance(value, dict):
            return {k: clean(v, str(k)) for k, v in value.items() if not SECRET_NAMES.search(str(k))}
        if isinstance(value, list | tuple):
            return [clean(item, name) for item in value]
        if isinstance(value, str | Path):
            value = str(value)
            for secret in secrets:
                value = value.replace(secret, "[removed]")
            value = SECRET_VALUES.sub("[removed]", value)
            # A leading slash alone may mean something else, in a prompt for instance.
            is_path = os.path.isabs(value) and (PATH_NAMES.search(name) or os.path.exists(value))
            return Path(value).name if is_path else value
        return value

    return clean(dict(arguments))


def _secrets(arguments) -> list:
    """The values of all names that say so, in nested mappings too."""
    found = [value for name, value in arguments.items() if SECRET_NAMES.search(str(name))]
    return sum([_secrets(value) for value in arguments.values() if isinstance(value, dict)], found)


def _switched_off(guider):
    return type(guider).from_config(guider.config, enabled=False)


def _cast(transformer, dtype):
    """`transformer` if it has this dtype already, else a copy of it on the CPU."""
    if dtype is None or dtype == transformer.dtype:
        return transformer
    state = transformer.state_dict()
    # Built without weights, so that a large student is not held three times.
    with torch.device("meta"):
        cast = type(transformer).from_config(transformer.config)
    cast.load_state_dict(
        {name: value.to("cpu", dtype if value.is_floating_point() else None) for name, value in state.items()},
        assign=True,
    )
    return cast


def _forget_origin(folder) -> None:
    """Drop the paths that diffusers and transformers note in their configurations, unless they are Hub ids."""
    for file in [*folder.glob("model_index.json"), *folder.glob("*/*config.json")]:
        config = json.loads(file.read_text())
        origins = {"_name_or_path", "name_or_path"} & set(config)
        local = {name for name in origins if not is_hub_id(str(config[name]))}
        if local:
            kept = {name: value for name, value in config.items() if name not in local}
            file.write_text(json.dumps(kept, indent=2) + "\n")


def _move_contents(source, target) -> None:
    """Everything in `source` into `target`, in place of what has the same name there.

    The settings go first: what a kill leaves behind is then known as an export of ours, which the next one replaces.
    The index goes last: without it nothing loads what is only half there.
    """
    order = {SETTINGS_FILE: -1, "model_index.json": 1}
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(source.iterdir(), key=lambda entry: order.get(entry.name, 0)):
        old = target / entry.name
        if old.is_dir():
            shutil.rmtree(old)
        os.replace(entry, old)
    source.rmdir()
