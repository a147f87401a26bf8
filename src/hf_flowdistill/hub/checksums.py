# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Files of a folder beside those of a repository on the Hub, by what the Hub says of their contents."""

import hashlib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub.hf_api import RepoFile


NOT_PUBLISHED = ("*.tmp/*", "checkpoint-*/*", "*__pycache__/*", ".git/*", ".cache/*")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class Comparison:
    """Names of files: `missing` on the Hub, `different` there, and there alone (`extra`)."""

    missing: list[str]
    different: list[str]
    extra: list[str]


def files_of(folder) -> dict[str, Path]:
    """The files of a folder that belong on the Hub, by their names there."""
    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in files.items() if not any(fnmatch(name, p) for p in NOT_PUBLISHED)}


def tree_of(api, repo_id, revision) -> dict[str, RepoFile]:
    """The files of a repository at a revision, by name."""
    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def compare(files: dict[str, Path], tree: dict[str, RepoFile]) -> Comparison:
    """The contents of `files` beside `tree`: sha256 for what the Hub keeps as a large file, git's sha1 otherwise."""
    return Comparison(
        missing=sorted(files.keys() - tree.keys()),
        different=sorted(name for name in files.keys() & tree.keys() if not same(files[name], tree[name])),
        extra=sorted(tree.keys() - files.keys()),
    )


def same(file: Path, entry: RepoFile) -> bool:
    """Whether a file has the content that the Hub has under this entry."""
    if file.stat().st_size != entry.size:
        return False
    if entry.lfs is not None:
        return digest(file, hashlib.sha256()) == entry.lfs.sha256
    return digest(file, hashlib.sha1(f"blob {entry.size}\0".encode())) == entry.blob_id


def digest(file: Path, started) -> str:
    """The hexadecimal digest of `file` by an algorithm of hashlib that may have read something already."""
    with file.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            started.update(block)
    return started.hexdigest()


def without_weights(names) -> bool:
    """Whether a repository of these files has weights as pickles only: to load those is to run whatever they hold."""
    names = list(names)
    return any(name.endswith(PICKLES) for name in names) and not any(name.endswith(".safetensors") for name in names)
