# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a command line chooses a training's parts by. No torch, which takes seconds to import."""

LR_SCHEDULES = ("constant", "cosine", "linear")
ROUNDINGS = ("stochastic", "nearest")
SHARDINGS = ("none", "full", "hybrid")
TRACKERS = {  # of accelerate, which takes seconds too -> the modules of which each needs one
    "aim": ("aim",),
    "clearml": ("clearml",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
