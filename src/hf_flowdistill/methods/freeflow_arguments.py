# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Arguments of FreeFlow."""

from hf_flowdistill.cli import COUNT, FINITE, NATURAL, NOT_NEGATIVE, POSITIVE, SHARE, fill_in
from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.names import SOLVERS
from hf_flowdistill.methods.sid_arguments import GUIDANCE_MODES


DERIVATIVES = ("difference", "jvp")
DIFFERENCE = {"num_jumps": 8, "solver": "heun"}
PREDICTION = {"jump_mean": 0.0, "jump_std": 1.0, "jump_zeros": 0.1, "prediction_decay": 1.0}
CORRECTION = {"correction_sigma_mean": 0.8, "correction_sigma_std": 1.6, "guidance_interval": 0.5}
BALANCE = {"correction_weight": 0.3, "correction_decay_images": None}
SHARE_OF_WARMUP = 150  # of the training, the paper's 10K of 1.5M iterations


def add_freeflow_arguments(parser) -> None:
    """Arguments of the two objectives, of what balances them, and of the draws that they take."""
    add = parser.add_argument_group("method (defaults: the paper's)").add_argument
    _add_guidance(add)
    _add_prediction(add)
    _add_correction(add)
    add(
        "--student_model_name_or_path",
        metavar="PATH",
        help="the generator starts as this student of the teacher, a folder or Hub id; by default as the teacher",
    )


def _add_guidance(add) -> None:
    add(
        "--guidance_range",
        type=FINITE,
        nargs="+",
        default=[1.0, 2.0],
        metavar="X",
        help="two ends of the teacher's guidance, which is drawn for every sample and told to the student; 1 1 = off",
    )
    add(
        "--student_guidance_scale",
        type=FINITE,
        metavar="X",
        help="of --guidance_range, that of the exported student; by default its end",
    )
    add("--guidance_mode", choices=GUIDANCE_MODES, help="how the teacher is guided; by default embedded, if it can be")


def _add_prediction(add) -> None:
    add("--derivative", choices=DERIVATIVES, default="difference", help="of the student in the length of its jump")
    add("--num_jumps", type=COUNT, metavar="N", help="lengths of jumps that a difference goes between (default: 8)")
    add("--solver", choices=SOLVERS, help="that follows the teacher from one of these to the next (default: heun)")
    add("--jump_mean", type=FINITE, metavar="X", help="jumps are sigmoid(Normal(mean, std)) long (default: 0)")
    add("--jump_std", type=POSITIVE, metavar="X", help="of the same (default: 1)")
    add("--jump_zeros", type=SHARE, metavar="X", help="share of jumps of no length (default: 0.1)")
    add(
        "--prediction_decay",
        type=NOT_NEGATIVE,
        metavar="K",
        help="gaps are divided by their mean square to the power of this (default: 1)",
    )
    add(
        "--confident_warmup_images",
        type=NATURAL,
        metavar="IMAGES",
        help="the teacher is asked at noise levels above a bound, which falls from 1 to 0 within so many images "
        "(default: a 150th of the training)",
    )


def _add_correction(add) -> None:
    add(
        "--correction_share",
        type=SHARE,
        default=0.25,
        metavar="X",
        help="of every batch; prediction has the rest: 0 is prediction alone, 1 is correction alone",
    )
    add("--correction_weight", type=NOT_NEGATIVE, metavar="X", help="alpha, of the adaptive weight (default: 0.3)")
    add(
        "--correction_delay_images",
        type=NATURAL,
        metavar="IMAGES",
        help="alpha is 0 before (default: a 150th of the training)",
    )
    add(
        "--correction_warmup_images",
        type=NATURAL,
        metavar="IMAGES",
        help="and then rises within so many (default: a 150th of the training)",
    )
    add(
        "--correction_decay_images",
        type=COUNT,
        metavar="IMAGES",
        help="after these alpha falls with the root of the images; by default it stays",
    )
    add("--correction_sigma_mean", type=FINITE, metavar="X", help="sigma is sigmoid(Normal(mean, std)) (default: 0.8)")
    add("--correction_sigma_std", type=POSITIVE, metavar="X", help="of the same (default: 1.6)")
    add("--guidance_interval", type=SHARE, metavar="X", help="the teacher is guided up to this sigma (default: 0.5)")


def check_freeflow_arguments(args) -> None:
    """Fill in the defaults of `add_freeflow_arguments` that depend on others, in place, and what a student's records
    are known by.

    Raises:
        UserError: for arguments that are sane by themselves but not together, or of what does not happen.
    """
    predicts, corrects = args.correction_share < 1, args.correction_share > 0
    none = "leave it out, or change --correction_share"
    if not predicts and args.derivative != "difference":
        raise UserError(f"--derivative is of the prediction, which --correction_share 1 has none of: {none}.")
    difference = predicts and args.derivative == "difference"
    share = args.max_train_images // SHARE_OF_WARMUP
    warmups = {name: share for name in ("correction_delay_images", "correction_warmup_images")}
    otherwise = "is of the differences between jumps: leave it out, or choose --derivative difference."
    fill_in(args, DIFFERENCE, wanted=difference, otherwise=otherwise)
    otherwise = f"is of the prediction, which --correction_share 1 has none of: {none}."
    fill_in(args, PREDICTION | {"confident_warmup_images": share}, wanted=predicts, otherwise=otherwise)
    otherwise = f"is of the correction, which --correction_share 0 has none of: {none}."
    fill_in(args, CORRECTION, wanted=corrects, otherwise=otherwise)
    otherwise = f"balances prediction and correction, and there is one of them: {none}."
    fill_in(args, BALANCE | warmups, wanted=predicts and corrects, otherwise=otherwise)
    _check_guidance(args)
    if args.sharding != "none" and (args.correction_share * args.gradient_accumulation_steps) % 1:
        raise UserError(
            f"in shards, whole micro-batches have the correction: --gradient_accumulation_steps times "
            f"--correction_share {args.correction_share:g} must be a whole number."
        )
    args.method, args.num_steps, args.noise_type = "freeflow", 1, "fresh"


def _check_guidance(args) -> None:
    if len(args.guidance_range) != 2 or args.guidance_range[0] > args.guidance_range[1]:
        raise UserError("--guidance_range takes two numbers, the lower one first.")
    low, high = args.guidance_range
    if args.student_guidance_scale is None:
        args.student_guidance_scale = high
    if not low <= args.student_guidance_scale <= high:
        raise UserError(
            f"--student_guidance_scale {args.student_guidance_scale:g} is outside of --guidance_range {low:g} "
            f"{high:g}: choose one that the student learns."
        )
