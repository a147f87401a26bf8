# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Arguments of a training's prompts, and of its text-image pairs."""

from pathlib import Path

from hf_flowdistill.cli import COUNT, check_output_dir, fill_in, say
from hf_flowdistill.data.files import check_cache_dir
from hf_flowdistill.data.prompts import CAPTION_COLUMN, read_dataset, read_prompts
from hf_flowdistill.errors import UserError, first_line


DATASET, DATASET_COLUMN = "brivangl/midjourney-v6-llava", "llava"  # the paper's, by default
PROMPTS_PER_PART = 4096

DEFAULTS = {  # here, since a run without images has none of them
    "dataset_split": "train",
    "streaming": False,
    "image_column": "image",
    "center_crop": False,
    "random_flip": False,
    "images_per_part": None,
    "image_cache_dir": None,
}


def add_prompt_arguments(parser) -> None:
    """Arguments of which prompts a training has, and of where their conditioning is kept."""
    add = parser.add_argument_group("prompts").add_argument
    add(
        "--prompt_file",
        metavar="FILE",
        help="training prompts: .txt with one per line, .jsonl or .csv; by default prompts.txt in the teacher's "
        f"folder, or those of the paper, {DATASET} on the Hub",
    )
    add("--dataset_name", metavar="NAME", help="training prompts of a dataset instead: a folder or Hub id")
    add("--dataset_config_name", metavar="NAME", help="configuration of the dataset, if it has several")
    add("--caption_column", default=CAPTION_COLUMN, metavar="NAME", help="of the dataset, or of a .jsonl or .csv file")
    add(
        "--prompts_per_part",
        type=COUNT,
        metavar="PROMPTS",
        help="how many of a dataset are read and encoded ahead, at least an update's; all by default, of the paper's "
        f"{PROMPTS_PER_PART}",
    )
    add("--conditioning_cache_dir", metavar="DIR", help="encoded prompts; conditioning/ in --output_dir by default")
    add("--negative_prompt", default="", metavar="TEXT", help="the unconditional half of guidance; empty by default")


def check_prompt_arguments(args) -> None:
    """Fill in where the prompts are, in place: those of the teacher's folder, or the paper's.

    Raises:
        UserError: they are given twice, or arguments are of others; their conditioning cannot be kept.
    """
    if args.prompt_file and args.dataset_name:
        raise UserError("the prompts are given twice: use either --prompt_file or --dataset_name.")
    if args.prompts_per_part and args.prompt_file:
        raise UserError("--prompts_per_part is of a dataset: give --dataset_name, or leave it out.")
    if not args.prompt_file and not args.dataset_name and not getattr(args, "adversarial", False):
        own = Path(args.pretrained_model_name_or_path, "prompts.txt")
        if own.is_file():
            args.prompt_file = str(own)
        else:
            args.dataset_name, args.caption_column = DATASET, DATASET_COLUMN
            args.prompts_per_part = args.prompts_per_part or PROMPTS_PER_PART
    if args.dataset_config_name and not args.dataset_name:
        raise UserError("--dataset_config_name is of a dataset: give --dataset_name too, or leave it out.")
    _check_own_cache(args, "conditioning_cache_dir", "conditioning")


def read_training_prompts(args, *, of_images: bool) -> list[str]:
    """The prompts that the arguments name; where they are the captions of images, those for a dry run, or none yet;
    none yet where they are read a part at a time.

    Raises:
        UserError: they cannot be read.
    """
    if of_images:
        return [] if args.dry_run is None else _read_captions(args)
    if args.prompts_per_part:
        if not prompt_parts_dir(args).is_dir():
            _check_reachable(args.dataset_name)
        if args.dataset_name == DATASET:
            say(f"prompts: those of the paper, {DATASET}, {args.prompts_per_part} at a time")
        return []
    if args.dataset_name:
        return read_dataset(args.dataset_name, args.dataset_config_name, args.caption_column)
    return read_prompts(args.prompt_file, args.caption_column)


