# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Command lines: files of arguments, shown defaults, and mistakes told in one sentence."""

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import warnings
from pathlib import Path

import yaml

from hf_flowdistill.adapters import QUANTIZATIONS
from hf_flowdistill.errors import UserError
from hf_flowdistill.networks import NETWORKS, RoleSettings
from hf_flowdistill.training.optimizers import ROUNDINGS


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser with `--config FILE.yaml`: a mapping of argument names to values.

    The command line wins over the file. Every mistake is a `UserError`. The help shows the defaults.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self.add_argument("--config", metavar="FILE.yaml", help="more arguments, one 'name: value' per line")

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help).")

    def parse_args(self, args=None, namespace=None):
        """Parse `args` (default: those of the process) after the arguments of the file that `--config` names."""
        args = sys.argv[1:] if args is None else list(args)
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.error = self.error
        finder.add_argument("--config")
        path = finder.parse_known_args(args)[0].config
        return super().parse_args(args if path is None else self._words_of(path) + args, namespace)

    def _words_of(self, path: str) -> list[str]:
        """A config file as the words of a command line, so that types and choices are checked alike."""
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"the config file {path} cannot be read: {' '.join(str(error).split())}.") from None
        if not isinstance(values, dict):
            raise UserError(f"the config file {path} must hold one 'name: value' per line.")
        flags = {action.dest: action.option_strings[0] for action in self._actions if action.option_strings}
        unknown = ", ".join(str(name) for name in values if name not in flags)
        if unknown:
            raise UserError(f"the config file {path} has unknown arguments: {unknown} (see {self.prog} --help).")
        return [word for name, value in values.items() for word in _words(flags[name], value)]


def silence_libraries() -> None:
    """Errors only from diffusers and transformers, and no bars of loaded weights: a script has one bar, its own."""
    import diffusers
    import transformers  # both here, since they take seconds that not every command has to wait

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def json_object(text: str) -> dict:
    """The type of an argument that is a mapping, e.g. '{"clip_skip": 1}'."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, e.g. '{{\"clip_skip\": 1}}', not {text!r}")
    return value


def image_sizes(text: str) -> list[tuple[int, int]]:
    """The type of an argument that lists sizes as diffusers' scripts do: (height, width) of "512,512;384,680"."""
    from diffusers.training_utils import parse_buckets_string  # here for the same reason

    try:
        with warnings.catch_warnings():  # of what is not divisible by 8; the pipeline itself says what it can make
            warnings.simplefilter("ignore")
            sizes = parse_buckets_string(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be pairs of height and width, e.g. 512,512;384,680, not {text!r}"
        ) from None
    if len(set(sizes)) < len(sizes):
        raise argparse.ArgumentTypeError(f"must be different sizes, not {text!r}")
    return sizes


def add_network_arguments(parser) -> None:
    """Arguments of which networks there are, and of how what is trained of them is kept and updated."""
    add = parser.add_argument_group("networks").add_argument
    add(
        "--networks",
        choices=NETWORKS,
        default="full",
        help="full: three networks; lora_fake: the fake score is a LoRA on the teacher; lora: the generator too",
    )
    add("--rank", type=int, metavar="N", help="of the LoRAs; 64 by default")
    add("--lora_alpha", type=float, metavar="X", help="a LoRA is scaled by this over its rank; by default the rank")
    add(
        "--lora_layers",
        metavar="NAMES",
        help="layers with a LoRA, e.g. to_k,to_q,to_v,to_out.0; by default all linear layers of all blocks",
    )
    add("--base_quantization", choices=QUANTIZATIONS, default="none", help="of the teacher under --networks lora")
    add(
        "--weight_dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of networks and gradients, LoRAs aside; bfloat16 goes without autocast",
    )
    add(
        "--bf16_rounding",
        choices=ROUNDINGS,
        help="of updates of bfloat16 weights: stochastic, the default, keeps the smallest on average, from float32 "
        "moments; nearest is the paper's BF16, moments too, and loses those below 1/512 of their weight",
    )
    add("--use_8bit_adam", action="store_true", help="Adam's moments in 8 bits, by bitsandbytes")


def check_network_arguments(args) -> None:
    """Fill in the defaults of `add_network_arguments` that depend on others, in place.

    Raises:
        UserError: for arguments of what is not trained here, or a library that is not installed.
    """
    for name in ("rank", "lora_alpha", "lora_layers"):
        if getattr(args, name) is not None and args.networks == "full":
            raise UserError(f"--{name} is of LoRAs: choose --networks lora or lora_fake, or leave it out.")
    if args.base_quantization != "none" and args.networks != "lora":
        raise UserError("--base_quantization is of a teacher that nothing else is trained on: choose --networks lora.")
    rounds = args.weight_dtype == "bfloat16" and args.networks != "lora"
    if args.bf16_rounding is not None and not rounds:
        raise UserError(
            "--bf16_rounding is of bfloat16 weights that are trained, and LoRAs are float32: choose --weight_dtype "
            "bfloat16 and --networks full or lora_fake, or leave it out."
        )
    for library, argument, used in (
        ("peft", f"--networks {args.networks}", args.networks != "full"),
        ("bitsandbytes", "--use_8bit_adam", args.use_8bit_adam),
        ("bitsandbytes", f"--base_quantization {args.base_quantization}", args.base_quantization != "none"),
    ):
        if used and importlib.util.find_spec(library) is None:
            raise UserError(f"{argument} needs {library}, which is not installed: pip install {library}.")
    if args.networks != "full" and args.rank is None:
        args.rank = RoleSettings.rank
    if rounds and args.bf16_rounding is None:
        args.bf16_rounding = ROUNDINGS[0]


def role_settings(args) -> RoleSettings:
    """The arguments of `add_network_arguments` that `Networks.from_teacher` takes."""
    return RoleSettings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(RoleSettings)})


def check_output_dir(output_dir, argument: str = "--output_dir") -> None:
    """Raise `UserError` unless `output_dir` is a folder that can be written to, or can be made."""
    path = Path(output_dir).absolute()
    existing = next(place for place in (path, *path.parents) if os.path.exists(place))
    if not existing.is_dir():
        raise UserError(f"{argument} {output_dir} cannot be a folder, since {existing} is a file: choose another.")
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise UserError(f"{argument} {output_dir} cannot be written to: choose a folder that can.")


def _words(flag: str, value) -> list[str]:
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={json.dumps(value) if isinstance(value, dict) else value}"]


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=44, width=119)

    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False or action.default in ("", [], {}, argparse.SUPPRESS)
        return action.help if hidden or "%(default" in action.help else action.help + " (default: %(default)s)"
