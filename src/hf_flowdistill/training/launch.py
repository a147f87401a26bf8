# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The first minute of a training: the processes, the log, and which run this is, all before any long work."""

import logging
import os
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, ProjectConfiguration

from hf_flowdistill.cli import silence_libraries
from hf_flowdistill.errors import UserError
from hf_flowdistill.hub.settings import check_export_dir
from hf_flowdistill.methods.phases import not_reached
from hf_flowdistill.training import checkpointing
from hf_flowdistill.training.arguments import origin_of, run_settings
from hf_flowdistill.training.distributed import check_accelerator, check_world_size
from hf_flowdistill.training.fit_arguments import settle
from hf_flowdistill.training.folders import read_run, read_state
from hf_flowdistill.training.fsdp_config import USED as FSDP
from hf_flowdistill.training.fsdp_config import not_honoured
from hf_flowdistill.training.initial_weights import check_no_student, check_student
from hf_flowdistill.training.sharding import process_group_backend


logger = logging.getLogger(__name__)


def start_processes() -> PartialState:
    """The processes of this training, as they were launched; the log is the main process's.

    Raises:
        UserError: they do not see each other.
    """
    # the others wait while the main process writes a checkpoint, which can take longer than the default allows
    group = InitProcessGroupKwargs(process_group_backend(), timeout=timedelta(hours=2))
    state = PartialState(cpu=not torch.accelerator.is_available(), **group.to_kwargs())
    log = logging.StreamHandler()
    log.addFilter(PlainLines(alone=state.num_processes == 1))
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=[log])
    level = logging.INFO if state.is_main_process else logging.ERROR
    logging.getLogger("hf_flowdistill").setLevel(level)
    if not state.is_main_process:
        warnings.simplefilter("ignore")  # which the main process has too
    silence_libraries()
    check_world_size(state.num_processes)
    return state


def launch(args) -> Accelerator:
    """What places the networks and logs, on the processes of this training; what no fit has chosen has its default.

    Raises:
        UserError: this launch would not compute rightly.
    """
    settle(args, args.dry_run or start_processes().num_processes)
    for line in not_honoured():
        logger.warning(line)
    os.environ.pop(FSDP, None)  # the script shards by itself, as the arguments now say
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == ["none"] else args.report_to,
        # sharded weights are gathered anew for every pass; their autocast copies must not outlive them
        kwargs_handlers=[AutocastKwargs(cache_enabled=args.sharding == "none")],
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))),
    )
    if args.weight_dtype != "float32" and accelerator.mixed_precision != "no":
        raise UserError(
            f"--weight_dtype {args.weight_dtype} goes without autocast: launch without --mixed_precision, or with no."
        )
    check_accelerator(accelerator)
    return accelerator


class PlainLines(logging.Filter):
    """Says nothing twice, and, where a process is `alone`, which it is not, as Accelerate does."""

    def __init__(self, *, alone: bool):
        super().__init__()
        self._prefix, self._said = "[RANK 0] " if alone else "", set()

    def filter(self, record) -> bool:
        try:
            record.msg, record.args = record.getMessage().removeprefix(self._prefix), None
        except (TypeError, ValueError):  # of arguments that do not fit, which a handler tells of
            return True
        new = record.msg not in self._said
        self._said.add(record.msg)
        return new


@dataclass
class Identity:
    """Which run this is, and what the output folder says that it must be.

    Attributes:
        settings: what this run computes with.
        recorded: the settings of the run in the output folder, and of the checkpoint that it goes on from.
        checkpoint: where it goes on, or None.
    """

    settings: dict
    recorded: list[dict] = field(default_factory=list)
    checkpoint: Path | None = None

    def check(self, **more) -> None:
        """Add to the settings, and refuse to go on with a run of others.

        Raises:
            UserError: naming every setting that differs, with both values.
        """
        self.settings |= more
        for earlier in self.recorded:
            checkpointing.check_same_run(earlier, self.settings)


def identify(args, method, accelerator, prompts: list[str]) -> Identity:
    """Which run this is, once it is sure that the output folder is its own; nothing is written or changed yet.

    Raises:
        UserError: the folder is another run's, the teacher is itself a student, or the student that is to be gone on
            with is not this teacher's.
    """
    identity = Identity(run_settings(args, prompts, accelerator))
    identity.recorded = read_run(args.output_dir, resume=args.resume_from_checkpoint is not None)
    identity.check()
    check_phases(identity.settings, args.max_train_images)
    check_export_dir(Path(args.output_dir, "student"))
    check_no_student(args.pretrained_model_name_or_path, **origin_of(args))
    student = getattr(args, "student_model_name_or_path", None)
    check_student(student, args.pretrained_model_name_or_path, **origin_of(args))
    return identity


def check_phases(settings: dict, max_train_images: int) -> None:
    """Say what the training ends before.

    Raises:
        UserError: that is all of the student's training.
    """
    missing = not_reached(settings, max_train_images)
    if "discriminator_warmup_images" in missing:
        raise UserError(
            f"the student would rest for all of --max_train_images {max_train_images}, since "
            f"--discriminator_warmup_images is {settings['discriminator_warmup_images']}: make it less."
        )
    for phrase in missing.values():
        logger.warning(f"the training ends before {phrase}: --max_train_images is {max_train_images}")


def find_checkpoint(args, accelerator, identity: Identity) -> None:
    """Find where the run goes on, and clear what a crash left unfinished.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or of another run.
    """
    accelerator.wait_for_everyone()  # everyone has looked at the output folder before anyone writes there
    if accelerator.is_main_process:
        checkpointing.remove_unfinished(args.output_dir)
    accelerator.wait_for_everyone()
    identity.checkpoint = checkpointing.find_resume(args.output_dir, args.resume_from_checkpoint)
    if identity.checkpoint is not None:
        identity.recorded.append(read_state(identity.checkpoint)["settings"])
        identity.check()
    elif args.resume_from_checkpoint is not None:
        logger.info(f"there is no checkpoint in {args.output_dir} yet: the run starts from the beginning")
