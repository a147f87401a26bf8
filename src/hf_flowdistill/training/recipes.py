# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Recipes: files of arguments that come with a teacher, found by its architecture; nothing here needs torch.

An argument is looked for on the command line, then in the file of --config, then in the recipe, then among the
defaults.
"""

import math
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

from hf_flowdistill.cli import say
from hf_flowdistill.errors import UserError
from hf_flowdistill.hub.settings import read_json
from hf_flowdistill.training.arguments import RESOLUTION, origin_of
from hf_flowdistill.training.folders import read_run


TEACHERS_FILE = "teachers.yaml"
EMPTY = {"timestep_scale": 1, "dual_attention_layers": []}  # what a configuration means by not having a name, or null
AUTO, NONE = "auto", "none"
PRECISION = ("weight_dtype", "mixed_precision", "bf16_rounding")  # arguments of it,
SIZE = ("resolution", "height", "width", "aspect_ratio_buckets")  # and of the images'


class Found(NamedTuple):
    """Names of recipes, best first; why these, as the end of a sentence; the resolution that is left open."""

    names: list[str]
    why: str
    resolution: int | None = None


def add_recipe_argument(parser) -> None:
    parser.add_argument(
        "--recipe",
        default=AUTO,
        metavar="NAME",
        help="more arguments, of a file in recipes/; auto: that of a teacher of the same architecture; none: none. "
        "The command line and --config win over it",
    )


def parse_given(parser, input_args, check: Callable[[Namespace], None], folder: Path) -> Namespace:
    """The arguments as far as they are known without asking what the teacher is: what is wrong with them is refused.

    Args:
        check: fills in and refuses, in place.
        folder: of the recipes.

    Raises:
        UserError: a mistake in the arguments, or there is no such recipe.
    """
    args = parser.parse_args(input_args)
    if args.recipe not in (AUTO, NONE):  # which may name the teacher
        args = parser.parse_args(input_args, before=_words(parser, _named(args.recipe, folder), args))
    check(args)
    return args


def parse_with_recipe(parser, input_args, check: Callable[[Namespace], None], folder: Path) -> list[Namespace]:
    """The arguments with those of the recipe, a namespace for every precision that the recipe has: the first is the
    paper's first choice, and which one fits is not known yet. A line on the screen says which was taken and why.

    Args:
        check, folder: as for `parse_given`.

    Raises:
        UserError: a mistake in the arguments, or there is no such recipe.
    """
    given = parser.parse_args(input_args)
    found = find_recipes(given, folder)
    own = [] if found.resolution is None else [f"--resolution={found.resolution}"]
    parsed = []
    for name in found.names or [NONE]:
        words = [] if name == NONE else _words(parser, _named(name, folder), given)
        args = parser.parse_args(input_args, before=[*own, *words])
        args.recipe = name
        check(args)
        parsed.append(args)
    say(f"recipe: {' or '.join(found.names) or NONE}, {found.why}")
    return parsed


def find_recipes(args, folder: Path) -> Found:
    """Which recipes are those of the arguments, as they were given."""
    if args.recipe not in (AUTO, NONE):
        return Found([args.recipe], "as asked for")
    if args.recipe == NONE:
        return Found([], "as asked for; the script's defaults hold", own_resolution(args))
    recorded = recorded_recipe(args)
    if recorded is not None:
        return Found([] if recorded == NONE else [recorded], "as the run that goes on has it", own_resolution(args))
    config = read_config(args, "transformer")
    own = own_resolution(args, config)
    teachers = _read(folder / TEACHERS_FILE)
    alike = [name for name, teacher in teachers.items() if is_alike(config, teacher["transformer"])]
    if not alike:
        kind = config.get("_class_name", "its transformer")
        return Found([], f"since none is of {kind} of this size; the script's defaults hold", own)
    recipes = {name: _read(folder / f"{name}.yaml") for teacher in alike for name in teachers[teacher]["recipes"]}
    wanted = wanted_resolution(args) or own or RESOLUTION
    nearest = min((recipe["resolution"] for recipe in recipes.values()), key=lambda side: abs(side - wanted))
    names = [name for name, recipe in recipes.items() if recipe["resolution"] == nearest]
    asked = asked_precision(args)
    names = [name for name in names if precision_of(recipes[name]) == asked] or names[:1] if asked else names
    teacher = next(name for name in alike if names[0] in teachers[name]["recipes"])
    of = recipes[names[0]]["pretrained_model_name_or_path"]
    layers = f"{config['num_layers']} layers of {config['num_attention_heads']} heads"
    return Found(names, f"since {of} is {config['_class_name']} of {layers} too ({teacher})")


def _named(name: str, folder: Path) -> Path:
    """The file of a recipe; UserError if there is none."""
    names = sorted(path.stem for path in folder.glob("*.yaml") if path.name != TEACHERS_FILE)
    if name not in names:
        raise UserError(f"--recipe {name} is none of those here: choose auto, none, {', '.join(names)}.")
    return folder / f"{name}.yaml"


def paper_time(name: str, folder: Path) -> tuple[float, str] | None:
    """Seconds that the paper took for 1,000 images by the recipe, and on what; None if it says nothing."""
    for teacher in _read(folder / TEACHERS_FILE).values():
        if name in teacher["recipes"]:
            return teacher["recipes"][name], teacher["paper"]
    return None


def is_alike(config: dict, expected: dict) -> bool:
    """Whether a transformer's configuration has all of `expected`."""
    return all(
        _value(config, name) == (EMPTY.get(name) if value is None else value) for name, value in expected.items()
    )


