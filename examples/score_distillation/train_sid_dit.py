# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Distil a flow-matching pipeline into a few-step generator, from prompts alone: SiD-DiT, arXiv:2509.25127.

The teacher is any diffusers pipeline that the library's teacher contract accepts. Two networks start as copies of it:
the generator, which becomes the student, and the fake score, which follows what the generator makes. They take turns.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import logging
import math
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, ProjectConfiguration
from diffusers.utils import make_image_grid
from tqdm.auto import tqdm

from hf_flowdistill.cli import (
    ArgumentParser,
    check_output_dir,
    image_sizes,
    json_object,
    silence_libraries,
)
from hf_flowdistill.data.arguments import (
    add_image_arguments,
    check_image_arguments,
    check_images_per_part,
    dataset_settings,
    image_cache_dir,
    pair_settings,
)
from hf_flowdistill.data.cache import cached_conditioning, encoder_key
from hf_flowdistill.data.image_dataset import open_dataset
from hf_flowdistill.data.images import ImagePairs
from hf_flowdistill.data.prompts import PromptStream, read_dataset, read_prompts
from hf_flowdistill.data.shards import check_cache_dir
from hf_flowdistill.errors import UserError, exit_on_user_error, first_line
from hf_flowdistill.flow.draws import draw_bucket, draw_k, global_indices, sample_noise, stream_seed
from hf_flowdistill.flow.rollout import NOISE_TYPES, Sampler, falls_from_one
from hf_flowdistill.flow.timesteps import SIGMA_MEAN, SIGMA_STD, sigma_from_normal
from hf_flowdistill.flow.weighting import WEIGHTINGS, get_weighting
from hf_flowdistill.hub.export import CardContent, TeacherSource, TrainingRecord, check_export_dir, export_student
from hf_flowdistill.hub.push import check_push, push_student
from hf_flowdistill.hub.student import sampler_change
from hf_flowdistill.methods.sid import SiDBatch, SiDConfig, fake_score_turn, generate_x0, generator_turn
from hf_flowdistill.methods.sid_adversarial import AdversarialBatch, AdversarialConfig, adversarial_turns
from hf_flowdistill.networks.adapters import merged, save_lora
from hf_flowdistill.networks.arguments import add_network_arguments, check_network_arguments, role_settings
from hf_flowdistill.networks.features import find_projection
from hf_flowdistill.networks.loading import load_pipeline, weights_digest
from hf_flowdistill.networks.placement import modules_of, move_all_but_transformer, place_text_encoders, streamed
from hf_flowdistill.networks.roles import ROLES, Networks, check_gradient_checkpointing
from hf_flowdistill.planning.cases import Case, Precision, describe_peak
from hf_flowdistill.planning.describe import describe_plan
from hf_flowdistill.teachers import decode, encode_batch, encode_unconditional, first_alike, learn_contracts
from hf_flowdistill.teachers.encode import learn_image_encoder
from hf_flowdistill.training import checkpointing, monitors
from hf_flowdistill.training.adversarial_arguments import add_adversarial_arguments, check_adversarial_arguments
from hf_flowdistill.training.distributed import all_ranks_agree, check_accelerator, check_world_size, stop_signals
from hf_flowdistill.training.ema import EMA
from hf_flowdistill.training.initial_weights import check_student, load_weights
from hf_flowdistill.training.optimizers import (
    LR_SCHEDULES,
    ROUNDINGS,
    apply_update,
    build_optimizer,
    learning_rate_factor,
)
from hf_flowdistill.training.sharding import SHARDINGS, Sharding, count_shards, process_group_backend


logger = get_logger(__name__)

MAX_SKIPPED_IN_A_ROW = 5
GUIDANCE_MODES = ("cfg", "embedded", "both")
PROGRESS = (
    "gap {x0_gap:.4f}",
    "latent {x0_mean:+.3f}/{x0_std:.3f} (teacher {teacher_latent_mean:+.3f}/{teacher_latent_std:.3f})",
    "lag {fake_score_lag:.2f}",
    "gradient {generator_grad_norm:.2g}/{fake_score_grad_norm:.2g}",
    "told real {real_accuracy:.0%} fake {fake_accuracy:.0%}",
    "adversarial {adversarial_share:.0%}",
)
MEASURED_UPDATES = 25  # in one of so many the two terms of an adversarial generator loss are told apart
ALLOWED = (  # which arguments, what they must be, and how to tell
    (
        """height width num_steps max_train_images train_batch_size gradient_accumulation_steps checkpoints_total_limit
        validation_images num_validation_images rank""",
        "at least 1",
        lambda value: value >= 1,
    ),
    (
        """lr_warmup_images ema_half_life_images checkpointing_images dry_run discriminator_warmup_images
        adversarial_start_images discriminator_weight sigmas_start_images""",
        "at least 0",
        lambda value: value >= 0,
    ),
    ("guidance_rescale", "from 0 to 1", lambda value: 0 <= value <= 1),
    ("adam_beta1 adam_beta2", "at least 0 and below 1", lambda value: 0 <= value < 1),
    (
        "learning_rate fake_score_learning_rate adam_epsilon max_grad_norm sigma_std images_per_second lora_alpha",
        "a number above 0",
        lambda value: 0 < value < math.inf,
    ),
    (
        "sigma_mean alpha loss_scale teacher_guidance_scale fake_guidance_scale fake_train_guidance_scale",
        "a finite number",
        math.isfinite,
    ),
)
# What may change on resume, since it does not change what is computed. Batch and prompts are compared as a whole.
FREE_ON_RESUME = """config output_dir cache_dir prompt_file dataset_name dataset_config_name caption_column
conditioning_cache_dir resume_from_checkpoint max_train_images train_batch_size gradient_accumulation_steps
gradient_checkpointing sharding cpu_offload checkpointing_images checkpoints_total_limit validation_prompts
validation_images num_validation_images report_to logging_dir tracker_project_name push_to_hub hub_model_id hub_token
hub_private_repo resolution dry_run images_per_second image_cache_dir streaming""".split()


