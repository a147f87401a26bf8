# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Arguments that every method's script has: of the teacher, of the optimization, of the output, of a dry run."""

import hashlib
import importlib.util
import json
import math
from pathlib import Path

from hf_flowdistill.cli import (
    COUNT,
    DECAY,
    NATURAL,
    POSITIVE,
    add_call_arguments,
    add_origin_arguments,
    check_installed,
    check_model,
    check_output_dir,
    image_sizes,
)
from hf_flowdistill.errors import UserError
from hf_flowdistill.networks.arguments import LORA_LEARNING_RATE
from hf_flowdistill.teachers.names import GUIDANCE_SCALES
from hf_flowdistill.training.fit_arguments import add_layout_arguments, check_layout_arguments
from hf_flowdistill.training.folders import read_run
from hf_flowdistill.training.ignored import OUTPUT, TEACHER
from hf_flowdistill.training.names import LR_SCHEDULES, ROUNDINGS, TRACKERS
from hf_flowdistill.training.trackers import RUN_NAMES


LEARNING_RATE = 1e-6  # of networks that are trained whole: the paper's, Table 4

# What may change on resume, since it does not change what is computed. Batch and prompts are compared as a whole.
FREE_ON_RESUME = """config output_dir cache_dir prompt_file dataset_name dataset_config_name caption_column
conditioning_cache_dir resume_from_checkpoint max_train_images train_batch_size gradient_accumulation_steps
gradient_checkpointing sharding cpu_offload checkpointing_images checkpoints_total_limit validation_prompts
validation_images num_validation_images report_to logging_dir tracker_project_name tracker_run_name push_to_hub
hub_model_id hub_token hub_private_repo resolution dry_run images_per_second image_cache_dir streaming
fit device_memory images_per_update""".split()
RESOLUTION = 1024  # of a teacher whose configuration tells none


def add_teacher_arguments(parser) -> None:
    add = parser.add_argument_group("teacher").add_argument
    add("--pretrained_model_name_or_path", metavar="PATH", help="the teacher: a diffusers folder or Hub id")
    add("--variant", metavar="NAME", help="variant of the weight files, e.g. fp16")
    add_origin_arguments(add)
    add_call_arguments(add)
    add(
        "--aspect_ratio_buckets",
        type=image_sizes,
        metavar="H,W;H,W",
        help="several sizes instead of --resolution, one for each update; the first is the student's default",
    )
    add("--max_sequence_length", type=int, metavar="TOKENS", help="length of the text, if the pipeline has a choice")
    parser.refuse(*TEACHER)


def add_optimization_arguments(parser) -> None:
    add = parser.add_argument_group(
        "optimization (defaults: the paper's for SD3; the average is SiD-LSG's)"
    ).add_argument
    add("--max_train_images", type=COUNT, default=1_000_000, metavar="IMAGES", help="length of the training")
    add(
        "--learning_rate",
        type=POSITIVE,
        metavar="X",
        help=f"of the generator (default: {LEARNING_RATE}, of a LoRA {LORA_LEARNING_RATE})",
    )
    add(
        "--fake_score_learning_rate",
        type=POSITIVE,
        metavar="X",
        help="of the fake score; as the generator's, but of a LoRA beside a generator that is trained whole "
        f"{LORA_LEARNING_RATE}",
    )
    add("--lr_scheduler", choices=LR_SCHEDULES, default="constant", help="of both; cosine and linear end at 0")
    add("--lr_warmup_images", type=NATURAL, default=0, metavar="IMAGES", help="linear warm-up")
    add("--adam_beta1", type=DECAY, default=0.0, metavar="X", help="decay of the mean gradient")
    add("--adam_beta2", type=DECAY, default=0.999, metavar="X", help="decay of the mean squared gradient")
    add("--adam_epsilon", type=POSITIVE, default=1e-8, metavar="X", help="added to the root of the latter")
    add("--use_8bit_adam", action="store_true", help="Adam's moments in 8 bits, by bitsandbytes")
    add(
        "--bf16_rounding",
        choices=ROUNDINGS,
        help="of updates of bfloat16 weights: stochastic, the default, keeps the smallest on average, from float32 "
        "moments; nearest is the paper's BF16, moments too, and loses those below 1/512 of their weight",
    )
    add("--max_grad_norm", type=POSITIVE, metavar="X", help="clip gradients to this norm; off by default")
    add(
        "--ema_half_life_images",
        type=NATURAL,
        default=500_000,
        metavar="IMAGES",
        help="of the exported average; 0 = off",
    )
    add("--seed", type=int, default=0, metavar="N", help="of all randomness")
    add("--mixed_precision", choices=("no", "bf16"), help="bf16: float32 weights under autocast; as launched")
    add_layout_arguments(add)


