# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Files that are, after a crash at any moment or on a full disk, the whole new ones or what there was; whose they are.

No torch, which takes seconds to import.
"""

import hashlib
import os
import re
import shutil
from pathlib import Path

from hf_flowdistill.errors import UserError


INDEX_FILE = "index.json"
LOCK_FILE = ".lock"
PART = re.compile(r"part-\d{10}")  # the name of a part's folder
UNFINISHED = re.compile(r"unfinished-(\d+|index)\.tmp|\.tmp[A-Za-z0-9]{6}")  # as safetensors names it, before renaming


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


def part_folder(root: Path, number: int) -> Path:
    """Where a cache has the part of this number."""
    return root / f"part-{number:010}"


def delete_other_parts(kept: Path) -> None:
    """Delete the folders of all parts but `kept`."""
    for path in list(kept.parent.iterdir()):
        if PART.fullmatch(path.name) and path.is_dir() and path != kept:
            shutil.rmtree(path)


def unfinished_name(name: str) -> str:
    return name + ".tmp"


def check_cache_dir(folder, what: str, argument: str) -> None:
    """Raise `UserError` if `folder` has files but no index: somebody's own, among which none may be deleted."""
    folder = Path(folder)
    if not folder.is_dir() or (folder / INDEX_FILE).exists():
        return
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if name != LOCK_FILE and not UNFINISHED.fullmatch(name)]
    if others and not (folder / INDEX_FILE).exists():  # which another run may just have written
        raise UserError(
            f"{folder} has files, {others[0]} for one, but no {INDEX_FILE}, so it is no {what} cache: "
            f"give a new or empty folder as {argument}."
        )
