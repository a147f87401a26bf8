# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What trackers are given: a run that they know again, scalars in groups, sheets of samples."""

import uuid
from collections.abc import Container
from pathlib import Path

from hf_flowdistill.data.files import replace_text


RUN_NAMES = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
}  # what they call it
WANDB_RUN_FILE = "wandb_run_id"  # in the folder of the trackers' files
NEVER_SHOWN = "images_seen", "k", "processes", "height", "width"  # the axis, what curves are told apart by, constants
OF_ALL_STEPS = "step", "skipped_updates", "learning_rate", "images_per_second"  # not of one sampler step
SHOWN_PIXELS = 2048  # the longer side of a sheet, in a tracker


def begin(accelerator, args, *, images_seen: int) -> None:
    """Start the trackers of a run that has seen so many images, the same run as before where it goes on."""
    folder, names = Path(accelerator.logging_dir), [str(name) for name in accelerator.log_with]
    settings = {name: {RUN_NAMES[name]: args.tracker_run_name} for name in names if name in RUN_NAMES}
    if "wandb" in names:
        settings["wandb"] |= {"dir": args.output_dir, "id": _run_id(folder / WANDB_RUN_FILE), "resume": "allow"}
    if "tensorboard" in names:  # what a run has written after its last checkpoint, it writes again
        settings["tensorboard"] = {"purge_step": images_seen + 1 if images_seen else None}
    accelerator.init_trackers(args.tracker_project_name, init_kwargs=settings)
    config = tracker_config(args)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":  # as text: as hyperparameters they would be one more run in its list
            rows = "".join(f"| {name} | {value} |\n" for name, value in config.items())
            tracker.writer.add_text("arguments", f"| | |\n| --- | --- |\n{rows}", images_seen)
        else:
            tracker.store_init_configuration(config)


def _run_id(path: Path) -> str:
    """The id that is kept in `path`, a new one if there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, uuid.uuid4().hex[:8])
    return path.read_text().strip()


def scalars(record: dict, monitors: Container[str] = ()) -> dict[str, float]:
    """A record of one update as curves: "group/name", and "/k2" behind what is of sampler step 2.

    What does not change in a training is left out. `monitors` have a group of their own, which comes first.
    """
    step = f"/k{record['k']}" if "k" in record else ""
    shown = {}
    for name, value in record.items():
        if name in OF_ALL_STEPS:
            shown[f"run/{name}"] = value
        elif name not in NEVER_SHOWN and not name.startswith("teacher_"):
            shown[f"drift/{name}{step}" if name in monitors else _place(name) + step] = value
    return shown


def _place(name: str) -> str:
    """Group and name of a metric."""
    for end, group in (("_loss", "loss"), ("_grad_norm", "gradient")):
        if name.endswith(end):
            return f"{group}/{name.removesuffix(end)}"
    return f"latents/{name}" if name.startswith("x0_") else f"other/{name}"


def show_sheet(accelerator, image, name: str, images_seen: int) -> None:
    """Give a sheet, a PIL image, to the trackers that take images, reduced where it is large."""
    image = image.copy()
    image.thumbnail((SHOWN_PIXELS, 2 * SHOWN_PIXELS))
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            tracker.log_images({name: [image]}, step=images_seen)
        elif tracker.name == "tensorboard":
            import numpy as np

            tracker.log_images({name: np.asarray(image)[None]}, step=images_seen, dataformats="NHWC")


def tracker_config(args) -> dict:
    """Parsed arguments as trackers take them: numbers and text, and no token."""
    return {
        name: value if isinstance(value, (int, float, str)) else str(value)
        for name, value in vars(args).items()
        if not name.endswith("token")
    }
