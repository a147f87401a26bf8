# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Tell which ways of training a pipeline fit on given GPUs, from its configurations alone, and how to run them."""

import functools
import gc
import itertools
import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from hf_flowdistill.cli import ArgumentParser, check_model, json_object, silence_libraries
from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.networks.names import NETWORKS, RANK


def main(input_args):
    args = parse_args(input_args)

    from tqdm import tqdm  # what computes is imported here, since it takes seconds

    from hf_flowdistill.planning.choices import SHARE, format_lines
    from hf_flowdistill.training.initial_weights import check_no_student

    silence_libraries()
    check_no_student(args.model, revision=args.revision, cache_dir=args.cache_dir)
    gc.freeze()  # what is imported stays, and is not looked through again and again
    title, choices = f"GB on each of {args.gpus} GPUs of {args.memory:g} GB, {SHARE:.0%} of which may be filled:\n", []
    lines = format_lines(noted(planned(args), choices))
    try:
        for line in itertools.chain([next(lines), title][::-1], lines):
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
    except (UserError, MemoryError):
        raise
    except Exception as error:  # what a network without values raises is of any kind
        raise UserError(f"{args.model} cannot be planned without its weights: {first_line(error)}") from error
    fitting = [choice for choice in choices if choice.fits]
    print("\nWhat fits:\n" if fitting else "\nNothing fits.")
    print("\n".join(choice.command for choice in fitting), end="\n" * bool(fitting))
    if args.output_file:
        listed = json.dumps([choice.as_dict() for choice in choices], indent=2)
        Path(args.output_file).write_text(listed + "\n", encoding="utf-8")


def planned(args) -> Iterator:
    """The choices that the arguments leave, one after the other."""
    from tqdm import tqdm

    from hf_flowdistill.planning.choices import list_choices

    return list_choices(
        args.model,
        gpus=args.gpus,
        memory=args.memory * 1e9,
        height=args.height or args.resolution,
        width=args.width or args.resolution,
        batch_sizes=args.train_batch_size,
        networks=args.networks,
        rank=args.rank,
        guidance_mode=args.guidance_mode,
        pipeline_kwargs=args.pipeline_kwargs,
        share_rollout=args.share_rollout,
        arguments=script_arguments(args),
        progress=functools.partial(tqdm, leave=False, unit="row", dynamic_ncols=True, disable=None),
        revision=args.revision,
        cache_dir=args.cache_dir,
    )


def noted(choices: Iterable, seen: list) -> Iterator:
    """`choices`, each of which is in `seen` afterwards."""
    for choice in choices:
        seen.append(choice)
        yield choice


def parse_args(input_args):
    """Raises: UserError for what no plan can be made of, or written to."""
    parser = ArgumentParser(prog="flowdistill plan", description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL_OR_PATH", help="a diffusers pipeline: a Hub id or a folder")
    add("--gpus", type=int, default=1, metavar="N", help="how many there are")
    add("--memory", type=float, default=80.0, metavar="GB", help="of each of them")
    add("--train_batch_size", type=int, nargs="+", default=[1], metavar="N", help="images per process and micro-batch")
    add("--revision", metavar="NAME", help="branch, tag or commit of the Hub repository")
    add("--cache_dir", metavar="DIR", help="where downloaded models are kept")
    add("--resolution", type=int, default=1024, metavar="PIXELS", help="height and width of the images")
    add("--height", type=int, metavar="PIXELS", help="where it differs from --resolution")
    add("--width", type=int, metavar="PIXELS", help="where it differs from --resolution")
    add(
        "--guidance_mode",
        choices=("cfg", "embedded", "both"),
        help="of teacher and fake score; by default embedded where the transformer embeds a scale, else cfg",
    )
    add(
        "--networks",
        nargs="+",
        choices=NETWORKS,
        default=list(NETWORKS),
        metavar="NAME",
        help="as of train_sid_dit.py",
    )
    add("--rank", type=int, default=RANK, metavar="N", help="of the LoRAs, on all linear layers of the blocks")
    add("--share_rollout", action="store_true", help="as of train_sid_dit.py")
    add(
        "--pipeline_kwargs", type=json_object, default={}, metavar="JSON", help="more arguments of the pipeline's call"
    )
    add("--output_file", metavar="FILE.json", help="all figures as JSON")
    args = parser.parse_args(input_args)
    numbers = {name: [getattr(args, name)] for name in ("gpus", "memory", "resolution", "height", "width", "rank")}
    for name, values in (numbers | {"train_batch_size": args.train_batch_size}).items():
        for value in values:
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"--{name} is {value:g}: it must be above 0.")
    check_model(args.model)
    if args.output_file:
        check_output_file(Path(args.output_file).absolute())
    return args


def script_arguments(args) -> str:
    """What of `args` the training script takes as it is."""
    given = {
        name: value
        for name in ("guidance_mode", "revision", "cache_dir", "resolution", "height", "width")
        if (value := getattr(args, name))
    }
    if args.pipeline_kwargs:
        given["pipeline_kwargs"] = json.dumps(args.pipeline_kwargs)
    return " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in given.items())


def check_output_file(path: Path) -> None:
    """Refuse a file that could not be written at the end."""
    if not path.parent.is_dir():
        raise UserError(f"--output_file {path} is in no folder that exists.")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--output_file {path} cannot be written: name another file.")
