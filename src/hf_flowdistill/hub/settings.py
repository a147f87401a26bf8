# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the export notes of a student, in its training_args.json, and how such files are read."""

import json
from pathlib import Path
from typing import Any

from hf_flowdistill.errors import UserError


SETTINGS_FILE = "training_args.json"


def read_settings(path, *, revision=None, cache_dir=None) -> dict | None:
    """What the export wrote into training_args.json of a student's folder or Hub repository; None if there is none."""
    settings = read_json(path, SETTINGS_FILE, revision=revision, cache_dir=cache_dir)
    ours = isinstance(settings, dict) and str(settings.get("exported_by", "")).startswith("hf_flowdistill")
    return settings if ours else None


def read_json(path, name: str, *, revision=None, cache_dir=None) -> Any:
    """What stands in the JSON file `name` of a folder or Hub repository; None if there is none that can be read."""
    file = Path(path) / name
    if not Path(path).exists():
        from huggingface_hub import hf_hub_download  # here, since a folder needs no client
        from huggingface_hub.errors import EntryNotFoundError

        try:
            file = Path(hf_hub_download(str(path), name, revision=revision, cache_dir=cache_dir))
        except (EntryNotFoundError, OSError, ValueError):  # Loading the pipeline will say what is wrong.
            return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_settings(folder, settings: dict) -> None:
    Path(folder, SETTINGS_FILE).write_text(json.dumps(settings, indent=2, default=str) + "\n", encoding="utf-8")


def check_export_dir(output_dir) -> Path:
    """`output_dir` as a path, if `export_student` may write there: it is new, empty, or holds an earlier export."""
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose a folder for the student.")
    if folder.is_dir() and any(folder.iterdir()) and read_settings(folder) is None:
        raise UserError(f"{folder} is not empty and holds no earlier export of a student: choose another folder.")
    return folder
