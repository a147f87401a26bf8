# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Checkpoints that are either whole or absent, and the record of which run they belong to."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from hf_flowdistill.errors import UserError, first_line


STATE_FILE = "state.json"
RUN_FILE = "run.json"


def checkpoints(output_dir) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def latest_checkpoint(output_dir) -> Path | None:
    return next(reversed(checkpoints(output_dir)), None)


def save_checkpoint(output_dir, *, networks: dict, optimizers: dict, state: dict, total_limit=None) -> Path:
    """Write `checkpoint-<images_seen>`: one safetensors file per network, one file per optimizer, and `state`.

    The folder is written under a temporary name, flushed to the disk, and renamed, so a crash at any moment leaves the
    earlier checkpoints and at most an unfinished folder, which `remove_unfinished` clears. Only then are the oldest
    ones beyond `total_limit` (None: no limit) deleted. `state` is JSON and must hold "images_seen".
    """
    target = Path(output_dir) / f"checkpoint-{state['images_seen']}"
    unfinished = target.with_name(target.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name, network in networks.items():
        save_model(network, str(unfinished / f"{name}.safetensors"))
    for name, optimizer in optimizers.items():
        torch.save(optimizer.state_dict(), unfinished / f"{name}_optimizer.pt")
    (unfinished / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
    for path in [*unfinished.iterdir(), unfinished]:
        flush(path)
    if target.exists():  # an earlier branch of this run got as far; its checkpoint makes way
        replaced = target.with_name(target.name + ".old.tmp")
        os.replace(target, replaced)
        os.replace(unfinished, target)
        shutil.rmtree(replaced)
    else:
        os.replace(unfinished, target)
    flush(target.parent)
    if total_limit is not None:
        for old in checkpoints(output_dir)[:-total_limit]:
            doomed = old.with_name(old.name + ".tmp")  # half deleted, it must not pass for a checkpoint
            os.replace(old, doomed)
            shutil.rmtree(doomed)
    return target


def load_checkpoint(path, *, networks: dict, optimizers: dict) -> dict:
    """Load what `save_checkpoint` wrote into `networks` and `optimizers`, in place, and return its state.

    Raises:
        UserError: if a file is missing or cannot be read.
    """
    path = Path(path)
    try:
        for name, network in networks.items():
            load_model(network, str(path / f"{name}.safetensors"))
        for name, optimizer in optimizers.items():
            saved = torch.load(path / f"{name}_optimizer.pt", map_location="cpu", weights_only=True)
            optimizer.load_state_dict(saved)
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(
            f"the checkpoint {path} cannot be read ({first_line(error)}): resume from an earlier one."
        ) from error
    return read_state(path)


def read_state(path) -> dict:
    """The JSON state of a checkpoint folder.

    Raises:
        UserError: if `path` is no checkpoint.
    """
    try:
        return json.loads((Path(path) / STATE_FILE).read_text())
    except (OSError, ValueError):
        raise UserError(f"{path} is not a checkpoint of this script: it has no readable {STATE_FILE}.") from None


def remove_unfinished(output_dir) -> None:
    """Clear what a crash in the middle of `save_checkpoint` left behind: before `find_resume`.

    A checkpoint that was making way for a later one of the same name goes back if that one did not come.
    """
    for replaced in Path(output_dir).glob("checkpoint-*.old.tmp"):
        target = replaced.with_name(replaced.name.removesuffix(".old.tmp"))
        if not target.exists():
            os.replace(replaced, target)
    for path in Path(output_dir).glob("checkpoint-*.tmp"):
        shutil.rmtree(path)


def write_run(output_dir, settings: dict) -> None:
    """Note in `output_dir`, before anything else is written there, which run it belongs to."""
    path = Path(output_dir, RUN_FILE)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2) + "\n")
        flush(path)


def read_run(output_dir, *, resume: bool) -> list[dict]:
    """The settings of the run that `output_dir` belongs to: a list of one, or of none if the folder is new or empty.

    Raises:
        UserError: if it holds something and this is not to `resume`, or if it holds something else than a run.
    """
    output_dir = Path(output_dir)
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
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


def find_resume(output_dir, resume: str | None) -> Path | None:
    """Which checkpoint to go on from; None is a fresh start.

    `resume` is None, "latest" (a fresh start if there is no checkpoint yet), or the path of a checkpoint.

    Raises:
        UserError: if the checkpoint does not exist.
    """
    if resume is None:
        return None
    output_dir = Path(output_dir)
    if resume == "latest":
        return latest_checkpoint(output_dir)
    path = Path(resume)
    if not path.is_dir():
        path = output_dir / resume
    if not path.is_dir():
        known = ", ".join(p.name for p in checkpoints(output_dir)) or "none"
        raise UserError(f"there is no checkpoint {resume}: {output_dir} holds {known}.")
    return path


def check_same_run(recorded: dict, current: dict) -> None:
    """Refuse to go on with a run of other settings than `current`; what is only in `recorded` is not looked at.

    Raises:
        UserError: naming every setting that differs, with both values.
    """
    differing = [n for n in sorted(current) if recorded.get(n) != current[n]]
    if differing:
        listed = ", ".join(f"{n} (was {recorded.get(n)!r}, now {current[n]!r})" for n in differing)
        raise UserError(
            f"what is to be resumed is from a run with other settings, {listed}: use those, or start a new run."
        )


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