def parse_args(input_args=None):
    parser = ArgumentParser(
        prog="train_sid_dit.py",
        usage="train_sid_dit.py --pretrained_model_name_or_path PATH --prompt_file FILE.txt [arguments below]",
        description=__doc__,
    )

    add = parser.add_argument_group("teacher and prompts").add_argument
    add("--pretrained_model_name_or_path", metavar="PATH", help="the teacher: a diffusers folder or Hub id")
    add("--revision", metavar="NAME", help="branch, tag or commit of the Hub repository")
    add("--variant", metavar="NAME", help="variant of the weight files, e.g. fp16")
    add("--cache_dir", metavar="DIR", help="where downloaded models are kept")
    add("--prompt_file", metavar="FILE", help="training prompts: .txt with one per line, .jsonl or .csv")
    add("--dataset_name", metavar="NAME", help="training prompts of a dataset instead: a folder or Hub id")
    add("--dataset_config_name", metavar="NAME", help="configuration of the dataset, if it has several")
    add("--caption_column", default="text", metavar="NAME", help="of the dataset, or of a .jsonl or .csv file")
    add("--conditioning_cache_dir", metavar="DIR", help="encoded prompts; conditioning/ in --output_dir by default")
    add("--negative_prompt", default="", metavar="TEXT", help="the unconditional half of guidance; empty by default")
    add("--resolution", type=int, default=1024, metavar="PIXELS", help="height and width of the images")
    add("--height", type=int, metavar="PIXELS", help="where it differs from --resolution")
    add("--width", type=int, metavar="PIXELS", help="where it differs from --resolution")
    add(
        "--aspect_ratio_buckets",
        type=image_sizes,
        metavar="H,W;H,W",
        help="several sizes instead of --resolution, one for each update; the first is the student's default",
    )
    add("--max_sequence_length", type=int, metavar="TOKENS", help="length of the text, if the pipeline has a choice")
    add(
        "--pipeline_kwargs", type=json_object, default={}, metavar="JSON", help="more arguments of the pipeline's call"
    )

    add = parser.add_argument_group("method (defaults: the paper's)").add_argument
    add("--num_steps", type=int, default=4, metavar="N", help="sampler steps of the student")
    add(
        "--sigmas",
        type=float,
        nargs="+",
        metavar="S",
        help="their noise levels, --num_steps numbers that fall from 1; by default 1 - i / num_steps from i = 0",
    )
    add(
        "--sigmas_start_images",
        type=int,
        default=0,
        metavar="N",
        help="train at the default levels until so many images were seen, and only then at --sigmas",
    )
    add("--noise_type", choices=NOISE_TYPES, default="fresh", help="noise of the sampler steps after the first")
    add(
        "--step_shares",
        type=float,
        nargs="+",
        metavar="X",
        help="end with the sampler steps one after the other, each for its share of the images: --num_steps numbers "
        "that sum to 1 or less. Before that, and by default always, every update draws one of them",
    )
    add(
        "--share_rollout",
        action="store_true",
        help="the fake score learns from what the generator's turn, which then comes first, has made: about a "
        "tenth less work. By default each turn has prompts and images of its own",
    )
    add("--alpha", type=float, default=1.0, metavar="X", help="of the generator loss; 1 is Eq. 18")
    add("--weighting", default="1-sigma", metavar="NAME", help=f"of the generator loss: {', '.join(WEIGHTINGS)}")
    add("--loss_scale", type=float, default=100.0, metavar="X", help="factor on the generator loss")
    add("--teacher_guidance_scale", type=float, default=4.5, metavar="X", help="guidance of the teacher; 1 = off")
    add("--fake_guidance_scale", type=float, metavar="X", help="fake score, in the generator loss; as the teacher's")
    add("--fake_train_guidance_scale", type=float, metavar="X", help="fake score, in its own loss; as the teacher's")
    add(
        "--guidance_rescale",
        type=float,
        default=0.0,
        metavar="X",
        help="from 0 to 1: scale the guided teacher's x0 back towards the contrast of its unguided one",
    )
    add(
        "--guidance_mode",
        choices=GUIDANCE_MODES,
        help="how the teacher is guided: in two passes, by a scale that it embeds, or both; by default embedded, "
        "where it can be",
    )
    add("--fake_guidance_mode", choices=GUIDANCE_MODES, help="how the fake score is guided; as the teacher")
    add(
        "--sigma_mean",
        type=float,
        default=SIGMA_MEAN,
        metavar="X",
        help="p(sigma) = sigmoid(Normal(mean, std)) (default: ln 2 = %(default).3f)",
    )
    add("--sigma_std", type=float, default=SIGMA_STD, metavar="X", help="of p(sigma) = sigmoid(Normal(mean, std))")

    add_network_arguments(parser)
    add_adversarial_arguments(parser)
    add_image_arguments(parser)

    add = parser.add_argument_group(
        "optimization (defaults: the paper's for SD3; the average is SiD-LSG's)"
    ).add_argument
    add("--max_train_images", type=int, default=1_000_000, metavar="IMAGES", help="length of the training")
    add("--train_batch_size", type=int, default=2, metavar="IMAGES", help="per process and micro-batch")
    add("--gradient_accumulation_steps", type=int, default=16, metavar="N", help="micro-batches per update")
    add("--learning_rate", type=float, default=1e-6, metavar="X", help="of the generator")
    add("--fake_score_learning_rate", type=float, metavar="X", help="of the fake score; as the generator's")
    add("--lr_scheduler", choices=LR_SCHEDULES, default="constant", help="of both; cosine and linear end at 0")
    add("--lr_warmup_images", type=int, default=0, metavar="IMAGES", help="linear warm-up")
    add("--adam_beta1", type=float, default=0.0, metavar="X", help="decay of the mean gradient")
    add("--adam_beta2", type=float, default=0.999, metavar="X", help="decay of the mean squared gradient")
    add("--adam_epsilon", type=float, default=1e-8, metavar="X", help="added to the root of the latter")
    add("--max_grad_norm", type=float, metavar="X", help="clip gradients to this norm; off by default")
    add("--ema_half_life_images", type=int, default=500_000, metavar="IMAGES", help="of the exported average; 0 = off")
    add("--seed", type=int, default=0, metavar="N", help="of all randomness")
    add("--mixed_precision", choices=("no", "bf16"), help="bf16: float32 weights under autocast; as launched")
    add(
        "--gradient_checkpointing",
        nargs="*",
        choices=ROLES,
        default=False,
        metavar="NETWORK",
        help=f"less memory, more time, in these networks: {', '.join(ROLES)}; without names in all three",
    )
    add(
        "--sharding",
        choices=SHARDINGS,
        default="none",
        help="none: every process holds the networks whole; full: in shards over all processes (FSDP2); hybrid: over "
        "those of one machine",
    )
    add("--cpu_offload", action="store_true", help="sharded: generator, fake score and Adam wait in main memory")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="sid-dit", metavar="DIR", help="gets checkpoints, metrics.jsonl and student/")
    add("--checkpointing_images", type=int, default=50_000, metavar="IMAGES", help="interval of checkpoints; 0 = none")
    add("--checkpoints_total_limit", type=int, metavar="N", help="how many checkpoints are kept; all by default")
    add("--resume_from_checkpoint", metavar="PATH", help="'latest' or a checkpoint; goes on bit for bit (on the CPU)")
    add("--validation_prompts", nargs="+", default=[], metavar="TEXT", help="prompts of the sample sheets")
    add("--validation_images", type=int, default=25_000, metavar="IMAGES", help="interval of sample sheets")
    add("--num_validation_images", type=int, default=4, metavar="N", help="samples per validation prompt")
    add("--report_to", default="tensorboard", metavar="NAME", help="tensorboard, wandb, comet_ml, ..., all or none")
    add("--logging_dir", default="logs", metavar="DIR", help="of the tracker, inside --output_dir")
    add("--tracker_project_name", default="sid-dit", metavar="NAME", help="name of the tracker's project")
    add("--push_to_hub", action="store_true", help="upload the student at the end")
    add("--hub_model_id", metavar="ID", help="repository to upload to; by default named after --output_dir")
    add(
        "--hub_token", metavar="TOKEN", help="token to upload with; `hf auth login` or HF_TOKEN keep it off the screen"
    )
    add("--hub_private_repo", action="store_true", help="create the repository as private")

    add = parser.add_argument_group("plan").add_argument
    add(
        "--dry_run",
        nargs="?",
        type=int,
        const=0,
        metavar="PROCESSES",
        help="read configurations only, print what would run and stop; on as many processes as launched, or as given",
    )
    add(
        "--images_per_second",
        type=float,
        metavar="X",
        help="of all processes together, to tell the time of a --dry_run",
    )

    args = parser.parse_args(input_args)
    height, width = (args.aspect_ratio_buckets or [(args.resolution, args.resolution)])[0]
    args.height, args.width = args.height or height, args.width or width
    for name in ("fake_guidance_scale", "fake_train_guidance_scale"):
        if getattr(args, name) is None:
            setattr(args, name, args.teacher_guidance_scale)
    if args.gradient_checkpointing == []:
        args.gradient_checkpointing = list(ROLES)
    if args.fake_score_learning_rate is None:
        args.fake_score_learning_rate = args.learning_rate
    check_args(args)
    return args


