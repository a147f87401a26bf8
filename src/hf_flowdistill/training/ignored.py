# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Arguments that other arguments would make a training ignore: rules of `cli.ArgumentParser.refuse`."""

from pathlib import Path

from hf_flowdistill.training.trackers import RUN_NAMES


SQUARE = (
    "resolution",
    lambda args: args.height and args.width,
    "is height and width of square images: leave it out where --height and --width are given.",
)
TEACHER = (
    (
        "resolution",
        lambda args: args.aspect_ratio_buckets,
        "is one size: leave it out where there are --aspect_ratio_buckets.",
    ),
    SQUARE,
    (
        "revision",
        lambda args: Path(args.pretrained_model_name_or_path or "nowhere").is_dir(),
        "is of a repository on the Hub, and the teacher is a folder: leave it out.",
    ),
)
OUTPUT = (
    (
        "checkpoints_total_limit",
        lambda args: not args.checkpointing_images,
        "is of checkpoints, and --checkpointing_images 0 writes none: leave one of them out.",
    ),
    (
        "validation_images num_validation_images",
        lambda args: not args.validation_prompts,
        "is of sample sheets: give --validation_prompts too, or leave it out.",
    ),
    (
        "logging_dir tracker_project_name tracker_run_name",
        lambda args: args.report_to == ["none"],
        "is of a tracker, and --report_to is none: leave one of them out.",
    ),
    (
        "tracker_run_name",
        lambda args: not {*RUN_NAMES, "all"} & {*(args.report_to or [])},
        f"is of {', '.join(RUN_NAMES)}, and --report_to names none of them: leave it out.",
    ),
    (
        "hub_model_id hub_private_repo hub_token",
        lambda args: not args.push_to_hub,
        "is of a student that is uploaded: give --push_to_hub too, or leave it out.",
    ),
)