def add_output_arguments(parser, name: str) -> None:
    """`name` is the default of the folder and of the tracker's project."""
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default=name, metavar="DIR", help="gets checkpoints, metrics.jsonl and student/")
    add(
        "--checkpointing_images",
        type=NATURAL,
        default=50_000,
        metavar="IMAGES",
        help="interval of checkpoints; 0 = none",
    )
    add("--checkpoints_total_limit", type=COUNT, metavar="N", help="how many checkpoints are kept; all by default")
    add("--resume_from_checkpoint", metavar="PATH", help="'latest' or a checkpoint; goes on bit for bit (on the CPU)")
    add("--validation_prompts", nargs="+", default=[], metavar="TEXT", help="prompts of the sample sheets")
    add("--validation_images", type=COUNT, default=25_000, metavar="IMAGES", help="interval of sample sheets")
    add("--num_validation_images", type=COUNT, default=4, metavar="N", help="samples per validation prompt")
    add(
        "--report_to",
        nargs="+",
        metavar="NAME",
        help="trackers: tensorboard, wandb, comet_ml, ..., all or none (default: tensorboard)",
    )
    add("--logging_dir", default="logs", metavar="DIR", help="of the trackers, inside --output_dir")
    add("--tracker_project_name", default=name, metavar="NAME", help="name of the trackers' project")
    add("--tracker_run_name", metavar="NAME", help=f"of the run, in {', '.join(RUN_NAMES)}; as the folder")
    add("--push_to_hub", action="store_true", help="upload the student at the end")
    add("--hub_model_id", metavar="ID", help="repository to upload to; by default named after --output_dir")
    add(
        "--hub_token", metavar="TOKEN", help="token to upload with; `hf auth login` or HF_TOKEN keep it off the screen"
    )
    add("--hub_private_repo", action="store_true", help="create the repository as private")
    parser.refuse(*OUTPUT)


def add_plan_arguments(parser) -> None:
    add = parser.add_argument_group("plan").add_argument
    add(
        "--dry_run",
        nargs="?",
        type=NATURAL,
        const=0,
        metavar="PROCESSES",
        help="read configurations only, print what would run and stop; on as many processes as launched, or as given",
    )
    add(
        "--images_per_second",
        type=POSITIVE,
        metavar="X",
        help="of all processes together, to tell the time of a --dry_run",
    )


def check_teacher_arguments(args) -> None:
    """Fill in the defaults of `add_teacher_arguments` that depend on others, in place.

    Raises:
        UserError: the teacher is missing, or the size of the images or the guidance is given twice.
    """
    if not args.pretrained_model_name_or_path:
        raise UserError("--pretrained_model_name_or_path is missing.")
    check_model(args.pretrained_model_name_or_path)
    args.resolution = args.resolution or RESOLUTION
    height, width = (args.aspect_ratio_buckets or [(args.resolution, args.resolution)])[0]
    args.height, args.width = args.height or height, args.width or width
    if (args.height, args.width) != (args.aspect_ratio_buckets or [(args.height, args.width)])[0]:
        raise UserError("--height and --width are of one size: leave them out where there are --aspect_ratio_buckets.")
    for name in args.pipeline_kwargs:
        if name.endswith(GUIDANCE_SCALES):
            raise UserError(
                f"--pipeline_kwargs has '{name}', which the training sets: leave it out, and give the scale of the "
                "teacher as --teacher_guidance_scale."
            )
    if args.max_sequence_length is not None:
        args.pipeline_kwargs = {**args.pipeline_kwargs, "max_sequence_length": args.max_sequence_length}


