# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The command `flowdistill`, and what every command line shares: files of arguments, bounds, how mistakes are told."""

import argparse
import importlib.util
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import yaml

from hf_flowdistill.errors import UserError, exit_on_user_error


logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else every process tells of a kernel for CPUs, on import

COMMANDS = {  # a module of commands/, imported when it is called, since torch and diffusers take seconds
    "inspect": "Print how a pipeline talks to its transformer, or why it cannot be a teacher.",
    "plan": "Tell which ways of training a pipeline fit on given GPUs, and how to run them.",
    "export": "Write a run, a checkpoint or someone else's student as an ordinary diffusers repository.",
    "card": "Write the model card of an exported student again, with an evaluation for instance.",
    "push": "Publish an exported student on the Hub, in one commit.",
    "verify": "Download a repository and compare every file with the Hub's checksum.",
}


@dataclass(frozen=True)
class Bounded:
    """The type of an argument that is a number within bounds; `ArgumentParser.parse_args` holds it to them.

    Attributes:
        kind: `int` or `float`.
        allowed: the bounds, as the end of "it must be ...".
        holds: whether a number is within them.
    """

    kind: type
    allowed: str
    holds: Callable

    @property
    def __name__(self):  # argparse says "invalid int value"
        return self.kind.__name__

    def __call__(self, text: str):
        return self.kind(text)


# The bounds that there are.
COUNT = Bounded(int, "at least 1", lambda value: value >= 1)
NATURAL = Bounded(int, "at least 0", lambda value: value >= 0)
POSITIVE = Bounded(float, "a number above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Bounded(float, "a number from 0", lambda value: 0 <= value < math.inf)
FINITE = Bounded(float, "a finite number", math.isfinite)
SHARE = Bounded(float, "from 0 to 1", lambda value: 0 <= value <= 1)
DECAY = Bounded(float, "at least 0 and below 1", lambda value: 0 <= value < 1)


class _Yaml(yaml.SafeLoader):
    """YAML as its version 1.2 reads it: true and false are booleans, but no and on are text; 1e-6 is a number, but
    12:30 and 2026-01-01 are text. In a mapping, a name that stands there twice and a bare no are errors."""

    yaml_implicit_resolvers: ClassVar = {}

    def construct_mapping(self, node, deep=False):
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            raise ValueError("a name more than once: leave one of them")
        return found

    def construct_text(self, node):
        if node.style is None and node.value.lower() in SWITCHES:
            raise ValueError(f"a bare {node.value}: write true or false, or put it in quotes if text is meant")
        return node.value


SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

for _tag, _pattern, _first in (
    ("null", "|~|null|Null|NULL", ["", "~", "n", "N"]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", "[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("merge", "<<", ["<"]),
):
    _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), _first)
_Yaml.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))  # 010 is ten
_Yaml.add_constructor("tag:yaml.org,2002:str", _Yaml.construct_text)
_Yaml.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser with `--config FILE.yaml`: a mapping of argument names to values.

    The command line wins over the file. Every mistake is a `UserError`. The help shows the defaults.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self._ignored: list[tuple[str, Callable, str]] = []
        self.add_argument("--config", metavar="FILE.yaml", help="more arguments, one 'name: value' per line")

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help).")

    def refuse(self, *rules: tuple[str, Callable, str]) -> None:
        """Refuse arguments that are given where they would be ignored.

        A rule has their names, divided by spaces, what says so of the parsed arguments, and the end of "--name ...".
        A config file may be overruled on the command line: its arguments are held against that file alone.
        """
        self._ignored += [(name, when, reason) for names, when, reason in rules for name in names.split()]

    def _check_ignored(self, words: list[str], parsed) -> None:
        """Raise `UserError` if one of `words` gives an argument that `parsed` would ignore."""
        nothing = argparse.Namespace(**{action.dest: None for action in self._actions})
        given = vars(super().parse_args(words, nothing))
        for name, when, reason in self._ignored:
            if given[name] is not None and when(parsed):
                raise UserError(f"--{name} {reason}")

    def parse_args(self, args=None, namespace=None, before=()):
        """Parse `args` (default: those of the process) after the arguments of the file that `--config` names, these
        after the words `before`; the later win."""
        args = sys.argv[1:] if args is None else list(args)
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.error = self.error
        finder.add_argument("--config")
        path = finder.parse_known_args(args)[0].config
        # the file's name again, since what stands behind a list would be taken for one more of its entries
        file = [] if path is None else self.words_of(path)
        given = [] if path is None else [*file, f"--config={path}"]
        parsed = super().parse_args([*before, *given, *args], namespace)
        for action in self._actions:
            if isinstance(action.type, Bounded):
                value = getattr(parsed, action.dest)
                for number in value if isinstance(value, list) else [value]:
                    if number is not None and not action.type.holds(number):
                        raise UserError(f"--{action.dest} is {number}: it must be {action.type.allowed}.")
        if self._ignored:
            self._check_ignored(file, super().parse_args(file))
            self._check_ignored(args, parsed)
        return parsed

    def words_of(self, path, leave_out=()) -> list[str]:
        """A config file as the words of a command line, so that types and choices are checked alike; without the
        arguments that are to be left out.

        Values are taken as the text that stands in the file.
        """
        try:
            loader = _Yaml(Path(path).read_text(encoding="utf-8"))
            root = loader.get_single_node()
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"the config file {path} cannot be read: {' '.join(str(error).split())}.") from None
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"the config file {path} must hold one 'name: value' per line.")
        names = [str(key.value) for key, _ in root.value]
        actions = {action.dest: action for action in self._actions if action.option_strings}
        actions = {name: action for name, action in actions.items() if name not in ("config", "help")}
        unknown = ", ".join(
            f"{name} (write {dashless})" if (dashless := name.lstrip("-").replace("-", "_")) in actions else name
            for name in names
            if name not in actions
        )
        if unknown:
            raise UserError(f"the config file {path} has unknown arguments: {unknown} (see {self.prog} --help).")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise UserError(f"the config file {path} has {twice} more than once: leave one line of them.")
        words = []
        for name, (_, node) in zip(names, root.value):
            try:
                words += [] if name in leave_out else _words(actions[name], node, loader)
            except ValueError as error:
                raise UserError(f"the config file {path} gives {name} {error}.") from None
        return words


