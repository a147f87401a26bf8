# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What `flowdistill export` writes: the student of runs, or one that others have published, and a grid of samples."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import make_image_grid

from hf_flowdistill.commands.inspect import own_resolution
from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.rollout import Sampler
from hf_flowdistill.hub.card import write_card
from hf_flowdistill.hub.export import TeacherSource, TrainingRecord, add_results
from hf_flowdistill.hub.published import load_published
from hf_flowdistill.hub.settings import read_settings, write_settings
from hf_flowdistill.hub.student import few_step_pipeline, load_student
from hf_flowdistill.hub.teacher_card import check_shared_components
from hf_flowdistill.networks.loading import load_pipeline
from hf_flowdistill.teachers import encode_batch, learn_contract
from hf_flowdistill.teachers.finite import finite_images
from hf_flowdistill.training import monitors
from hf_flowdistill.training.averaging import (
    check_teacher,
    common_method,
    common_settings,
    load_average,
    total_facts,
)


COLUMNS = 4  # samples of each prompt in a grid that is drawn here


@dataclass(frozen=True)
class Found:
    """What there is to export.

    Attributes:
        pipeline: the teacher's.
        network: the student's transformer, or its role on the teacher's.
        pipeline_kwargs: arguments of the pipeline's call that the student was trained with, its size among them.
        grid: a picture of its samples, if there is one.
    """

    pipeline: Any
    network: Any
    sampler: Sampler
    pipeline_kwargs: dict[str, Any]
    teacher: TeacherSource
    training: TrainingRecord
    grid: Path | None = None

    def contract(self):
        """The teacher's, at the student's size."""
        return contract_of(self.pipeline, self.pipeline_kwargs)


def contract_of(pipeline, pipeline_kwargs):
    """Of a pipeline whose call has these arguments, its size among them."""
    size = {name: pipeline_kwargs[name] for name in ("height", "width")}
    others = {name: value for name, value in pipeline_kwargs.items() if name not in size}
    return learn_contract(pipeline, pipeline_kwargs=others, **size)


def predict_from_noise(pipeline, pipeline_kwargs, network):
    """One prediction of `network`, a transformer of the pipeline's kind, at sigma 1."""
    contract = contract_of(pipeline, pipeline_kwargs)
    x_t = torch.zeros(1, *contract.latent_shape)
    return contract.velocity(network, x_t, torch.ones(1), encode_batch(pipeline, contract, [""]))


def from_runs(args, found: dict[Path, dict]) -> Found:
    """The averaged generator of a checkpoint, or the mean of several, in its teacher's pipeline; what the runs say.

    Args:
        found: checkpoint -> its state.
    """
    for one in found.values():
        monitors.check_trained(one)
    (checkpoint, state), several = next(iter(found.items())), len(found) > 1
    settings = common_settings(found)
    teacher, origin = find_teacher(args, checkpoint, state["settings"])
    check_shared_components(args.shared_components, teacher)
    dtype, where = getattr(torch, args.dtype), {"cache_dir": args.cache_dir, **origin}
    pipeline = load_pipeline(teacher, dtype=dtype, **where)

    def transformer():
        if dtype == torch.float32:
            return pipeline.transformer
        how = {"subfolder": "transformer", "dtype": torch.float32, "use_safetensors": True}
        return type(pipeline.transformer).from_pretrained(teacher, **how, **where)

    # what was trained whole has weights of its own
    compared = args.teacher or settings.get("networks") == "lora"
    check_teacher(settings, pipeline, teacher, transformer if compared else None)
    facts = total_facts(found)
    pipeline_kwargs = settings["pipeline_kwargs"] | {"height": settings["height"], "width": settings["width"]}
    predict = functools.partial(predict_from_noise, pipeline, pipeline_kwargs)
    return Found(
        pipeline=pipeline,
        network=load_average(list(found), pipeline.transformer, settings, predict),
        sampler=Sampler(settings["num_steps"], settings["noise_type"], settings["sigmas"]),
        pipeline_kwargs=pipeline_kwargs,
        teacher=TeacherSource(teacher, origin.get("revision")),
        training=TrainingRecord(
            arguments={**settings, "images_seen": facts["images_seen"]},
            measured=facts | ({"averaged": len(found)} if several else {}),
            **common_method(found),
        ),
        grid=None if several else monitors.last_sheet(checkpoint.parent, state),
    )


def find_teacher(args, checkpoint: Path, settings: dict) -> tuple[str, dict]:
    """Where the teacher is: as it is told, or as the run recorded it, with its revision and variant.

    Raises:
        UserError: it is no longer where it was.
    """
    if args.teacher:
        return args.teacher, {}
    teacher = settings["pretrained_model_name_or_path"]
    if Path(teacher).is_absolute() and not Path(teacher).exists():  # a folder is recorded by its absolute path
        raise UserError(
            f"{teacher}, the teacher of {checkpoint}, is no longer there: say with --teacher where it is now."
        )
    return teacher, {name: settings[name] for name in ("revision", "variant")}


def from_repo(args) -> Found:
    """A published student in its teacher's pipeline."""
    pipeline, teacher, told = load_published(
        args.from_repo,
        teacher=args.teacher,
        revision=args.revision,
        cache_dir=args.cache_dir,
        dtype=getattr(torch, args.dtype),
    )
    for sentence in told:
        print(f"configuration of {args.from_repo}: {sentence}")
    resolution = args.resolution or own_resolution(pipeline)
    return Found(
        pipeline=pipeline,
        network=pipeline.transformer,
        sampler=Sampler(args.num_steps or 4, args.noise_type or "fresh"),
        pipeline_kwargs={"height": resolution, "width": resolution, **(args.pipeline_kwargs or {})},
        teacher=TeacherSource(teacher),
        training=TrainingRecord(published_by=None if Path(args.from_repo).exists() else args.from_repo),
    )


def draw_grid(folder, args):
    """Samples of the student, as it has been written, on its card: a row for each prompt, from seeds 0 to 3."""
    settings = read_settings(folder)
    student = few_step_pipeline(load_student(folder, settings, dtype=getattr(torch, args.dtype)), settings).to(
        args.device
    )
    with finite_images(student):
        images = [
            student(prompt, generator=torch.Generator(args.device).manual_seed(seed)).images[0]
            for prompt in args.prompts
            for seed in range(COLUMNS)
        ]
    settings["student"]["grid_prompts"] = args.prompts
    write_settings(folder, settings)
    add_results(folder, grid=make_image_grid(images, rows=len(args.prompts), cols=COLUMNS))
    write_card(folder)