def image_sizes_of(args) -> list[tuple[int, int]]:
    """(height, width) of every size that is trained; the first is the student's."""
    return args.aspect_ratio_buckets or [(args.height, args.width)]


def origin_of(args) -> dict:
    """Where the teacher's files are, as diffusers takes it."""
    return {"revision": args.revision, "cache_dir": args.cache_dir}


def check_optimization_arguments(args) -> None:
    """Fill in the defaults of `add_optimization_arguments` that depend on others, in place.

    Raises:
        UserError: for arguments that are sane by themselves but not together, or need what is not installed.
    """
    check_layout_arguments(args)
    if args.learning_rate is None:
        args.learning_rate = LORA_LEARNING_RATE if args.networks == "lora" else LEARNING_RATE
    if args.fake_score_learning_rate is None:
        args.fake_score_learning_rate = LORA_LEARNING_RATE if args.networks == "lora_fake" else args.learning_rate
    rounds = args.weight_dtype == "bfloat16" and args.networks != "lora"
    if args.bf16_rounding is not None and not rounds:
        raise UserError(
            "--bf16_rounding is of bfloat16 weights that are trained, and LoRAs are float32: choose --weight_dtype "
            "bfloat16 and --networks full or lora_fake, or leave it out."
        )
    if rounds and args.bf16_rounding is None:
        args.bf16_rounding = ROUNDINGS[0]
    check_installed("bitsandbytes", "--use_8bit_adam", args.use_8bit_adam)


def check_output_arguments(args) -> None:
    """Refuse an output folder, a tracker or a repository that could not be written to; fill in the latter's name.

    Raises:
        UserError: with the argument that is to be changed.
    """
    if args.images_per_second is not None and args.dry_run is None:
        raise UserError("--images_per_second tells the time of a --dry_run: give both or neither.")
    check_output_dir(args.output_dir)
    read_run(args.output_dir, resume=args.resume_from_checkpoint is not None)
    args.report_to = args.report_to or ["tensorboard"]
    args.tracker_run_name = args.tracker_run_name or Path(args.output_dir).resolve().name
    if len(args.report_to) > 1 and "none" in args.report_to:
        raise UserError("--report_to has none beside others: leave out none, or the others.")
    others = [name for name in args.report_to if name not in ("none", "tensorboard")]
    if others and args.hub_token:
        raise UserError(f"--hub_token could be stored with the run by {others[0]}: use `hf auth login` instead.")
    installed = [name for name, modules in TRACKERS.items() if any(map(importlib.util.find_spec, modules))]
    trackers = ["all", "none", *installed]
    for name in args.report_to:
        if name not in trackers:
            raise UserError(f"--report_to {name} is not installed here: choose of {', '.join(trackers)}.")
    if args.push_to_hub:
        from hf_flowdistill.hub.push import check_push

        args.hub_model_id = check_push(args.hub_model_id or Path(args.output_dir).name, token=args.hub_token)


def run_settings(args, prompts: list[str], accelerator) -> dict:
    """What a checkpoint records of its run, to refuse going on with another; prompts that are read later, as captions
    of images or a part at a time, by the name of their dataset."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_ON_RESUME}
    for name in ("pretrained_model_name_or_path", "student_model_name_or_path"):
        if settings.get(name) and Path(settings[name]).exists():
            settings[name] = str(Path(settings[name]).resolve())
    settings["prompts"] = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]
    if not prompts:
        settings["prompts"] = [args.dataset_name, args.dataset_config_name, args.caption_column]
    settings["images_per_update"] = math.prod(
        (args.train_batch_size, args.gradient_accumulation_steps, accelerator.num_processes)
    )
    settings["mixed_precision"] = accelerator.mixed_precision
    if length_counts(args):
        settings["max_train_images"] = args.max_train_images
    return json.loads(json.dumps(settings))


def length_counts(args) -> bool:
    """Whether what is computed depends on --max_train_images, which then cannot change on resume."""
    return args.lr_scheduler != "constant" or bool(getattr(args, "step_shares", None))
