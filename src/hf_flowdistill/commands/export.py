# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Write a run, a checkpoint or someone else's student as an ordinary diffusers repository, with its model card."""

import dataclasses
from pathlib import Path

import torch
from diffusers.utils import make_image_grid

from hf_flowdistill.adapters import merged, save_lora
from hf_flowdistill.commands.card import add_evaluation_arguments, read_evaluation
from hf_flowdistill.commands.inspect import check_device, own_resolution
from hf_flowdistill.errors import UserError
from hf_flowdistill.hub.card import write_card
from hf_flowdistill.hub.export import add_results, check_export_dir, check_shared_components, export_student
from hf_flowdistill.hub.published import load_published
from hf_flowdistill.hub.settings import read_settings, write_settings
from hf_flowdistill.hub.student import few_step_pipeline, load_student
from hf_flowdistill.networks import RoleSettings, load_pipeline
from hf_flowdistill.rollout import NOISE_TYPES
from hf_flowdistill.teachers import learn_contract
from hf_flowdistill.training import checkpointing, monitors
from hf_flowdistill.training.arguments import ArgumentParser, json_object, silence_libraries


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = 4  # samples of each prompt in a grid that is drawn here


def parse_args(input_args):
    parser = ArgumentParser(prog="flowdistill export", description=__doc__)
    add = parser.add_argument
    add("run", nargs="?", metavar="RUN_OR_CHECKPOINT", help="a training's --output_dir, or one of its checkpoints")
    add("--output_dir", required=True, metavar="DIR", help="gets the student")
    add("--dtype", choices=DTYPES, default="float32", help="of all weights")
    add(
        "--shared_components",
        choices=("copied", "referenced"),
        default="copied",
        help="text encoders and VAE in the student's folder, or only a reference to the teacher on the Hub",
    )
    add("--teacher", metavar="PATH", help="the teacher: a diffusers folder or Hub id; the run's, if it is still there")
    add("--repo_id", metavar="ID", help="where the student will be published, for the card")
    add("--license", metavar="ID", help="of the student, as the Hub calls it; the teacher's by default")
    add("--prompts", nargs="+", default=[], metavar="TEXT", help="draw a grid of samples; the run's last by default")
    add_evaluation_arguments(add)
    add("--cache_dir", metavar="DIR", help="where downloaded models are kept")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="NAME", help="where to run")

    add = parser.add_argument_group("a student that others have published").add_argument
    add("--from_repo", metavar="REPO", help="instead of a run: a Hub id or folder with a transformer")
    add("--revision", metavar="NAME", help="branch, tag or commit of that repository")
    add("--num_steps", type=int, metavar="N", help="sampler steps of the student (default: 4)")
    add("--noise_type", choices=NOISE_TYPES, help="noise of the sampler steps after the first (default: fresh)")
    add("--resolution", type=int, metavar="PIXELS", help="height and width; by default the pipeline's")
    add("--pipeline_kwargs", type=json_object, metavar="JSON", help="more arguments of the pipeline's call")
    args = parser.parse_args(input_args)

    if bool(args.run) == bool(args.from_repo):
        parser.error("what to export is missing or given twice: give either a run or --from_repo")
    theirs = ("revision", "num_steps", "noise_type", "resolution", "pipeline_kwargs")
    given = [f"--{name}" for name in theirs if getattr(args, name) is not None]
    if args.run and given:
        parser.error(f"{', '.join(given)} belong to --from_repo: a run knows its own")
    for name in ("num_steps", "resolution"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}: it must be at least 1")
    check_device(args.device)
    check_export_dir(args.output_dir)
    return args