def check_args(args):
    if not args.pretrained_model_name_or_path:
        raise UserError("--pretrained_model_name_or_path is missing.")
    check_combinations(args)
    check_network_arguments(args)
    check_adversarial_arguments(args)
    check_image_arguments(args)
    for names, allowed, holds in ALLOWED:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not holds(value):
                raise UserError(f"--{name} is {value}: it must be {allowed}.")
    check_output_dir(args.output_dir)
    if args.conditioning_cache_dir:
        check_output_dir(args.conditioning_cache_dir, "--conditioning_cache_dir")
        check_cache_dir(args.conditioning_cache_dir, "conditioning", "--conditioning_cache_dir")
    get_weighting(args.weighting)
    if args.max_sequence_length is not None:
        args.pipeline_kwargs = {**args.pipeline_kwargs, "max_sequence_length": args.max_sequence_length}
    if args.report_to not in ("none", "tensorboard") and args.hub_token:
        raise UserError(f"--hub_token could be stored with the run by {args.report_to}: use `hf auth login` instead.")
    trackers = ["all", "none", *map(str, get_available_trackers())]
    if args.report_to not in trackers:
        raise UserError(f"--report_to {args.report_to} is not installed here: choose one of {', '.join(trackers)}.")
    if args.push_to_hub:
        args.hub_model_id = check_push(args.hub_model_id or Path(args.output_dir).name, token=args.hub_token)


