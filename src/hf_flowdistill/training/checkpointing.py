# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Checkpoints that are either whole or absent, and the record of which run they belong to."""

import functools
import json
import logging
import os
import shutil
from pathlib import Path

import torch.distributed as dist

from hf_flowdistill.data.files import checksum, flush
from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.training.checkpoint_files import are_sharded, read_shards, read_whole, write_shards, write_whole
from hf_flowdistill.training.distributed import is_distributed, on_main, process_rank, together
from hf_flowdistill.training.folders import STATE_FILE, checkpoints, read_state


logger = logging.getLogger(__name__)

CHECKSUM_FILE = "SHA256SUMS"  # as of sha256sum, which can check it too
# Recorded and not compared: the teacher is known by weights and config, a recipe by its arguments.
WHERE = {"pretrained_model_name_or_path", "revision", "variant", "recipe"}
CONFIG = "teacher_config"
LENGTH_COUNTS = "; a training with --lr_scheduler linear or cosine, or --step_shares, cannot be made longer or shorter"


def save_checkpoint(output_dir, *, networks: dict, optimizers: dict, state: dict, total_limit=None) -> Path | None:
    """Write `checkpoint-<images_seen>`; every process calls this, with the same names and the same `state`.

    Where nothing is sharded, the main process writes one safetensors file per network and one file per optimizer; else
    every process writes what it holds. The folder is written under a temporary name, with the checksums of its files,
    flushed to the disk, and renamed, so a crash at any moment leaves the earlier checkpoints and at most an unfinished
    folder, which `remove_unfinished` clears. Only then are the oldest ones beyond `total_limit` (None: no limit)
    deleted.

    Args:
        networks: name -> a module, or a mapping of names to tensors.
        optimizers: name -> the optimizer.
        state: JSON, which must hold "images_seen".

    Returns:
        The folder; None if it could not be written, on a full disk for instance. Then the reason is logged, what there
        is of it is deleted, and the earlier checkpoints are as they were.
    """
    target = Path(output_dir) / f"checkpoint-{state['images_seen']}"
    unfinished = target.with_name(target.name + ".tmp")
    sharded, rank = are_sharded(networks), process_rank()

    def prepare():
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def write() -> dict[str, str]:
        (write_shards if sharded else write_whole)(unfinished, networks, optimizers)
        if rank == 0:
            (unfinished / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
        mine = [
            p for p in unfinished.iterdir() if p.name.startswith(f"__{rank}_") or (rank == 0 and p.name[:2] != "__")
        ]
        return {path.name: checksum(path) for path in mine}

    def finish(checksums: list[dict[str, str]]):
        lines = sorted(f"{digest}  {name}\n" for part in checksums for name, digest in part.items())
        missing = [name for part in checksums for name in part if not (unfinished / name).exists()]
        if missing:
            raise OSError(f"{missing[0]} is not there: do all machines write to the same --output_dir?")
        (unfinished / CHECKSUM_FILE).write_text("".join(lines))
        for path in [*unfinished.iterdir(), unfinished]:
            flush(path)
        _put_in_place(unfinished, target)

    try:
        on_main(prepare)
        checksums = together(write) if sharded else [on_main(write)]
        on_main(functools.partial(finish, checksums))
    except OSError as error:
        if rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            logger.warning(
                f"{target.name} could not be written, the earlier checkpoints are kept: {first_line(error)}"
            )
        return None
    if rank == 0 and total_limit is not None:
        _delete(checkpoints(output_dir)[:-total_limit])
    return target


def _delete(old: list[Path]) -> None:
    for path in old:
        doomed = path.with_name(path.name + ".tmp")  # half deleted, it must not pass for a checkpoint
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def _put_in_place(unfinished: Path, target: Path) -> None:
    if target.exists():  # an earlier branch of this run got as far; its checkpoint makes way
        replaced = target.with_name(target.name + ".old.tmp")
        os.replace(target, replaced)
        os.replace(unfinished, target)
        shutil.rmtree(replaced)
    else:
        os.replace(unfinished, target)
    flush(target.parent)


def load_checkpoint(path, *, networks: dict, optimizers: dict) -> dict:
    """Load what `save_checkpoint` wrote into `networks` and `optimizers`, in place, and return its state.

    It may have been written by another number of processes, and with other sharding. Every process calls this.

    Raises:
        UserError: on all processes, if a file is missing or cannot be read on one.
    """
    path = Path(path)
    read = read_shards if (path / ".metadata").exists() else read_whole
    try:
        together(functools.partial(read, path, networks, optimizers))
    except OSError as error:
        raise UserError(_unreadable(path, first_line(error))) from error
    return read_state(path)


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


def find_resume(output_dir, resume: str | None) -> Path | None:
    """Which checkpoint to go on from; None is a fresh start. All processes call this, and share the reading.

    `resume` is None, "latest" (a fresh start if there is no checkpoint yet), or the path of a checkpoint. The latest
    is the one with most images whose files have their checksums. Damaged ones after it are told, and renamed to
    `checkpoint-<images_seen>.damaged`, which nothing reads or deletes.

    Raises:
        UserError: if the checkpoint does not exist, or is damaged: then the file is named.
    """
    if resume is None:
        return None
    output_dir, damaged = Path(output_dir), {}
    found = on_main(lambda: checkpoints(output_dir)[::-1])  # what others see may lag behind, on a shared disk
    for path in found if resume == "latest" else [_checkpoint_at(output_dir, resume)]:
        reasons = [reason for reason in together(functools.partial(_damage, path)) if reason]
        if not reasons:
            break
        damaged[path] = reasons[0]
    else:
        if damaged:
            raise UserError(_unreadable(*next(iter(damaged.items()))))
        return None
    if process_rank() == 0:
        for other, reason in damaged.items():
            aside = other.with_name(other.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(other, aside)
            logger.warning(
                f"{other} is damaged ({reason}): it was renamed to {aside.name}, {path.name} serves instead"
            )
    return path


def _checkpoint_at(output_dir: Path, resume: str) -> Path:
    path = Path(resume)
    if not path.is_dir():
        path = output_dir / resume
    if not path.is_dir():
        known = ", ".join(p.name for p in checkpoints(output_dir)) or "none"
        raise UserError(f"there is no checkpoint {resume}: {output_dir} holds {known}.")
    return path


def _damage(path: Path) -> str | None:
    """What is wrong with this process's share of a checkpoint's files."""
    try:
        lines = (path / CHECKSUM_FILE).read_text().splitlines()
    except (OSError, ValueError):
        return f"it has no readable {CHECKSUM_FILE}"
    size = dist.get_world_size() if is_distributed() else 1
    for digest, _, name in [line.partition("  ") for line in lines][process_rank() :: size]:
        try:
            if checksum(path / name) != digest:
                return f"{name} does not have its checksum"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def _unreadable(path: Path, reason: str) -> str:
    return f"the checkpoint {path} cannot be read ({reason}): resume from an earlier one."


def check_same_run(recorded: dict, current: dict) -> None:
    """Refuse to go on with a run of other settings than `current`; what is only in `recorded` is not looked at.

    The teacher may have moved, and what only one version of diffusers configures is no difference.

    Raises:
        UserError: naming every setting that differs, with both values.
    """
    if "teacher_weights" in recorded and CONFIG not in recorded:
        raise UserError(
            "what is to be resumed is from an earlier version, which did not record the teacher's configuration and "
            "drew other random numbers: go on with that version, or start a new run."
        )
    recorded, current = with_config(recorded), with_config(current)
    known = {n for n in current if n not in WHERE and (n in recorded or not n.startswith(f"{CONFIG} "))}
    differing = [n for n in sorted(known) if recorded.get(n) != current[n]]
    if differing:
        listed = ", ".join(f"{n} (was {recorded.get(n)!r}, now {current[n]!r})" for n in differing)
        why = "" if "max_train_images" not in differing else LENGTH_COUNTS
        raise UserError(
            f"what is to be resumed is from a run with other settings, {listed}{why}: use those, or start a new run."
        )


def with_config(settings: dict) -> dict:
    """Settings, with every value of the teacher's configuration by a name of its own."""
    config = {f"{CONFIG} {name}": value for name, value in settings.get(CONFIG, {}).items()}
    return {name: value for name, value in settings.items() if name != CONFIG} | config


def set_aside_later(output_dir, images_seen: int) -> None:
    """Rename the checkpoints with more than `images_seen`, before a run goes on from there another way, to
    `checkpoint-<images_seen>.abandoned`: "latest" is then on the new way, and no limit counts the old one. Nothing
    reads or deletes them."""
    if process_rank() != 0:
        return
    for path in checkpoints(output_dir):
        if int(path.name.split("-")[1]) <= images_seen:
            continue
        aside = path.with_name(path.name + ".abandoned")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        logger.warning(f"{path} lies after where the run goes on: it was renamed to {aside.name}")