@exit_on_user_error
def main(input_args=None):
    words = sys.argv[1:] if input_args is None else list(input_args)
    listed = "".join(f"  {name:<10} {description}\n" for name, description in COMMANDS.items())
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: flowdistill COMMAND ... (see flowdistill COMMAND --help)\n\n{listed}", end="")
    elif words[0] not in COMMANDS:
        raise UserError(f"flowdistill has no command {words[0]}: choose one of {', '.join(COMMANDS)}.")
    else:
        importlib.import_module(f"hf_flowdistill.commands.{words[0]}").main(words[1:])


def say(text: str) -> None:
    """A line on the screen, of the first of all processes, before there is a log."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def silence_libraries() -> None:
    """Errors only from diffusers and transformers, and no bars of loaded weights: a script has one bar, its own."""
    import diffusers
    import transformers  # both here, since they take seconds that not every command has to wait

    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # tracebacks of errors that are told
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
    pairs = [re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", pair) for pair in text.split(";")]
    sizes = [tuple(map(int, pair.groups())) for pair in pairs if pair]
    if len(sizes) < len(pairs) or not all(map(all, sizes)):
        raise argparse.ArgumentTypeError(f"must be pairs of height and width, e.g. 512,512;384,680, not {text!r}")
    if len(set(sizes)) < len(sizes):
        raise argparse.ArgumentTypeError(f"must be different sizes, not {text!r}")
    return sizes


def add_origin_arguments(add) -> None:
    """--revision and --cache_dir of what comes from the Hub; `add` is a parser's or a group's `add_argument`."""
    add("--revision", metavar="NAME", help="branch, tag or commit of the Hub repository")
    add("--cache_dir", metavar="DIR", help="where downloaded models are kept")


def add_call_arguments(add) -> None:
    """The size of a pipeline's images, by default its own, and --pipeline_kwargs."""
    add("--resolution", type=COUNT, metavar="PIXELS", help="height and width of the images; by default the pipeline's")
    add("--height", type=COUNT, metavar="PIXELS", help="where it differs from --resolution")
    add("--width", type=COUNT, metavar="PIXELS", help="where it differs from --resolution")
    add(
        "--pipeline_kwargs", type=json_object, default={}, metavar="JSON", help="more arguments of the pipeline's call"
    )


