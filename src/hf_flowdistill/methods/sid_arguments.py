# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Arguments of SiD-DiT."""

from hf_flowdistill.cli import COUNT, FINITE, NATURAL, POSITIVE, SHARE
from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.names import NOISE_TYPES, SIGMA_MEAN, SIGMA_STD, falls_from_one
from hf_flowdistill.flow.weighting import WEIGHTINGS, get_weighting


GUIDANCE_MODES = ("cfg", "embedded", "both")


def add_sid_arguments(parser) -> None:
    """Arguments of the student's sampler, of the losses, and of the draws that they take."""
    add = parser.add_argument_group("method (defaults: the paper's)").add_argument
    _add_sampler(add)
    _add_losses(add)
    parser.refuse(*IGNORED)


def _add_sampler(add) -> None:
    add("--num_steps", type=COUNT, default=4, metavar="N", help="sampler steps of the student")
    add(
        "--sigmas",
        type=float,
        nargs="+",
        metavar="S",
        help="their noise levels, --num_steps numbers that fall from 1; by default 1 - i / num_steps from i = 0",
    )
    add(
        "--sigmas_start_images",
        type=NATURAL,
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


def _add_losses(add) -> None:
    add("--alpha", type=FINITE, default=1.0, metavar="X", help="of the generator loss; 1 is Eq. 18")
    add("--weighting", default="1-sigma", metavar="NAME", help=f"of the generator loss: {', '.join(WEIGHTINGS)}")
    add("--loss_scale", type=FINITE, default=100.0, metavar="X", help="factor on the generator loss")
    add("--teacher_guidance_scale", type=FINITE, default=4.5, metavar="X", help="guidance of the teacher; 1 = off")
    add("--fake_guidance_scale", type=FINITE, metavar="X", help="fake score, in the generator loss; as the teacher's")
    add(
        "--fake_train_guidance_scale",
        type=FINITE,
        metavar="X",
        help="fake score, in its own loss; as the teacher's",
    )
    add(
        "--guidance_rescale",
        type=SHARE,
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
        type=FINITE,
        default=SIGMA_MEAN,
        metavar="X",
        help="p(sigma) = sigmoid(Normal(mean, std)) (default: ln 2 = %(default).3f)",
    )
    add("--sigma_std", type=POSITIVE, default=SIGMA_STD, metavar="X", help="of p(sigma) = sigmoid(Normal(mean, std))")


def _guides(args) -> list[bool]:
    """Whether there is guidance of the teacher, of the fake score in the generator's loss, and in its own."""
    scales = args.teacher_guidance_scale, args.fake_guidance_scale, args.fake_train_guidance_scale
    return [(scales[0] if scale is None else scale) != 1 for scale in scales]


OFF = "is of guidance, which is off where its scales are 1: leave it out."
IGNORED = (  # as of `ArgumentParser.refuse`
    ("guidance_rescale", lambda args: args.guidance_rescale and not _guides(args)[0], OFF),
    ("guidance_mode", lambda args: not any(_guides(args)), OFF),
    ("fake_guidance_mode", lambda args: not any(_guides(args)[1:]), OFF),
)


def check_negative_prompt(args, mode: str | None, fake_mode: str | None) -> None:
    """Raise `UserError` if there is a negative prompt, and nothing is guided by it in these modes, None for any."""
    guided = any(on and one != "embedded" for on, one in zip(_guides(args), (mode, fake_mode, fake_mode)))
    if args.negative_prompt and not guided:
        raise UserError(
            "--negative_prompt is half of classifier-free guidance, by which neither teacher nor fake score is guided "
            "here: leave it out, or give --guidance_mode cfg and a scale."
        )


def check_sid_arguments(args) -> None:
    """Fill in the defaults of `add_sid_arguments` that depend on others, in place.

    Raises:
        UserError: for arguments that are sane by themselves but not together.
    """
    for name in ("fake_guidance_scale", "fake_train_guidance_scale"):
        if getattr(args, name) is None:
            setattr(args, name, args.teacher_guidance_scale)
    check_negative_prompt(args, args.guidance_mode, args.fake_guidance_mode or args.guidance_mode)
    levels, shares = args.sigmas, args.step_shares
    if levels and not (len(levels) == args.num_steps and falls_from_one(levels)):
        raise UserError(f"--sigmas must be {args.num_steps} numbers (--num_steps) that start at 1 and fall towards 0.")
    if args.sigmas_start_images and not levels:
        raise UserError("--sigmas_start_images is when training at --sigmas starts: give both or neither.")
    if shares and (len(shares) != args.num_steps or not all(x >= 0 for x in shares) or not sum(shares) <= 1 + 1e-6):
        raise UserError(f"--step_shares must be {args.num_steps} numbers (--num_steps) from 0 that sum to 1 or less.")
    get_weighting(args.weighting)
