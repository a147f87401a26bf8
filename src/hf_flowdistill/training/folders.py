# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A training's output folder: whose it is, and which checkpoints it has. No torch, which takes seconds to import."""

import json
import re
from pathlib import Path

from hf_flowdistill.data.files import replace_text, unfinished_name
from hf_flowdistill.errors import UserError


STATE_FILE = "state.json"
RUN_FILE = "run.json"


def checkpoints(output_dir) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def latest_checkpoint(output_dir) -> Path | None:
    return next(reversed(checkpoints(output_dir)), None)


def find_checkpoint(run) -> Path:
    """The last checkpoint of a run, or the checkpoint itself."""
    path = Path(run).resolve()
    checkpoint = path if (path / STATE_FILE).is_file() else latest_checkpoint(path)
    if checkpoint is None:
        finished = f": its finished student is in {run}/student" if (path / "student").is_dir() else ""
        raise UserError(f"{run} holds no checkpoint{finished or ': give the --output_dir of a training'}.")
    return checkpoint


def read_state(path) -> dict:
    """The JSON state of a checkpoint folder.

    Raises:
        UserError: if `path` is no checkpoint.
    """
    try:
        return json.loads((Path(path) / STATE_FILE).read_text())
    except (OSError, ValueError):
        raise UserError(f"{path} is not a checkpoint of this script: it has no readable {STATE_FILE}.") from None


def write_run(output_dir, settings: dict) -> None:
    """Note in `output_dir`, before anything else is written there, which run it belongs to."""
    path = Path(output_dir, RUN_FILE)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(settings, indent=2) + "\n")


def read_run(output_dir, *, resume: bool) -> list[dict]:
    """The settings of the run that `output_dir` belongs to: a list of one, or of none if the folder is new or empty.

    Raises:
        UserError: if it holds something and this is not to `resume`, or if it holds something else than a run.
    """
    output_dir = Path(output_dir)
    if not output_dir.is_dir() or not {path.name for path in output_dir.iterdir()} - {unfinished_name(RUN_FILE)}:
        return []
    if not resume:
        raise UserError(
            f"the output folder {output_dir} is not empty: choose another --output_dir, "
            "or go on with --resume_from_checkpoint latest."
        )
    try:
        return [json.loads((output_dir / RUN_FILE).read_text())]
    except (OSError, ValueError):
        raise UserError(
            f"the output folder {output_dir} is not empty, and without a readable {RUN_FILE} it is not one of "
            "this script's: choose another --output_dir."
        ) from None
