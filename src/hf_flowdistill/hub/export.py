# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A student as an ordinary diffusers repository: it loads with the stock class, and with its own pipeline.py."""

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from safetensors import SafetensorError

import hf_flowdistill
from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.flow.rollout import Sampler
from hf_flowdistill.hub.card import GRID_FILE, REPORT_FILE, read_report, write_card
from hf_flowdistill.hub.secrets import without_secrets
from hf_flowdistill.hub.settings import SETTINGS_FILE, check_export_dir, write_settings
from hf_flowdistill.hub.student import render_pipeline, student_scheduler
from hf_flowdistill.hub.teacher_card import check_shared_components, is_hub_id, read_teacher_card
from hf_flowdistill.teachers.finite import is_finite
from hf_flowdistill.teachers.pictures import to_rgb
from hf_flowdistill.teachers.precision import cast_dtype, floating_dtype
from hf_flowdistill.teachers.watch import guiders


@dataclass(frozen=True)
class TeacherSource:
    """Where a student's teacher is.

    Attributes:
        path: Hub id or path; None is where the exported pipeline was loaded from.
        revision: on the Hub.
    """

    path: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class TrainingRecord:
    """How a student was trained.

    Attributes:
        arguments: for training_args.json. Secrets and the directories of absolute paths are left out.
        measured: for the card: any of images_seen, hardware, training_hours, device_hours, skipped_updates in words,
            and averaged, the number of checkpoints that the weights are the mean of.
        method: a name in `card.METHODS`; None is what the arguments say.
        published_by: id of the repository that the weights come from, if somebody else has trained them.
        not_reached: what the arguments ask for, and the training ended before.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    method: str | None = None
    published_by: str | None = None
    not_reached: Sequence[str] = ()


@dataclass(frozen=True)
class CardContent:
    """What a student's card shows of it.

    Attributes:
        repo_id: where the student will be published, for the snippets.
        license: identifier of the student's licence; None is what the teacher's card says.
        example_prompt: what the snippets ask for.
        grid: a PIL image, or the path of a PNG, of samples.
        grid_prompts: of the grid, one for each row.
        report: an evaluation or the path of one, see `card.read_report`.
    """

    repo_id: str | None = None
    license: str | None = None
    example_prompt: str | None = None
    grid: Image.Image | str | Path | None = None
    grid_prompts: Sequence[str] = ()
    report: dict | str | Path | None = None


def export_student(
    pipeline,
    output_dir,
    sampler: Sampler,
    *,
    transformer=None,
    contract=None,
    pipeline_kwargs=None,
    dtype=None,
    shared_components="copied",
    teacher: TeacherSource = TeacherSource(),
    training: TrainingRecord = TrainingRecord(),
    card: CardContent = CardContent(),
) -> Path:
    """Write `pipeline` with the student's transformer, sampler, pipeline.py, settings and card into `output_dir`.

    Args:
        pipeline: the teacher's pipeline. It is left as it is.
        sampler: of the student. The stock scheduler cannot do the noise type "fixed": such a student is meant to be
            used through its pipeline.py.
        transformer: the student's, of the same class as the teacher's and not wrapped; default: `pipeline`'s own.
        contract: of the teacher: it knows how guidance is turned off; default: with `guidance_scale=1.0`.
        pipeline_kwargs: further arguments of the call that the student was trained with, which become its defaults.
        dtype: of the transformer's weights; default: as they are.
        shared_components: "copied": text encoders and VAE too, so that the student loads by itself; "referenced": what
            is the student's own only, to be loaded with the rest of a teacher that is on the Hub.

    Returns:
        The folder.

    Raises:
        UserError: if `output_dir` holds something else than an earlier export, if the pipeline's class is not one of
            diffusers', if its call does not take an argument of `pipeline_kwargs`, if components are to be referenced
            of a teacher that is not on the Hub, if the report cannot be read, if a weight is not finite, or if
            the disk is full.
        TypeError: if `transformer` is not of the class of the pipeline's transformer.
    """
    folder, base = check_export_dir(output_dir), type(pipeline).__name__
    if getattr(diffusers, base, None) is None:
        raise UserError(f"{base} is not a class of diffusers: a student of it could not be loaded by anyone else.")
    call = _call_defaults(sampler, contract, pipeline_kwargs or {})
    code = render_pipeline(type(pipeline), sampler.noise_type, call, _absent_components(pipeline))
    teacher = replace(teacher, path=str(teacher.path or pipeline.config.get("_name_or_path") or base))
    check_shared_components(shared_components, teacher.path)
    if isinstance(card.report, str | Path):
        card = replace(card, report=read_report(card.report))
    transformer = pipeline.transformer if transformer is None else transformer
    own = _own_components(pipeline, _finite(_cast(transformer, dtype)), sampler, call)
    settings = {
        "exported_by": f"hf_flowdistill {hf_flowdistill.__version__}",
        "student": _student_settings(pipeline, sampler, call, own, shared_components, teacher, training, card),
        "training_args": without_secrets(training.arguments),
    }
    with _written_whole(folder) as unfinished:
        _save_components(pipeline, own, unfinished, shared_components)
        (unfinished / "pipeline.py").write_text(code, encoding="utf-8")
        write_settings(unfinished, settings)
        add_results(unfinished, report=card.report, grid=card.grid)
    return folder


def _finite(transformer):
    """`transformer`, if its weights are."""
    broken = [name for name, tensor in transformer.state_dict().items() if not is_finite(tensor)]
    if broken:
        dtype = str(transformer.dtype).removeprefix("torch.")
        raise UserError(
            f"{len(broken)} of the student's weights are not finite in {dtype}, {broken[0]} for one: "
            + ("export an earlier checkpoint." if dtype == "float32" else "export it with --dtype float32.")
        )
    return transformer


def add_results(folder, *, report=None, grid=None) -> None:
    """Add an evaluation (its path, or what `card.read_report` returns) and a picture (path or PIL) to a student."""
    if report is not None:
        report = report if isinstance(report, dict) else read_report(report)
        Path(folder, REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if grid is not None:
        grid = _picture(grid) if isinstance(grid, str | Path) else grid
        grid.save(Path(folder, GRID_FILE))


def _picture(path) -> Image.Image:
    try:
        with Image.open(path) as opened:
            return to_rgb(opened)
    except Exception as error:  # of the many kinds that PIL's readers have
        raise UserError(f"the picture {path} cannot be read ({first_line(error)}): give another.") from error


def _call_defaults(sampler: Sampler, contract, pipeline_kwargs) -> dict[str, Any]:
    """What the student's call is given by default. What switches guidance off is not what the teacher was given."""
    if contract is not None:
        fixed = contract.student_arguments(sampler.num_steps, sampler.sigmas)
        pipeline_kwargs = {name: value for name, value in pipeline_kwargs.items() if name not in fixed}
    else:
        fixed = {"guidance_scale": 1.0} | ({} if sampler.sigmas is None else {"sigmas": list(sampler.sigmas)})
    return {"num_inference_steps": sampler.num_steps, **fixed, **pipeline_kwargs}


