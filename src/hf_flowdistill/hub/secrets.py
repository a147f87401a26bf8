# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What may be published of a run's arguments: no tokens, and nothing of the machine it was made on."""

import os
import re
from pathlib import Path

from huggingface_hub import get_token


SECRET_NAMES = re.compile("token|secret|password|api_?key", re.IGNORECASE)
PATH_NAMES = re.compile("(dir|file|path|config|checkpoint)s?$")
SECRET_VALUES = re.compile(r"hf_[A-Za-z0-9]{16,}")
SHORTEST = 6  # characters: what is shorter is a word that may be anywhere


def without_secrets(arguments) -> dict:
    """`arguments` as they may be published: no tokens, wherever they are, and no directories of this machine."""
    secrets = known_tokens(*_secrets(arguments))

    def clean(value, name=""):
        if isinstance(value, dict):
            return {k: clean(v, str(k)) for k, v in value.items() if not SECRET_NAMES.search(str(k))}
        if isinstance(value, list | tuple):
            return [clean(item, name) for item in value]
        if isinstance(value, str | Path):
            value = redact(str(value), secrets)
            # A leading slash alone may mean something else, in a prompt for instance.
            is_path = os.path.isabs(value) and (PATH_NAMES.search(name) or os.path.exists(value))
            return Path(value).name if is_path else value
        return value

    return clean(dict(arguments))


def known_tokens(*more) -> list[str]:
    """The tokens that this process could give away: `more`, those of the environment, and that of `hf auth login`."""
    environment = [value for name, value in os.environ.items() if name.startswith("HF_TOKEN")]
    tokens = [*more, *environment, get_token()]
    return [token for token in tokens if isinstance(token, str) and len(token) >= SHORTEST]


def redact(text: str, tokens) -> str:
    """`text` without any of `tokens`, and without what looks like a token of the Hub."""
    for token in tokens:
        text = text.replace(token, "[removed]")
    return SECRET_VALUES.sub("[removed]", text)


def files_with_secrets(files: dict[str, Path], tokens) -> list[str]:
    """Names of those of `files` that hold one of `tokens`. Weights, which nobody writes text into, are not read."""
    needles = [token.encode() for token in tokens]
    return [
        name
        for name, file in files.items()
        if file.suffix != ".safetensors" and any(needle in file.read_bytes() for needle in needles)
    ]


def _secrets(arguments) -> list:
    """The values of all names that say so, in nested mappings too."""
    found = [value for name, value in arguments.items() if SECRET_NAMES.search(str(name))]
    return sum([_secrets(value) for value in arguments.values() if isinstance(value, dict)], found)
