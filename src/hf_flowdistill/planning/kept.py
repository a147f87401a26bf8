# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What was rehearsed once, in files: the peaks of a teacher's ways of training, whatever the memory is.

They hold for the teacher's configuration, for the libraries and for this package as they are; of others, other files
are kept.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import huggingface_hub

import hf_flowdistill
from hf_flowdistill.planning.memory_tracker import Peak
from hf_flowdistill.planning.startup import Start


LIBRARIES = "torch", "diffusers", "transformers", "tokenizers", "accelerate", "peft", "numpy"
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf", ".npz"}  # left out


def folder() -> Path:
    """Where the files are, beside what the Hub's libraries keep."""
    return Path(huggingface_hub.constants.HF_HOME, "hf_flowdistill", "plans")


class Kept:
    """The rows of one teacher at one size, each a list of (peak, start, bytes in main memory) under its key.

    Args:
        teacher: of `teacher_key`; with None nothing is kept.
        settings: all else that the rows have in common; its `repr` tells.
    """

    def __init__(self, teacher: str | None, *settings):
        own = _digest(Path(hf_flowdistill.__file__).parent.rglob("*.py"))
        key = repr((teacher, own, hf_flowdistill.__version__, [_version(name) for name in LIBRARIES], settings))
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        self.file = teacher and folder() / f"{name}.json"
        self.rows = self._read() if self.file else {}

    def _read(self) -> dict[str, list]:
        try:
            rows = json.loads(self.file.read_text(encoding="utf-8"))
            return {key: [_unpacked(one) for one in row] for key, row in rows.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):  # there is none, or it is damaged
            return {}

    def save(self) -> None:
        """Write the file, in one step; where that is impossible, nothing is kept."""
        if not self.file:
            return
        rows = {key: [_packed(*one) for one in row] for key, row in self.rows.items()}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.file.parent, delete=False, encoding="utf-8") as file:
                json.dump(rows, file)
            os.replace(file.name, self.file)
        except OSError:
            pass


def _packed(peak: Peak, start: Start, waiting: float) -> dict:
    return {"when": peak.when, "components": peak.components, "start": dataclasses.asdict(start), "waiting": waiting}


def _unpacked(row: dict) -> tuple[Peak, Start, float]:
    components = {str(name): size + 0 for name, size in row["components"].items()}
    return Peak(str(row["when"]), components), Start(**row["start"]), row["waiting"] + 0


def teacher_key(path, *, revision=None, cache_dir=None) -> str | None:
    """What tells a teacher's configuration from others: of a folder, all of its files but weights; of a repository on
    the Hub, the commit of what was downloaded. None where that cannot be told."""
    path = Path(path)
    if path.is_dir():
        return _digest(file for file in path.rglob("*") if file.is_file() and file.suffix not in WEIGHTS)
    index = huggingface_hub.try_to_load_from_cache(
        str(path), "model_index.json", cache_dir=cache_dir, revision=revision
    )
    return f"{path} {Path(index).parent.name}" if isinstance(index, str) else None


def _digest(files) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        content = file.read_bytes()
        digest.update(f"{file} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