def check_combinations(args):
    """Refuse arguments that are sane by themselves but not together."""
    if bool(args.prompt_file) == bool(args.dataset_name):
        raise UserError("the prompts are missing or given twice: use either --prompt_file or --dataset_name.")
    if args.dataset_config_name and not args.dataset_name:
        raise UserError("--dataset_config_name is of a dataset: give --dataset_name too, or leave it out.")
    if (args.height, args.width) != (args.aspect_ratio_buckets or [(args.height, args.width)])[0]:
        raise UserError("--height and --width are of one size: leave them out where there are --aspect_ratio_buckets.")
    if args.cpu_offload and args.sharding == "none":
        raise UserError("--cpu_offload is of sharded networks: give --sharding full too, also on one process.")
    if args.cpu_offload and args.networks == "lora":
        raise UserError("--cpu_offload is of networks that are trained whole, which --networks lora has none of.")
    if args.sharding != "none" and (args.use_8bit_adam or args.base_quantization != "none"):
        raise UserError(
            "bitsandbytes takes no shards: leave out --use_8bit_adam and --base_quantization, or --sharding."
        )
    if args.images_per_second is not None and args.dry_run is None:
        raise UserError("--images_per_second tells the time of a --dry_run: give both or neither.")
    levels, shares = args.sigmas, args.step_shares
    if levels and not (len(levels) == args.num_steps and falls_from_one(levels)):
        raise UserError(f"--sigmas must be {args.num_steps} numbers (--num_steps) that start at 1 and fall towards 0.")
    if args.sigmas_start_images and not levels:
        raise UserError("--sigmas_start_images is when training at --sigmas starts: give both or neither.")
    if shares and (len(shares) != args.num_steps or not all(x >= 0 for x in shares) or not sum(shares) <= 1 + 1e-6):
        raise UserError(f"--step_shares must be {args.num_steps} numbers (--num_steps) from 0 that sum to 1 or less.")


