# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Arguments of the adversarial stage, and of the student that it goes on with."""

from hf_flowdistill.cli import NATURAL, NOT_NEGATIVE, SHARE, fill_in
from hf_flowdistill.errors import UserError


DEFAULTS = {  # of the authors' release; here, since a run without the stage has none of them
    "discriminator_features": None,
    "discriminator_weight": 1.0,
    "adversarial_weight": 0.5,
    "discriminator_warmup_images": 20_000,
    "adversarial_start_images": 40_000,
}


def add_adversarial_arguments(parser) -> None:
    """Arguments of whether there is an adversarial stage, when it begins and how much it weighs."""
    add = parser.add_argument_group("adversarial stage, on images with captions (defaults: the authors')").add_argument
    add(
        "--adversarial",
        action="store_true",
        default=None,
        help="go on with a distilled student, on the images of --dataset_name, whose captions are the prompts",
    )
    add(
        "--student_model_name_or_path",
        metavar="PATH",
        help="the generator starts as this student of the teacher, a folder or Hub id; by default as the teacher",
    )
    add(
        "--discriminator_features",
        metavar="MODULE",
        help="output projection of the transformer, whose input the features are, where it is not found by itself",
    )
    add(
        "--discriminator_warmup_images",
        type=NATURAL,
        metavar="IMAGES",
        help="the student rests before, while the features learn to tell images apart (default: 20000)",
    )
    add(
        "--adversarial_start_images",
        type=NATURAL,
        metavar="IMAGES",
        help="the student is trained by distillation alone before (default: 40000)",
    )
    add(
        "--discriminator_weight",
        type=NOT_NEGATIVE,
        metavar="X",
        help="of telling images apart in the fake score's loss, beside its regression, which has 1 (default: 1)",
    )
    add(
        "--adversarial_weight",
        type=SHARE,
        metavar="X",
        help="of the adversarial term of the student's loss, 0 to 1; distillation has the rest (default: 0.5)",
    )


def check_adversarial_arguments(args) -> None:
    """Fill in the defaults of `add_adversarial_arguments` where there is an adversarial stage, in place.

    Raises:
        UserError: for arguments that need another, or cannot be meant.
    """
    otherwise = "is of the adversarial stage: give --adversarial too, or leave it out."
    fill_in(args, DEFAULTS, wanted=args.adversarial, otherwise=otherwise)
    if not args.adversarial:
        return
    if not args.student_model_name_or_path:
        raise UserError(
            "--adversarial goes on with a student that was distilled without images: name it with "
            "--student_model_name_or_path."
        )
    if args.aspect_ratio_buckets:
        raise UserError("--adversarial has images of one size: give --resolution instead of --aspect_ratio_buckets.")
    if args.adversarial_start_images < args.discriminator_warmup_images:
        raise UserError(
            f"--adversarial_start_images is {args.adversarial_start_images}: it must be at least "
            f"--discriminator_warmup_images, {args.discriminator_warmup_images}."
        )
