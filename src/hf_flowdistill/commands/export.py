# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Write a run, a checkpoint or someone else's student as an ordinary diffusers repository, with its model card.

Of several runs or checkpoints, the student is the mean of their weights. It is as fast as one of them and, where they
differ in --seed only, often better than they are on average.
"""

from pathlib import Path

from hf_flowdistill.cli import (
    COUNT,
    ArgumentParser,
    check_model,
    json_object,
    silence_libraries,
)
from hf_flowdistill.commands.card import add_evaluation_arguments, read_evaluation
from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.names import NOISE_TYPES
from hf_flowdistill.hub.settings import check_export_dir
from hf_flowdistill.hub.teacher_card import check_repo, check_shared_components
from hf_flowdistill.networks.arguments import add_device_argument, check_device
from hf_flowdistill.training.folders import find_checkpoint, read_state


DTYPES = {name: name for name in ("float32", "bfloat16", "float16")}  # -> as torch calls it
DTYPES |= {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


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
    add_device_argument(add)

    add = parser.add_argument_group("a student that others have published").add_argument
    add("--from_repo", metavar="REPO", help="instead of a run: a Hub id or folder with a transformer")
    add("--revision", metavar="NAME", help="branch, tag or commit of that repository")
    add("--num_steps", type=COUNT, metavar="N", help="sampler steps of the student (default: 4)")
    add("--noise_type", choices=NOISE_TYPES, help="noise of the sampler steps after the first (default: fresh)")
    add("--resolution", type=COUNT, metavar="PIXELS", help="height and width; by default the pipeline's")
    add("--pipeline_kwargs", type=json_object, metavar="JSON", help="more arguments of the pipeline's call")
    args = parser.parse_args(input_args)

    if bool(args.runs) == bool(args.from_repo):
        parser.error("what to export is missing or given twice: give either runs or --from_repo")
    theirs = ("revision", "num_steps", "noise_type", "resolution", "pipeline_kwargs")
    given = [f"--{name}" for name in theirs if getattr(args, name) is not None]
    if args.runs and given:
        parser.error(f"{', '.join(given)} belong to --from_repo: a run knows its own")
    if args.from_repo:
        check_repo(args.from_repo)
    if args.teacher:
        check_model(args.teacher)
        check_shared_components(args.shared_components, args.teacher)
    check_export_dir(args.output_dir)
    args.dtype = DTYPES[args.dtype]
    return args


def read_checkpoints(runs) -> dict[Path, dict]:
    """The last checkpoint of each run, or the run itself if it is one -> its state.

    Raises:
        UserError: one has none, or is given twice.
    """
    found = {checkpoint: read_state(checkpoint) for checkpoint in map(find_checkpoint, runs)}
    if len(found) < len(runs):
        raise UserError("one checkpoint is given more than once: a mean takes each of them once.")
    return found


def main(input_args):
    args = parse_args(input_args)
    report, checkpoints = read_evaluation(args), read_checkpoints(args.runs)

    import torch  # what computes is imported here, since it takes seconds

    from hf_flowdistill.commands.exported import draw_grid, from_repo, from_runs
    from hf_flowdistill.hub.export import CardContent, export_student
    from hf_flowdistill.networks.adapters import merged, save_lora

    args.device = check_device(args.device)
    silence_libraries()
    found = from_repo(args) if args.from_repo else from_runs(args, checkpoints)
    found.pipeline.to(args.device)
    contract = found.contract()
    found.pipeline.to("cpu")
    folder = export_student(
        found.pipeline,
        args.output_dir,
        found.sampler,
        transformer=merged(found.network),
        contract=contract,
        pipeline_kwargs=found.pipeline_kwargs,
        dtype=getattr(torch, args.dtype),
        shared_components=args.shared_components,
        teacher=found.teacher,
        training=found.training,
        card=CardContent(
            repo_id=args.repo_id,
            license=args.license,
            example_prompt=(args.prompts or [None])[0],
            grid=found.grid,
            report=report,
        ),
    )
    save_lora(found.pipeline, found.network, folder)
    if args.prompts:
        draw_grid(folder, args)
    print(folder)