def run_settings(args, prompts, accelerator):
    """What a checkpoint records of its run, to refuse going on with another."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_ON_RESUME}
    for name in ("pretrained_model_name_or_path", "student_model_name_or_path"):
        if settings[name] and Path(settings[name]).exists():
            settings[name] = str(Path(settings[name]).resolve())
    settings["prompts"] = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]
    if args.adversarial:  # the prompts come with the images, later
        settings["prompts"] = [args.dataset_name, args.dataset_config_name, args.caption_column]
    processes = accelerator.num_processes
    settings["images_per_update"] = args.train_batch_size * args.gradient_accumulation_steps * processes
    settings["mixed_precision"] = accelerator.mixed_precision
    if args.lr_scheduler != "constant" or args.step_shares:
        settings["max_train_images"] = args.max_train_images
    return json.loads(json.dumps(settings))


def plan(args, prompts, accelerator):
    """What would run, from configurations alone, and that it can as far as these tell."""
    if not accelerator.is_main_process:
        return
    processes = args.dry_run or accelerator.num_processes
    origin = {"revision": args.revision, "cache_dir": args.cache_dir}
    largest = max(args.aspect_ratio_buckets or [(args.height, args.width)], key=math.prod)
    case = Case(
        role_settings(args),
        Precision(
            "",
            getattr(torch, args.weight_dtype),
            accelerator.mixed_precision == "bf16",
            args.bf16_rounding or ROUNDINGS[0],
        ),
        tuple(args.gradient_checkpointing or ()),
        args.train_batch_size,
        cached=args.sharding == "none",
        share_rollout=args.share_rollout,
        use_8bit_adam=args.use_8bit_adam,
    )
    try:
        peak = describe_peak(
            args.pretrained_model_name_or_path,
            case,
            processes=count_shards(args.sharding, processes),
            sharding=args.sharding,
            cpu_offload=args.cpu_offload,
            **dict(zip(("height", "width"), largest)),
            guidance={name: value for name, value in vars(args).items() if "guidance_" in name},
            pipeline_kwargs=args.pipeline_kwargs,
            **origin,
        )
    except NotImplementedError as error:
        peak = [f"the peak is not known without the weights ({first_line(error)})"]
    if args.adversarial:
        peak.append("not in it: the pass of the real images, half of the fake score's activations again")
    print(
        describe_plan(
            args.pretrained_model_name_or_path,
            **origin,
            height=args.height,
            width=args.width,
            aspect_ratio_buckets=args.aspect_ratio_buckets,
            pipeline_kwargs=args.pipeline_kwargs,
            weight_dtype=getattr(torch, args.weight_dtype),
            autocast=accelerator.mixed_precision,
            shards=count_shards(args.sharding, processes),
            cpu_offload=args.cpu_offload,
            roles=role_settings(args),
            bf16_rounding=args.bf16_rounding,
            use_8bit_adam=args.use_8bit_adam,
            prompts=len(set(prompts)),
            max_train_images=args.max_train_images,
            batch_size=args.train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            processes=processes,
            images_per_second=args.images_per_second,
            peak=peak,
        )
    )


def main(input_args=None):
    # ----------------------------------------------------------------------------------- refuse early what cannot work
    args = parse_args(input_args)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        # the others wait while the main process writes a checkpoint, which can take longer than the default allows
        kwargs_handlers=[
            InitProcessGroupKwargs(process_group_backend(args.cpu_offload), timeout=timedelta(hours=2)),
            # sharded weights are gathered anew for every pass; their autocast copies must not outlive them
            AutocastKwargs(cache_enabled=args.sharding == "none"),
        ],
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))),
    )
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.logger.setLevel(logging.INFO)
    silence_libraries()
    if args.weight_dtype != "float32" and accelerator.mixed_precision != "no":
        raise UserError(
            f"--weight_dtype {args.weight_dtype} goes without autocast: launch without --mixed_precision, or with no."
        )
    check_world_size(accelerator.num_processes)
    check_accelerator(accelerator)
    check_images_per_part(args, args.dry_run or accelerator.num_processes)
    prompts = read_training_prompts(args)
    settings = run_settings(args, prompts, accelerator)
    recorded = checkpointing.read_run(args.output_dir, resume=args.resume_from_checkpoint is not None)
    for earlier in recorded:
        checkpointing.check_same_run(earlier, settings)
    check_export_dir(Path(args.output_dir, "student"))
    origin = {"revision": args.revision, "cache_dir": args.cache_dir}
    check_student(args.student_model_name_or_path, args.pretrained_model_name_or_path, **origin)
    if args.dry_run is not None:
        return plan(args, prompts, accelerator)
    accelerator.wait_for_everyone()  # everyone has looked at the output folder before anyone writes there
    if accelerator.is_main_process:
        checkpointing.remove_unfinished(args.output_dir)
    accelerator.wait_for_everyone()
    checkpoint = checkpointing.find_resume(args.output_dir, args.resume_from_checkpoint)
    if checkpoint is not None:
        recorded.append(checkpointing.read_state(checkpoint)["settings"])
        checkpointing.check_same_run(recorded[-1], settings)

    # ---------------------------------------------------------------- the teacher, and how it talks to its transformer
    run = SimpleNamespace(args=args, accelerator=accelerator)  # what the functions below share
    load = functools.partial(load_pipeline, args.pretrained_model_name_or_path, variant=args.variant, **origin)
    run.sharding = Sharding(args.sharding, accelerator.device, cpu_offload=args.cpu_offload)
    run.pipeline = run.sharding.load(load)
    sizes = args.aspect_ratio_buckets or [(args.height, args.width)]
    with on_device(run):
        contracts = learn_contracts(run.pipeline, sizes, args.pipeline_kwargs, row_by_row=args.sharding != "none")
    run.contract = contracts[0]
    if args.sigmas and "sigmas" not in inspect.signature(run.pipeline.__call__).parameters:
        raise UserError(
            f"{run.contract.pipeline_class} takes no sigmas in its call, so a student of it could not be given them: "
            "leave out --sigmas."
        )
    args.guidance_mode, args.fake_guidance_mode = choose_guidance(args, run.contract)
    roles = role_settings(args)
    roles.layers(run.pipeline.transformer)  # which refuses unknown names, while that is early
    find_features(run)
    settings["teacher_weights"] = weights_digest(run.pipeline.transformer)
    for earlier in recorded:
        checkpointing.check_same_run(earlier, settings)
    logger.info(f"the teacher's contract:\n{run.contract.describe()}")

    dtype = getattr(torch, args.weight_dtype)
    teacher = run.sharding.release(run.pipeline, dtype)

    # ---------------------------------------------------------------- all text before training; its encoders rest then
    run.contracts = contracts
    resumed = checkpointing.read_state(checkpoint) if checkpoint else {}
    run.pairs = open_pairs(run, resumed.get("images")) if args.adversarial else None
    record_run(run, settings, recorded)
    take_texts(run, prompts, resumed.get("images_seen", 0))

    # ------------------------------------------------------------------------------- networks, optimizers, checkpoints
    if args.gradient_checkpointing:
        with streamed([teacher], accelerator.device):
            check_gradient_checkpointing(teacher, functools.partial(predict_once, use_bucket(run, 0)))
    placed = {"copy": run.sharding.copy, "device": accelerator.device if args.sharding == "none" else None}
    run.networks = Networks.from_teacher(teacher, dtype, roles, **placed, seed=args.seed)
    if args.gradient_checkpointing:
        run.networks.enable_gradient_checkpointing(args.gradient_checkpointing)
    start_generator(run, checkpoint)
    run.ema = EMA(run.networks.generator, args.ema_half_life_images, copy=run.sharding.copy)
    run.optimizers = {name: build_adam(args, name, network) for name, network in run.networks.trained().items()}
    run.saved = {"networks": {**run.networks.trained(), "ema": run.ema.model}, "optimizers": run.optimizers}
    kind = AdversarialConfig if args.adversarial else SiDConfig
    run.config = kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})
    if checkpoint is None:
        run.state = {"images_seen": 0, "step": 0, "skipped_updates": 0, "settings": settings, "averages": {}}
        run.state["teacher"] = [measure_teacher(use_bucket(run, i)) for i in range(len(run.buckets))]
    else:
        run.state = checkpointing.load_checkpoint(checkpoint, **run.saved)
        checkpointing.set_aside_later(args.output_dir, run.state["images_seen"])
        logger.info(f"going on from {checkpoint}")
    run.state |= monitors.describe_hardware(accelerator)

    # -------------------------------------------------------------------------------------------------- train and save
    logger.info(
        f"{run.prompts.count} prompts ({len(run.prompts.distinct)} distinct), {settings['images_per_update']} images "
        f"per update: {accelerator.num_processes} processes x {args.gradient_accumulation_steps} micro-batches x "
        f"{args.train_batch_size}"
    )
    with stop_signals() as run.stop_signals:
        finished = train(run)
    accelerator.wait_for_everyone()
    if finished:
        save_student(run)
    accelerator.end_training()


def record_run(run, settings, recorded):
    """Note in the output folder, before anything else is written there, which run it is of, or refuse another one."""
    if run.pairs is not None:
        settings["dataset"] = run.pairs.identity
    for earlier in recorded:
        checkpointing.check_same_run(earlier, settings)
    if run.accelerator.is_main_process:
        checkpointing.write_run(run.args.output_dir, settings)


def on_device(run):
    """Inside, the pipeline runs on the device, whatever of it waits in main memory."""
    return streamed(modules_of(run.pipeline).values(), run.accelerator.device)


def find_features(run):
    """Where the discriminator's features are in the transformer, or a refusal."""
    args = run.args
    if args.adversarial:
        with on_device(run):
            args.discriminator_features = find_projection(run.pipeline, run.contract, args.discriminator_features)
        logger.info(f"the discriminator's features are the input of {args.discriminator_features}")