def _value(config: dict, name: str):
    value = config.get(name)
    return EMPTY.get(name) if value is None else value


def read_config(args, component: str) -> dict:
    """The teacher's config.json of a component; empty if it cannot be read, which loading the teacher will tell."""
    config = read_json(args.pretrained_model_name_or_path, f"{component}/config.json", **origin_of(args))
    return config if isinstance(config, dict) else {}


def own_resolution(args, transformer: dict | None = None) -> int | None:
    """The height and width that the teacher was made for, in pixels, where its configuration tells them and the
    arguments do not say another: the latents' size times what the VAE makes of them.

    Args:
        transformer: its configuration, if it was read already.
    """
    if wanted_resolution(args) is not None:
        return None
    side = (read_config(args, "transformer") if transformer is None else transformer).get("sample_size")
    if not isinstance(side, int):
        return None
    vae = read_config(args, "vae")
    blocks = vae.get("encoder_block_out_channels") or vae.get("block_out_channels")
    return side * 2 ** (len(blocks) - 1) if isinstance(blocks, list) else None


def wanted_resolution(args) -> float | None:
    """The side of a square of as many pixels as the arguments ask for, None if they do not say."""
    if args.aspect_ratio_buckets:
        return math.sqrt(math.prod(args.aspect_ratio_buckets[0]))
    height, width = args.height or args.resolution, args.width or args.resolution
    return math.sqrt(height * width) if height and width else None


def asked_precision(args) -> str | None:
    """ "bfloat16" weights or "autocast" where the arguments or the launch ask for one of them by name."""
    if args.weight_dtype == "bfloat16" or (args.weight_dtype is None and args.bf16_rounding):
        return "bfloat16"
    return "autocast" if launched_precision(args) == "bf16" or args.weight_dtype or args.mixed_precision else None


def launched_precision(args) -> str | None:
    """--mixed_precision, of the script or else of the launch."""
    return args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")


def precision_of(recipe: dict) -> str:
    return "bfloat16" if recipe.get("weight_dtype") == "bfloat16" else "autocast"


def recorded_recipe(args) -> str | None:
    """The recipe of the run that goes on, None if there is none."""
    if args.resume_from_checkpoint is None:
        return None
    runs = read_run(args.output_dir, resume=True)
    return runs[0].get("recipe") if runs else None


def _read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _words(parser, path: Path, given: Namespace) -> list[str]:
    """A recipe as the words of a command line, without what the arguments that are `given` contradict."""
    left_out = {"learning_rate", "fake_score_learning_rate"} if given.networks == "lora" else set()
    left_out |= set(PRECISION) if asked_precision(given) is not None else set()
    left_out |= {"resolution"} if any(getattr(given, name) is not None for name in SIZE) else set()
    left_out |= {"images_per_update"} if given.train_batch_size and given.gradient_accumulation_steps else set()
    return parser.words_of(path, leave_out=left_out)
