# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Write a run, a checkpoint or someone else's student as an ordinary diffusers repository, with its model card.

Of several runs or checkpoints, the student is the mean of their weights. It is as fast as one of them and, where they
differ in --seed only, often better than they are on average.
"""

import copy
import dataclasses
from pathlib import Path

import torch
from diffusers.utils import make_image_grid

from hf_flowdistill.cli import ArgumentParser, json_object, silence_libraries
from hf_flowdistill.commands.card import add_evaluation_arguments, read_evaluation
from hf_flowdistill.commands.inspect import check_device, own_resolution
from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.rollout import NOISE_TYPES
from hf_flowdistill.hub.card import write_card
from hf_flowdistill.hub.export import add_results, check_export_dir, check_shared_components, export_student
from hf_flowdistill.hub.published import load_published
from hf_flowdistill.hub.settings import read_settings, write_settings
from hf_flowdistill.hub.student import few_step_pipeline, load_student
from hf_flowdistill.networks.adapters import merged, save_lora
from hf_flowdistill.networks.loading import load_pipeline
from hf_flowdistill.networks.roles import RoleSettings
from hf_flowdistill.teachers import learn_contract
from hf_flowdistill.training import checkpointing, monitors


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = 4  # samples of each prompt in a grid that is drawn here
# What runs must have in common for their mean to be a student: what they learned from, their sampler, their networks.
OF_ONE_STUDENT = [
    *"teacher_weights height width aspect_ratio_buckets pipeline_kwargs num_steps sigmas noise_type".split(),
    *(field.name for field in dataclasses.fields(RoleSettings)),
]


def parse_args(input_args):
    parser = ArgumentParser(prog="flowdistill export", description=__doc__)
    add = parser.add_argument
    add(
        "runs",
        nargs="*",
        metavar="RUN_OR_CHECKPOINT",
        help="a training's --output_dir, or one of its checkpoints; of several, the mean of their weights",
    )
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
    add(
        "--prompts",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="draw a grid of samples; by default a single run's last",
    )
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

    if bool(args.runs) == bool(args.from_repo):
        parser.error("what to export is missing or given twice: give either runs or --from_repo")
    theirs = ("revision", "num_steps", "noise_type", "resolution", "pipeline_kwargs")
    given = [f"--{name}" for name in theirs if getattr(args, name) is not None]
    if args.runs and given:
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
    pipeline, student = from_repo(args) if args.from_repo else from_runs(args)
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


def from_runs(args):
    """The averaged generator of a checkpoint, or the mean of several, in its teacher's pipeline; what the runs say."""
    found = {checkpoint: checkpointing.read_state(checkpoint) for checkpoint in map(find_checkpoint, args.runs)}
    if len(found) < len(args.runs):
        raise UserError("one checkpoint is given more than once: a mean takes each of them once.")
    (checkpoint, state), several = next(iter(found.items())), len(found) > 1
    settings = common_settings(found)
    teacher = args.teacher or state["settings"]["pretrained_model_name_or_path"]
    check_shared_components(args.shared_components, teacher)
    origin = {} if args.teacher else {name: state["settings"][name] for name in ("revision", "variant")}
    pipeline = load_pipeline(teacher, dtype=DTYPES[args.dtype], cache_dir=args.cache_dir, **origin)
    facts = total_facts(found)
    return pipeline, {
        "network": load_average(list(found), pipeline.transformer, settings),
        "num_steps": settings["num_steps"],
        "sigmas": settings.get("sigmas"),  # runs of earlier versions have none
        "noise_type": settings["noise_type"],
        "pipeline_kwargs": {**settings["pipeline_kwargs"], "height": settings["height"], "width": settings["width"]},
        "teacher": teacher,
        "teacher_revision": origin.get("revision"),
        "training_args": {**settings, "images_seen": facts["images_seen"]},
        "run": facts | ({"averaged": len(found)} if several else {}),
        "grid": None if several else monitors.last_sheet(checkpoint.parent, state),
    }


def find_checkpoint(run) -> Path:
    """The last checkpoint of a run, or the checkpoint itself."""
    path = Path(run).resolve()
    checkpoint = path if (path / checkpointing.STATE_FILE).is_file() else checkpointing.latest_checkpoint(path)
    if checkpoint is None:
        finished = f": its finished student is in {run}/student" if (path / "student").is_dir() else ""
        raise UserError(f"{run} holds no checkpoint{finished or ': give the --output_dir of a training'}.")
    return checkpoint


def common_settings(found) -> dict:
    """The settings of runs, as lists where they differ. What makes a student must not: then a `UserError` says so."""
    settings = {path: state["settings"] for path, state in found.items()}
    first, *others = settings
    for name in OF_ONE_STUDENT:
        for other in others:
            mine, theirs = settings[first].get(name), settings[other].get(name)
            if mine != theirs:
                raise UserError(
                    f"{first} and {other} differ in {name} ({mine} and {theirs}): give runs of one teacher, with the "
                    "same sampler and networks."
                )
    values = {name: [one.get(name) for one in settings.values()] for name in settings[first]}
    return {name: given[0] if all(one == given[0] for one in given) else given for name, given in values.items()}


def total_facts(found) -> dict:
    """What the runs of these checkpoints have cost together, as far as it is known of all; each run counts once."""
    in_order = sorted(found.items(), key=lambda item: item[1]["images_seen"])
    facts = [monitors.training_facts(*run) for run in {path.parent: state for path, state in in_order}.items()]
    known = {name: [one[name] for one in facts] for name in facts[0] if all(name in one for one in facts)}
    hardware = ", ".join(dict.fromkeys(known.pop("hardware", [])))
    return {name: sum(values) for name, values in known.items()} | ({"hardware": hardware} if hardware else {})


@torch.no_grad()
def load_average(found, transformer, settings):
    """The averaged generator of a checkpoint: the teacher's `transformer` with its weights, or in its role.

    Of several checkpoints it is another transformer, with the mean of their weights in float32, adapters merged.
    """
    roles = RoleSettings(**{f.name: settings[f.name] for f in dataclasses.fields(RoleSettings) if f.name in settings})
    transformer = copy.deepcopy(transformer).float() if len(found) > 1 else transformer
    network = roles.share(transformer).add("student") if roles.networks == "lora" else transformer
    mean = None
    for count, checkpoint in enumerate(found, 1):
        checkpointing.load_checkpoint(checkpoint, networks={"ema": network}, optimizers={})
        if len(found) == 1:
            return network
        one = merged(network)
        mean = copy.deepcopy(one) if mean is None else mean
        for total, tensor in zip(mean.parameters(), one.parameters()):
            total.lerp_(tensor, 1 / count)
    return mean


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
