# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Files that are, after a crash at any moment or on a full disk, the whole new ones or what there was."""

import os
from pathlib import Path


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str, unfinished: Path | None = None) -> None:
    """Write a file that is, after a crash at any moment or on a full disk, the whole new one or what there was.

    Until it is whole it is called `unfinished`, by default as `path` with .tmp behind.
    """
    unfinished = unfinished or path.with_name(unfinished_name(path.name))
    unfinished.write_text(text)
    flush(unfinished)
    os.replace(unfinished, path)


def unfinished_name(name: str) -> str:
    return name + ".tmp"