def _absent_components(pipeline) -> list[str]:
    """Stable Diffusion 3 without its T5, for instance: the stock class wants to be told so again when it loads."""
    optional = type(pipeline)._optional_components
    return [name for name, part in pipeline.components.items() if part is None and name not in optional]


def _own_components(pipeline, transformer, sampler: Sampler, call_defaults) -> dict[str, Any]:
    """The student's components that are not its teacher's."""
    if type(transformer) is not type(pipeline.transformer):
        raise TypeError(f"the student's {type(transformer).__name__} is no {type(pipeline.transformer).__name__}.")
    return {
        "transformer": transformer,
        "scheduler": student_scheduler(
            sampler.num_steps,
            sampler.noise_type,
            pipeline.scheduler.config.get("num_train_timesteps", 1000),
            last_sigma=call_defaults.get("sigmas", [None])[-1],
        ),
        **{name: _switched_off(getattr(pipeline, name)) for name in guiders(pipeline)},
    }


def _student_settings(pipeline, sampler, call_defaults, own, shared_components, teacher, training, card) -> dict:
    """What is noted of the student, for its card and for whoever loads it."""
    adversarial, on_hub = training.arguments.get("adversarial"), is_hub_id(teacher.path)
    teacher_card = {"license": card.license} if card.license else read_teacher_card(teacher.path, teacher.revision)
    return {
        "pipeline_class": type(pipeline).__name__,
        "num_steps": sampler.num_steps,
        "noise_type": sampler.noise_type,
        "call_defaults": call_defaults,
        "absent_components": _absent_components(pipeline),
        "shared_components": shared_components,
        "own_components": {name: type(component).__name__ for name, component in own.items()},
        "dtype": str(own["transformer"].dtype).removeprefix("torch."),
        "teacher": teacher.path if on_hub else Path(teacher.path).name,
        "base_model": teacher.path if on_hub else None,
        "teacher_revision": teacher.revision,
        "teacher_card": teacher_card,
        "method": training.method or ("sid_adversarial" if adversarial else "sid"),
        "run": dict(training.measured),
        "repo_id": card.repo_id,
        "published_by": training.published_by,
        "not_reached": list(training.not_reached),
        "example_prompt": card.example_prompt,
        "grid_prompts": list(card.grid_prompts) if card.grid is not None else [],
    }


@contextlib.contextmanager
def _written_whole(folder: Path):
    """A folder beside `folder` to write a student into, whose contents then go to `folder` and get a card there."""
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        yield unfinished
        _forget_origin(unfinished)
        _move_contents(unfinished, folder)
        write_card(folder)
    except (OSError, SafetensorError) as error:  # no room, above all
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"{folder} cannot be written: {first_line(error)}; make room, or choose another.") from error


def _save_components(pipeline, own, folder: Path, shared_components: str) -> None:
    """The student's `own` components; with "copied" the teacher's others too, and the index."""
    if shared_components == "referenced":
        for name, component in own.items():
            component.save_pretrained(folder / name)
        return
    student = copy.copy(pipeline)
    student._optional_components = [*type(pipeline)._optional_components, *_absent_components(pipeline)]
    student.register_modules(**own)
    student.save_pretrained(folder)


def _switched_off(guider):
    return type(guider).from_config(guider.config, enabled=False)


def _cast(transformer, dtype):
    """`transformer` if it has this dtype already, else a copy of it on the CPU."""
    if dtype is None or dtype == floating_dtype(transformer):
        return transformer
    state = transformer.state_dict()
    # Built without weights, so that a large student is not held three times.
    with torch.device("meta"):
        cast = type(transformer).from_config(transformer.config)
    cast.load_state_dict(
        {name: value.to("cpu", cast_dtype(transformer, name, value, dtype)) for name, value in state.items()},
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
