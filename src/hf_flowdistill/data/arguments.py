# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Arguments of a training's text-image pairs."""

from pathlib import Path

from hf_flowdistill.cli import check_output_dir, fill_in
from hf_flowdistill.data.shards import check_cache_dir
from hf_flowdistill.errors import UserError


DEFAULTS = {  # here, since a run without images has none of them
    "dataset_split": "train",
    "streaming": False,
    "image_column": "image",
    "center_crop": False,
    "random_flip": False,
    "images_per_part": None,
    "image_cache_dir": None,
}


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
        type=int,
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
    if args.image_cache_dir:
        check_output_dir(args.image_cache_dir, "--image_cache_dir")
        check_cache_dir(args.image_cache_dir, "image", "--image_cache_dir")


def check_images_per_part(args, processes: int) -> None:
    """Raise `UserError` if a part, which all processes share, is smaller than their update."""
    update = args.train_batch_size * args.gradient_accumulation_steps * processes
    if args.images_per_part is not None and args.images_per_part < update:
        raise UserError(
            f"--images_per_part is {args.images_per_part}: it must be at least an update's images, which are "
            f"{update}: {processes} processes x "
            f"{args.gradient_accumulation_steps} micro-batches x {args.train_batch_size}."
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