def start_generator(run, checkpoint):
    """Give the generator the weights of the student that it goes on with, unless a checkpoint is to have others."""
    args, path, transformer = run.args, run.args.student_model_name_or_path, run.pipeline.transformer
    if path and checkpoint is None:
        load_weights(path, run.networks.generator, transformer, run.sharding, cache_dir=args.cache_dir)
        sampler = args.num_steps, args.noise_type, args.sigmas
        if changed := sampler_change(path, *sampler, cache_dir=args.cache_dir):
            logger.warning(changed)


def predict_once(run, network):
    """One prediction of `network`: the velocity at sigma 0.5 of what the first prompt's noise is there."""
    x_t = sample_noise(
        run.contract.latent_shape, seed=0, step=0, purpose="check", indices=[0], device=run.accelerator.device
    )
    with run.accelerator.autocast():
        return run.contract.velocity(network, x_t, x_t.new_full((1,), 0.5), run.conditional[[0]].to(x_t.device))


def build_adam(args, name, network):
    return build_optimizer(
        network,
        betas=(args.adam_beta1, args.adam_beta2),
        epsilon=args.adam_epsilon,
        rounding=args.bf16_rounding,
        use_8bit_adam=args.use_8bit_adam,
        seed=stream_seed(args.seed, name),
    )


def read_training_prompts(args):
    if args.adversarial and args.dry_run is None:
        return []  # they come with the images
    if args.adversarial:
        return read_captions(args)
    if args.dataset_name:
        return read_dataset(args.dataset_name, args.dataset_config_name, args.caption_column)
    return read_prompts(args.prompt_file, args.caption_column)


def read_captions(args):
    """The captions of the pairs, for a dry run: streamed if that is possible, otherwise as the run will read them."""
    settings = dataset_settings(args)
    try:
        return open_dataset(args.dataset_name, **{**settings, "streaming": True}).captions()
    except UserError as error:
        if args.streaming or error.__cause__ is None:  # it can be read, and what is wrong with it stays so
            raise
    return open_dataset(args.dataset_name, **settings).captions()


def open_pairs(run, state):
    """The text-image pairs; `state` is that of a checkpoint, or None."""
    dataset = open_dataset(run.args.dataset_name, **dataset_settings(run.args))
    with on_device(run):
        encoder = learn_image_encoder(run.pipeline, run.contract)
    return ImagePairs(
        image_cache_dir(run.args),
        dataset,
        encoder,
        **pair_settings(run.args),
        rank=run.accelerator.process_index,
        world_size=run.accelerator.num_processes,
        wait=run.accelerator.wait_for_everyone,
        state=state,
    )


def take_texts(run, prompts, images_seen):
    """Encode `prompts`, or the pairs that follow `images_seen` images and their captions; all processes together."""
    device = run.accelerator.device
    if run.pairs is not None:
        run.pipeline.vae.to(device)
        run.pairs.move_to(images_seen)
        prompts = run.pairs.captions
    run.prompts = PromptStream(prompts, run.args.seed)
    place_text_encoders(run.pipeline, device)
    encode_buckets(run, run.contracts)
    kept = run.pairs is not None or run.accelerator.is_main_process  # to decode samples, or for the next pairs
    move_all_but_transformer(run.pipeline, "cpu" if kept else "meta")


def turns_of(run):
    """Name of the network -> the turn that it has in this update."""
    if run.pairs is None:
        return {"fake_score": fake_score_turn, "generator": generator_turn}
    seen = run.state["images_seen"]
    if run.pairs.is_over(seen):
        take_texts(run, None, seen)
    run.state["images"] = run.pairs.state
    return adversarial_turns(run.config, seen)


def encode_buckets(run, contracts):
    """Put contract and conditioning of every image size in `run.buckets`; sizes may share the latter."""
    run.buckets = []
    with on_device(run):
        alike = first_alike(run.pipeline, contracts)
    for contract, first in zip(contracts, alike):
        run.contract = contract
        encoded = run.buckets[first][1:] if first < len(run.buckets) else encode_all(run)
        run.buckets.append((contract, *encoded))


def use_bucket(run, number):
    """`run`, from here on with the images of this size."""
    run.bucket = number
    run.contract, run.conditional, run.validation_conditional, run.unconditional = run.buckets[number]
    return run


def encode_all(run):
    """Conditioning of the training, the validation and the negative prompts, read from a cache on the disk."""
    args, accelerator = run.args, run.accelerator
    # a cache is of one size; those whose conditioning is another than the first's have theirs inside it
    part = f"{run.contract.height}x{run.contract.width}" if run.buckets else ""
    home = Path(args.output_dir) if run.pairs is None else run.pairs.folder
    cached = functools.partial(
        cached_conditioning,
        Path(args.conditioning_cache_dir or home / "conditioning", part),
        encoder_key(run.pipeline, run.contract),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
    )

    def encode(texts, encode=encode_batch):
        with on_device(run):
            return encode(run.pipeline, run.contract, texts)

    conditional = cached(run.prompts.distinct, encode)
    # apart, so that changing them on resume cannot touch the last digit of the others
    validation = cached(args.validation_prompts, encode) if args.validation_prompts else None
    unconditional = cached(
        [args.negative_prompt],
        lambda texts: encode(*texts, encode=encode_unconditional),
        role="negative prompt",
    )
    logger.info(f"the prompts are encoded, {conditional[0].nbytes:,} bytes each")
    return conditional, validation, unconditional[0].to(accelerator.device)