def main(input_args):
    args = parse_args(input_args)
    report = read_evaluation(args)
    silence_libraries()
    pipeline, student = from_repo(args) if args.from_repo else from_run(args)
    pipeline.to(args.device)
    size = {name: student["pipeline_kwargs"][name] for name in ("height", "width")}
    kwargs = {name: value for name, value in student["pipeline_kwargs"].items() if name not in size}
    contract = learn_contract(pipeline, pipeline_kwargs=kwargs, **size)
    guidance_off = contract.student_arguments(student["num_steps"], student.pop("sigmas", None))
    student["pipeline_kwargs"] = {n: v for n, v in student["pipeline_kwargs"].items() if n not in guidance_off}

    pipeline.to("cpu")
    network = student.pop("network", pipeline.transformer)
    folder = export_student(
        pipeline,
        args.output_dir,
        transformer=merged(network),
        dtype=DTYPES[args.dtype],
        guidance_off=guidance_off,
        shared_components=args.shared_components,
        repo_id=args.repo_id,
        license=args.license,
        report=report,
        example_prompt=(args.prompts or [None])[0],
        **student,
    )
    save_lora(pipeline, network, folder)
    if args.prompts:
        draw_grid(folder, args)
    print(folder)


def from_run(args):
    """The averaged generator of a checkpoint in its teacher's pipeline, and what the run says about it."""
    path = Path(args.run)
    checkpoint = path if (path / checkpointing.STATE_FILE).is_file() else checkpointing.latest_checkpoint(path)
    if checkpoint is None:
        finished = f": its finished student is in {path / 'student'}" if (path / "student").is_dir() else ""
        raise UserError(f"{path} holds no checkpoint{finished or ': give the --output_dir of a training'}.")
    state = checkpointing.read_state(checkpoint)
    settings = state["settings"]
    teacher = args.teacher or settings["pretrained_model_name_or_path"]
    check_shared_components(args.shared_components, teacher)
    origin = {} if args.teacher else {"revision": settings["revision"], "variant": settings["variant"]}
    pipeline = load_pipeline(teacher, dtype=DTYPES[args.dtype], cache_dir=args.cache_dir, **origin)
    return pipeline, {
        "network": load_average(checkpoint, pipeline.transformer, settings),
        "num_steps": settings["num_steps"],
        "sigmas": settings.get("sigmas"),  # runs of earlier versions have none
        "noise_type": settings["noise_type"],
        "pipeline_kwargs": {**settings["pipeline_kwargs"], "height": settings["height"], "width": settings["width"]},
        "teacher": teacher,
        "teacher_revision": origin.get("revision"),
        "training_args": {**settings, "images_seen": state["images_seen"]},
        "run": monitors.training_facts(checkpoint.parent, state),
        "grid": monitors.last_sheet(checkpoint.parent, state),
    }


def load_average(checkpoint, transformer, settings):
    """The averaged generator of a checkpoint: the teacher's `transformer` with its weights, or in its role."""
    roles = RoleSettings(**{f.name: settings[f.name] for f in dataclasses.fields(RoleSettings) if f.name in settings})
    network = roles.share(transformer).add("student") if roles.networks == "lora" else transformer
    checkpointing.load_checkpoint(checkpoint, networks={"ema": network}, optimizers={})
    return network


def from_repo(args):
    """A published student in its teacher's pipeline."""
    if args.teacher:
        check_shared_components(args.shared_components, args.teacher)
    pipeline, teacher, told = load_published(
        args.from_repo,
        teacher=args.teacher,
        revision=args.revision,
        cache_dir=args.cache_dir,
        dtype=DTYPES[args.dtype],
    )
    for sentence in told:
        print(f"configuration of {args.from_repo}: {sentence}")
    resolution = args.resolution or own_resolution(pipeline)
    return pipeline, {
        "num_steps": args.num_steps or 4,
        "noise_type": args.noise_type or "fresh",
        "pipeline_kwargs": {"height": resolution, "width": resolution, **(args.pipeline_kwargs or {})},
        "teacher": teacher,
        "published_by": args.from_repo if not Path(args.from_repo).exists() else None,
    }


def draw_grid(folder, args):
    """Samples of the student, as it has been written, on its card: a row for each prompt, from seeds 0 to 3."""
    settings = read_settings(folder)
    student = few_step_pipeline(load_student(folder, settings, dtype=DTYPES[args.dtype]), settings).to(args.device)
    images = [
        student(prompt, generator=torch.Generator(args.device).manual_seed(seed)).images[0]
        for prompt in args.prompts
        for seed in range(COLUMNS)
    ]
    settings["student"]["grid_prompts"] = args.prompts
    write_settings(folder, settings)
    add_results(folder, grid=make_image_grid(images, rows=len(args.prompts), cols=COLUMNS))
    write_card(folder)