def fill_in(args, defaults: dict, *, wanted: bool, otherwise: str) -> None:
    """Give the arguments in `defaults` their defaults where they are None, in place; where they are not `wanted`,
    refuse any that is given.

    Raises:
        UserError: with the name of that argument and `otherwise`, the rest of the sentence.
    """
    for name, default in defaults.items():
        given = getattr(args, name) is not None
        if given and not wanted:
            raise UserError(f"--{name} {otherwise}")
        if wanted and not given:
            setattr(args, name, default)


def check_installed(library: str, argument: str, used: bool) -> None:
    """Raise `UserError` if `argument` is `used` but the library that it needs is not installed."""
    if used and importlib.util.find_spec(library) is None:
        raise UserError(f"{argument} needs {library}, which is not installed: pip install {library}.")


def check_model(path) -> None:
    """Raise `UserError` if there is no folder at `path`, and it cannot be meant as an id on the Hub either."""
    looks_like_hub_id = str(path).count("/") == 1 and not str(path).startswith((".", "/", "~"))
    if not os.path.exists(path) and not looks_like_hub_id:
        raise UserError(f"{path} does not exist: give a diffusers pipeline folder or a Hub id.")


def check_output_dir(output_dir, argument: str = "--output_dir") -> None:
    """Raise `UserError` unless `output_dir` is a folder that can be written to, or can be made."""
    path = Path(output_dir).absolute()
    existing = next(place for place in (path, *path.parents) if os.path.exists(place))
    if not existing.is_dir():
        raise UserError(f"{argument} {output_dir} cannot be a folder, since {existing} is a file: choose another.")
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise UserError(f"{argument} {output_dir} cannot be written to: choose a folder that can.")


def _words(action: argparse.Action, node: yaml.Node, loader: _Yaml) -> list[str]:
    """The words of a command line that give `action` the value `node` of a config file.

    Raises:
        ValueError: it is no value of such an argument; the end of "gives learning_rate ...".
    """
    flag, is_scalar = action.option_strings[0], isinstance(node, yaml.ScalarNode)
    if isinstance(node, yaml.MappingNode):
        if action.type is not json_object:
            raise ValueError("names with values, but it takes none: indent the lines below it less, or give a value")
        try:
            return [f"{flag}={json.dumps(loader.construct_document(node))}"]
        except (TypeError, RecursionError, yaml.YAMLError):
            raise ValueError("something that JSON cannot say: give it as text, in quotes") from None
    if is_scalar and node.tag == "tag:yaml.org,2002:null":  # as if it were not given
        if not node.value:
            raise ValueError("no value: give one, or null for the default")
        return []
    if action.nargs in (0, "?", "*") and is_scalar and node.value.lower() in SWITCHES:
        return [flag] if SWITCHES[node.value.lower()] else []
    if action.nargs == 0:
        raise ValueError(f"{node.value if is_scalar else 'a list'}, but it is a switch: give true or false")
    if is_scalar:
        return [f"{flag}={_text(action, node)}"]
    if action.nargs not in ("+", "*"):
        raise ValueError("a list, but it takes one value: give that alone")
    if not node.value and action.default != []:
        raise ValueError("an empty list: name some, or leave the line out")
    return [flag, *(_text(action, entry) for entry in node.value)] if node.value else []


def _text(action: argparse.Action, node: yaml.Node) -> str:
    """What stands in the file for one value."""
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError("a list with lists or names in it: give values alone")
    if node.tag.endswith((":null", ":bool")) and node.value not in (action.choices or ()):
        raise ValueError(f"{node.value or 'nothing'}, which is no value of it: put it in quotes if text is meant")
    return node.value


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=44, width=119)

    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False or action.default in ("", [], {}, argparse.SUPPRESS)
        return action.help if hidden or "%(default" in action.help else action.help + " (default: %(default)s)"


if __name__ == "__main__":
    main()
