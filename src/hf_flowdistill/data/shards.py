# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Folders of shards that never change: each is written under a temporary name and then named after its checksum.

So a crash costs unfinished shards only, and damage is noticed. A folder belongs to one key, in its index.json.
"""

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_flowdistill.data.files import (
    INDEX_FILE,
    LOCK_FILE,
    UNFINISHED,
    check_cache_dir,
    checksum,
    flush,
    replace_text,
)
from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.teachers.finite import has_nan


logger = logging.getLogger(__name__)

DIGITS = 32  # of a checksum, in a name or a key


@contextlib.contextmanager
def one_run_at_a_time(folder: Path, what: str):
    """Wait for other runs that are adding to `folder`; they wait for this one until the context ends."""
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning(f"another run is adding to the {what} cache {folder}: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def claim(folder: Path, key: dict[str, Any], what: str, owner: str, argument: str) -> None:
    """Make `folder` the cache of `key`, or see that it is; clear what a crash left unfinished in it.

    Raises:
        UserError: it is the cache of another key, of another `owner` in words, or has files but is no cache.
    """
    check_cache_dir(folder, what, argument)
    index = folder / INDEX_FILE
    if not index.exists():
        replace_text(index, json.dumps(key, indent=2) + "\n", folder / "unfinished-index.tmp")
    try:
        recorded = json.loads(index.read_text(encoding="utf-8"))
        differing = [name for name in {**key, **recorded} if recorded.get(name) != key.get(name)]
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{index} is not the index of a {what} cache: choose another folder.") from None
    if differing:
        raise UserError(
            f"the {what} cache {folder} is from another {owner}, which differs in {', '.join(differing)}: "
            f"give another {argument}."
        )
    clear_unfinished(folder)


def clear_unfinished(folder: Path) -> None:
    """Remove what a crash left unfinished in `folder`."""
    for path in list(folder.iterdir()):
        if UNFINISHED.fullmatch(path.name) and path.is_file():
            path.unlink()


def write_shard(folder: Path, tensors: dict, about: dict[str, str], *, prefix: str = "shard", unfinished: str) -> None:
    """One shard, whole or not at all: `prefix`-<checksum>.safetensors."""
    path = folder / unfinished
    save_file(tensors, path, metadata=about)
    flush(path)
    os.replace(path, folder / f"{prefix}-{checksum(path)[:DIGITS]}.safetensors")
    flush(folder)


def read_about(path: Path, name: str) -> dict[str, Any]:
    """The JSON that a shard has under `name`; {} if it has none.

    Raises:
        UserError: it is no shard.
    """
    try:
        with safe_open(path, "pt") as shard:
            about = json.loads((shard.metadata() or {}).get(name, "{}"))
            return dict(about)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise corrupt(path, first_line(error)) from None


def check_shard(path: Path) -> None:
    """Raise `UserError` unless the bytes of `path` have the checksum in its name, and no number in it is NaN."""
    if path.stem.rpartition("-")[2] != checksum(path)[:DIGITS]:
        raise corrupt(path, "its bytes do not have the checksum in its name")
    with safe_open(path, "pt") as shard:
        broken = next((name for name in shard.keys() if has_nan(shard.get_tensor(name))), None)
    if broken:
        raise corrupt(path, f"{broken} holds NaN")


def corrupt(path: Path, reason: str) -> UserError:
    return UserError(f"the shard {path} is corrupt ({reason}): delete it, and what it holds is encoded again.")


def json_digest(value: Any) -> str:
    """Of a value that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGITS]