def train(run):
    """Fake score, generator, average, until max_train_images; False if told to stop before."""
    args, state, is_main_process = run.args, run.state, run.accelerator.is_main_process
    images_per_update = state["settings"]["images_per_update"]
    if is_main_process:
        metrics_file = monitors.MetricsFile(Path(args.output_dir, "metrics.jsonl"), images_seen=state["images_seen"])
        run.accelerator.init_trackers(
            args.tracker_project_name, monitors.tracker_config(args), init_kwargs={"wandb": {"dir": args.output_dir}}
        )
    progress = tqdm(total=args.max_train_images, initial=state["images_seen"], unit="img", disable=not is_main_process)
    skipped_in_a_row, shown = 0, {}
    while state["images_seen"] < args.max_train_images:
        start = time.perf_counter()
        loss_of = turns_of(run)
        early = state["images_seen"] < args.sigmas_start_images
        run.config = dataclasses.replace(run.config, sigmas=None if early else args.sigmas)
        done = state["images_seen"] / args.max_train_images
        k = draw_k(args.seed, state["step"], args.num_steps, shares=args.step_shares, progress=done)
        use_bucket(run, draw_bucket(args.seed, state["step"], len(run.buckets)))
        factor = learning_rate_factor(
            args.lr_scheduler,
            state["images_seen"],
            batch_size=images_per_update,
            warmup=args.lr_warmup_images,
            end=args.max_train_images,
        )
        rates = {"fake_score": factor * args.fake_score_learning_rate, "generator": factor * args.learning_rate}
        run.rollouts = []
        turns = list(loss_of)[::-1] if args.share_rollout else list(loss_of)
        results = {turn: run_turn(run, turn, loss_of[turn], k, rates[turn]) for turn in turns}
        state["step"] += 1
        state["images_seen"] += images_per_update
        run.ema.update(run.networks.generator, batch_size=images_per_update, images_seen=state["images_seen"])

        skipped = sum(not taken for taken, _ in results.values())
        state["skipped_updates"] += skipped
        skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0
        if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise SystemExit(
                f"error: a loss or its gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, up to "
                f"{state['images_seen']} images: lower the learning rates, or clip gradients with --max_grad_norm."
            )
        if is_main_process:
            record = {
                **{name: state[name] for name in ("images_seen", "step", "skipped_updates")},
                **{"k": k, "learning_rate": rates["generator"]},
                **{name: value for turn in loss_of for name, value in results[turn][1].items()},
                **({"height": run.contract.height, "width": run.contract.width} if args.aspect_ratio_buckets else {}),
                **state["teacher"][run.bucket],
                "images_per_second": images_per_update / (time.perf_counter() - start),
            }
            record |= monitors.drift(record)
            for sentence in monitors.watch(record, state["averages"], num_steps=args.num_steps):
                progress.clear()
                logger.warning(sentence)
            metrics_file.write(record)
            run.accelerator.log(record, step=state["images_seen"])
            shown |= record
            progress.set_postfix_str(monitors.progress(shown, PROGRESS), refresh=False)
        progress.update(images_per_update)
        stop = not all_ranks_agree(not run.stop_signals, run.accelerator.device)
        if stop or is_due(run, args.checkpointing_images):
            limit = args.checkpoints_total_limit
            written = checkpointing.save_checkpoint(args.output_dir, state=state, total_limit=limit, **run.saved)
        if stop:
            progress.close()
            if written is None:
                raise SystemExit("error: told to stop, but the last steps could not be saved.")
            logger.info(f"told to stop: {written} is written, go on with --resume_from_checkpoint latest")
            return False
        if args.validation_prompts and is_due(run, args.validation_images):
            for number in range(len(run.buckets)):
                validate(use_bucket(run, number))
    progress.close()
    return True


def run_turn(run, turn, loss_of, k, learning_rate):
    """One update of the network called `turn`: every micro-batch forward and backward, then one guarded step."""
    accumulation, micro_batches = run.args.gradient_accumulation_steps, []
    with run.networks.training(turn):
        for micro_batch in range(accumulation):
            batch = draw_batch(run, turn, micro_batch, k)
            with run.accelerator.autocast():
                loss, metrics = loss_of(run.networks, run.contract, batch, run.config)
            (loss / accumulation).backward()
            if run.args.share_rollout and turn == "generator":
                run.rollouts.append(batch.x0)
            micro_batches.append({f"{turn}_loss": loss.detach(), **metrics})
    metrics = monitors.average_metrics(micro_batches)
    taken, metrics[f"{turn}_grad_norm"] = apply_update(
        run.optimizers[turn],
        loss=metrics[f"{turn}_loss"],
        learning_rate=learning_rate,
        max_grad_norm=run.args.max_grad_norm,
    )
    return taken, metrics


def draw_batch(run, turn, micro_batch, k):
    """Prompts, noise and sigma of one micro-batch: a function of seed, step, turn and place in the global batch."""
    args, accelerator, latent_shape = run.args, run.accelerator, run.contract.latent_shape
    indices = global_indices(
        micro_batch, args.train_batch_size, rank=accelerator.process_index, world_size=accelerator.num_processes
    )
    draw = functools.partial(
        sample_noise, seed=args.seed, step=run.state["step"], indices=indices, device=accelerator.device
    )
    prompts = "generator" if args.share_rollout else turn
    seen = run.state["images_seen"]
    positions = [seen + i for i in indices]
    if args.adversarial and (turn == "fake_score" or args.share_rollout):
        pairs = run.pairs.rows(positions)
        rows = run.prompts.row_of[pairs]
    else:
        rows = run.prompts.rows(prompts, positions)
    batch = SiDBatch(
        conditional=run.conditional[rows].to(accelerator.device),
        unconditional=run.unconditional,
        k=k,
        noises=lambda i: draw(latent_shape, purpose=f"{turn} step {i}"),
        sigma=sigma_from_normal(draw((), purpose=f"{turn} sigma"), args.sigma_mean, args.sigma_std),
        noise=draw(latent_shape, purpose=f"{turn} noise"),
        x0=run.rollouts[micro_batch] if run.rollouts and turn == "fake_score" else None,
    )
    if not args.adversarial:
        return batch
    since_start = (seen - args.adversarial_start_images) // run.state["settings"]["images_per_update"]
    return AdversarialBatch(
        **vars(batch),
        real=run.pairs.latents(pairs).to(accelerator.device) if turn == "fake_score" else None,
        measured=since_start % MEASURED_UPDATES == 0,
    )


