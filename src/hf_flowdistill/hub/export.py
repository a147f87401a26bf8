# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A student as an ordinary diffusers repository: it loads with the stock class, and with its own pipeline.py."""

import copy
import json
import os
import shutil
from pathlib import Path

import diffusers
import torch
from PIL import Image
from safetensors import SafetensorError

import hf_flowdistill
from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.hub.card import GRID_FILE, REPORT_FILE, read_report, write_card
from hf_flowdistill.hub.secrets import without_secrets
from hf_flowdistill.hub.settings import SETTINGS_FILE, read_settings, write_settings
from hf_flowdistill.hub.student import render_pipeline, student_scheduler
from hf_flowdistill.hub.teacher_card import is_hub_id, read_teacher_card
from hf_flowdistill.teachers.watch import guiders


GUIDANCE_OFF = {"guidance_scale": 1.0}


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
    shared_components="copied",
    teacher=None,
    teacher_revision=None,
    license=None,
    training_args=None,
    run=None,
    method=None,
    repo_id=None,
    published_by=None,
    example_prompt=None,
    grid=None,
    grid_prompts=(),
    report=None,
) -> Path:
    """Write `pipeline` with the student's transformer, sampler, pipeline.py, settings and card into `output_dir`.

    Args:
        pipeline: the teacher's pipeline. It is left as it is.
        num_steps: sampler steps of the student; sigma = 1, 1 - 1/n, ..., 1/n, unless the call is given `sigmas`.
        transformer: the student's, of the same class as the teacher's and not wrapped; default: `pipeline`'s own.
        noise_type: "fresh" | "fixed" | "ddim", as in training. The stock scheduler cannot do "fixed": such a
            student is meant to be used through its pipeline.py.
        guidance_off: the arguments of the pipeline's call that make it the student's, `contract.student_arguments`;
            default `{"guidance_scale": 1.0}`, which turns guidance off.
        pipeline_kwargs: further arguments of the call that the student was trained with, which become its defaults.
        dtype: of the transformer's weights; default: as they are.
        shared_components: "copied": text encoders and VAE too, so that the student loads by itself; "referenced": what
            is the student's own only, to be loaded with the rest of a teacher that is on the Hub.
        teacher: Hub id or path for the card; default: where `pipeline` was loaded from.
        teacher_revision: of the teacher on the Hub.
        license: identifier of the student's licence; default: what the teacher's card says.
        training_args: mapping for training_args.json. Secrets and the directories of absolute paths are left out.
        run: what the training measured, for the card: any of images_seen, hardware, training_hours, device_hours, and
            averaged, the number of checkpoints that the weights are the mean of.
        method: a name in `card.METHODS`; default: what training_args say.
        repo_id: where the student will be published, for the card's snippets.
        published_by: id of the repository that the weights come from, if somebody else has trained them.
        example_prompt: what the card's snippets ask for.
        grid: a PIL image, or the path of a PNG, of samples, with `grid_prompts`, one for each row.
        report: an evaluation or the path of one, see `card.read_report`.

    Returns:
        The folder.

    Raises:
        UserError: if `output_dir` holds something else than an earlier export, if the pipeline's class is not one of
            diffusers', if its call does not take an argument of `pipeline_kwargs`, if components are to be referenced
            of a teacher that is not on the Hub, if the report cannot be read, or if the disk is full.
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
    check_shared_components(shared_components, teacher)
    report = read_report(report) if isinstance(report, str | Path) else report

    student = copy.copy(pipeline)
    student._optional_components = [*optional, *absent]
    transformer = _cast(pipeline.transformer if transformer is None else transformer, dtype)
    if type(transformer) is not type(pipeline.transformer):
        raise TypeError(f"the student's {type(transformer).__name__} is no {type(pipeline.transformer).__name__}.")
    num_train_timesteps = pipeline.scheduler.config.get("num_train_timesteps", 1000)
    own = {
        "transformer": transformer,
        "scheduler": student_scheduler(
            num_steps, noise_type, num_train_timesteps, last_sigma=call_defaults.get("sigmas", [None])[-1]
        ),
        **{name: _switched_off(getattr(pipeline, name)) for name in guiders(pipeline)},
    }
    student.register_modules(**own)
    teacher_card = {"license": license} if license else read_teacher_card(teacher, teacher_revision)
    settings = {
        "exported_by": f"hf_flowdistill {hf_flowdistill.__version__}",
        "student": {
            "pipeline_class": base,
            "num_steps": num_steps,
            "noise_type": noise_type,
            "call_defaults": call_defaults,
            "absent_components": absent,
            "shared_components": shared_components,
            "own_components": {name: type(component).__name__ for name, component in own.items()},
            "dtype": str(transformer.dtype).removeprefix("torch."),
            "teacher": teacher if is_hub_id(teacher) else Path(teacher).name,
            "base_model": teacher if is_hub_id(teacher) else None,
            "teacher_revision": teacher_revision,
            "teacher_card": teacher_card,
            "method": method or ("sid_adversarial" if (training_args or {}).get("adversarial") else "sid"),
            "run": run or {},
            "repo_id": repo_id,
            "published_by": published_by,
            "example_prompt": example_prompt,
            "grid_prompts": list(grid_prompts) if grid is not None else [],
        },
        "training_args": without_secrets(training_args or {}),
    }

    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        if shared_components == "copied":
            student.save_pretrained(unfinished)
        else:
            for name, component in own.items():
                component.save_pretrained(unfinished / name)
        _forget_origin(unfinished)
        (unfinished / "pipeline.py").write_text(code, encoding="utf-8")
        write_settings(unfinished, settings)
        add_results(unfinished, report=report, grid=grid)
        _move_contents(unfinished, folder)
        write_card(folder)
    except (OSError, SafetensorError) as error:  # no room, above all
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"{folder} cannot be written: {first_line(error)}; make room, or choose another.") from error
    return folder


def check_shared_components(shared_components, teacher) -> None:
    """Refuse to refer to components of a teacher that nobody else can load."""
    if shared_components == "referenced" and not is_hub_id(str(teacher)):
        raise UserError(f"components of {teacher} cannot be referenced, since it is not on the Hub: copy them.")


def add_results(folder, *, report=None, grid=None) -> None:
    """Add an evaluation (its path, or what `card.read_report` returns) and a picture (path or PIL) to a student."""
    if report is not None:
        report = report if isinstance(report, dict) else read_report(report)
        Path(folder, REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if grid is not None:
        grid = Image.open(grid) if isinstance(grid, str | Path) else grid
        grid.save(Path(folder, GRID_FILE))


def check_export_dir(output_dir) -> Path:
    """`output_dir` as a path, if `export_student` may write there: it is new, empty, or holds an earlier export."""
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose a folder for the student.")
    if folder.is_dir() and any(folder.iterdir()) and read_settings(folder) is None:
        raise UserError(f"{folder} is not empty and holds no earlier export of a student: choose another folder.")
    return folder


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
    """Everything in `source` into `target`, in place of the components and files of an earlier export there.

    The settings go first: what a kill leaves behind is then known as an export of ours, which the next one replaces.
    The index goes last: without it nothing loads what is only half there.
    """
    order = {SETTINGS_FILE: -1, "model_index.json": 1}
    target.mkdir(parents=True, exist_ok=True)
    earlier = [file.parent for file in target.glob("*/*config.json")]
    for folder in {folder for folder in earlier if not (source / folder.name).exists()}:
        shutil.rmtree(folder)
    if not (source / "model_index.json").exists():
        (target / "model_index.json").unlink(missing_ok=True)
    for entry in sorted(source.iterdir(), key=lambda entry: order.get(entry.name, 0)):
        old = target / entry.name
        if old.is_dir():
            shutil.rmtree(old)
        os.replace(entry, old)
    source.rmdir()
