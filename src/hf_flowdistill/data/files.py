# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Files that are, after a crash at any moment or on a full disk, the whole new ones or what there was; checksums."""

import hashlib
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


def checksum(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:  # hashlib.file_digest is not in Python 3.10
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def unfinished_name(name: str) -> str:
    return name + ".tmp"