def _check_reachable(dataset: str) -> None:
    """Raise `UserError` if a dataset of the Hub cannot be asked for; the stream itself starts later."""
    if Path(dataset).exists():
        return
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(dataset, timeout=10)
    except Exception as error:  # of the many kinds that the network and the Hub have
        raise UserError(
            f"the dataset {dataset} of the prompts cannot be reached ({first_line(error)}): give your own, by "
            "--prompt_file FILE.txt with one prompt per line."
        ) from error


def prompt_parts_dir(args) -> Path:
    """Where the prompts of this run are kept that are read a part at a time."""
    return Path(args.output_dir, "prompts")


def _read_captions(args) -> list[str]:
    """The captions of the pairs, for a dry run: streamed if that is possible, otherwise as the run will read them."""
    from hf_flowdistill.data.image_dataset import open_dataset  # with torch, which takes seconds

    settings = dataset_settings(args)
    try:
        return open_dataset(args.dataset_name, **{**settings, "streaming": True}).captions()
    except UserError as error:
        if args.streaming or error.__cause__ is None:  # it can be read, and what is wrong with it stays so
            raise
    return open_dataset(args.dataset_name, **settings).captions()


def add_image_arguments(parser) -> None:
    """Arguments of which images are used, and of how they become latents; names and meaning as in diffusers' scripts.

    The dataset itself and its captions are `--dataset_name`, `--dataset_config_name` and `--caption_column`.
    """
    add = parser.add_argument_group("images (with --adversarial, of --dataset_name)").add_argument
    flag = {"action": "store_true", "default": None}
    add("--dataset_split", metavar="NAME", help="of the dataset (default: train)")
    add("--streaming", **flag, help="read the dataset as it is needed, without downloading it first")
    add("--image_column", metavar="NAME", help="of the dataset (default: image)")
    add("--center_crop", **flag, help="crop images to their middle; by default anywhere")
    add("--random_flip", **flag, help="mirror every other image")
    add(
        "--images_per_part",
        type=COUNT,
        metavar="IMAGES",
        help="how many are encoded ahead and kept on the disk, by all processes together, with their captions: at "
        "least an update's; all by default",
    )
    add("--image_cache_dir", metavar="DIR", help="encoded images; images/ in --output_dir by default")


def check_image_arguments(args) -> None:
    """Fill in the defaults of `add_image_arguments` where there is an adversarial stage, in place.

    Raises:
        UserError: they are given without `--adversarial`, or that without a dataset; the cache is a folder of others.
    """
    otherwise = "is of the images of --adversarial: give that too, or leave it out."
    fill_in(args, DEFAULTS, wanted=args.adversarial, otherwise=otherwise)
    if not args.adversarial:
        return
    if not args.dataset_name:
        raise UserError("--adversarial needs images with captions: name a text-image set with --dataset_name.")
    _check_own_cache(args, "image_cache_dir", "image")


def check_parts(args, update: int, processes: int) -> None:
    """Raise `UserError` if a part, which all processes share, is smaller than their update, of `update` images."""
    for name in ("images_per_part", "prompts_per_part"):
        size = getattr(args, name, None)  # not every script has images
        if size is not None and size < update:
            raise UserError(
                f"--{name} is {size}: it must be at least an update's images, which are {update} of {processes} "
                "processes together."
            )


def image_cache_dir(args) -> Path:
    """Where the images of this run are kept."""
    return Path(args.image_cache_dir or Path(args.output_dir, "images"))


def dataset_settings(args) -> dict:
    """The arguments that `data.image_dataset.open_dataset` takes by name."""
    names = {"split": "dataset_split", "config": "dataset_config_name"}
    names |= {name: name for name in ("image_column", "caption_column", "streaming")}
    return {name: getattr(args, argument) for name, argument in names.items()}


def pair_settings(args) -> dict:
    """The arguments that `data.images.ImagePairs` takes by name."""
    return {name: getattr(args, name) for name in ("seed", "images_per_part", "center_crop", "random_flip")}


def _check_own_cache(args, name: str, what: str) -> None:
    folder = getattr(args, name)
    if folder:
        check_output_dir(folder, f"--{name}")
        check_cache_dir(folder, what, f"--{name}")