def is_due(run, interval):
    """Whether the last update passed a multiple of `interval` images, or was the last of all. 0 is never."""
    seen, images_per_update = run.state["images_seen"], run.state["settings"]["images_per_update"]
    passed = interval and seen // interval > (seen - images_per_update) // interval
    return bool(passed or (interval and seen >= run.args.max_train_images))


def choose_guidance(args, contract):
    """The modes of guidance of teacher and fake score, given or this kind of teacher's default."""
    modes = contract.guidance_modes or ("cfg",)
    teacher = args.guidance_mode or modes[0]
    fake = args.fake_guidance_mode or teacher
    for mode in (teacher, fake):
        if mode not in modes:
            raise UserError(
                f"{contract.pipeline_class} cannot be guided by {mode}: the mode must be {' or '.join(modes)}."
            )
    return teacher, fake


def measure_teacher(run):
    """The teacher's own latents for 16 prompts, and its own loss on them, beside which the generator's are shown."""
    args, device = run.args, run.accelerator.device
    rows = run.prompts.rows("reference", range(min(16, run.prompts.count)))
    draw = functools.partial(sample_noise, seed=args.seed, step=0, indices=range(len(rows)), device=device)
    velocity = functools.partial(run.contract.guided_velocity, run.networks.teacher)
    levels = [draw((), purpose=f"reference sigma {i}") for i in range(8)]
    with run.accelerator.autocast():
        return monitors.measure_teacher(
            functools.partial(velocity, scale=args.teacher_guidance_scale, mode=args.guidance_mode),
            functools.partial(velocity, scale=args.fake_train_guidance_scale, mode=args.fake_guidance_mode),
            draw(run.contract.latent_shape, purpose="reference"),
            [sigma_from_normal(level, args.sigma_mean, args.sigma_std) for level in levels],
            [draw(run.contract.latent_shape, purpose=f"reference noise {i}") for i in range(len(levels))],
            run.conditional[rows].to(device),
            run.unconditional,
            batch_size=args.train_batch_size,
        )


@torch.no_grad()
def validate(run):
    """A sheet of the averaged generator's samples, one row per validation prompt, from the same noise every time."""
    args, device, latents = run.args, run.accelerator.device, []
    columns = args.num_validation_images
    for row in range(len(args.validation_prompts)):
        indices = range(row * columns, (row + 1) * columns)
        draw = functools.partial(
            sample_noise, run.contract.latent_shape, seed=args.seed, step=0, indices=indices, device=device
        )
        with run.accelerator.autocast():
            x0 = generate_x0(
                run.ema.model,
                run.contract,
                run.validation_conditional[row].to(device),
                lambda i, draw=draw: draw(purpose=f"validation step {i}"),
                num_steps=args.num_steps,
                noise_type=args.noise_type,
                sigmas=args.sigmas,
            )
        latents.append(x0)
    if not run.accelerator.is_main_process:
        return
    with on_device(run):
        images = decode(run.pipeline, run.contract, torch.cat(latents), batch_size=1)  # beside all networks
    sheet = make_image_grid(images, rows=len(args.validation_prompts), cols=columns)
    size = f"{run.contract.height}x{run.contract.width}" if args.aspect_ratio_buckets else ""
    monitors.save_image(run.accelerator, sheet, Path(args.output_dir, "validation", size), run.state["images_seen"])


def save_student(run):
    """The averaged generator as an ordinary diffusers folder, with its LoRA file, and on the Hub if asked for."""
    args = run.args
    student = run.sharding.gather(run.ema.model)
    if not run.accelerator.is_main_process:
        return
    student_dir = export_student(
        run.pipeline,
        Path(args.output_dir, "student"),
        Sampler(args.num_steps, args.noise_type, args.sigmas),
        transformer=merged(student),
        contract=use_bucket(run, 0).contract,
        pipeline_kwargs=args.pipeline_kwargs | {"height": args.height, "width": args.width},
        teacher=TeacherSource(args.pretrained_model_name_or_path, args.revision),
        training=TrainingRecord(
            arguments={**vars(args), **run.state["settings"], "images_seen": run.state["images_seen"]},
            measured=monitors.training_facts(args.output_dir, run.state),
        ),
        card=CardContent(
            repo_id=args.hub_model_id,
            example_prompt=(args.validation_prompts or run.prompts.distinct)[0],
            grid=monitors.last_sheet(args.output_dir, run.state),
            grid_prompts=args.validation_prompts,
        ),
    )
    lora = save_lora(run.pipeline, student, student_dir)
    logger.info(f"the student is in {student_dir}" + (f", its LoRA in {lora.name}" if lora else ""))
    if args.push_to_hub:
        push_student(student_dir, args.hub_model_id, token=args.hub_token, private=args.hub_private_repo)


if __name__ == "__main__":
    exit_on_user_error(main)()
