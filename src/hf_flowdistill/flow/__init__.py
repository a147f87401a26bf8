# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The sigma convention and all that follows from it: maps, noise levels, weights, draws, the sampler.

torch only, and for draws numpy, which torch installs.
"""

from hf_flowdistill import on_demand


NAMES = {
    "paths": [
        "add_noise",
        "expand_like",
        "guide",
        "noise_from_velocity",
        "rectified_to_trigflow",
        "rescale_guidance",
        "score_from_velocity",
        "sigma_to_trigflow",
        "trigflow_output_from_velocity",
        "trigflow_to_rectified",
        "trigflow_to_sigma",
        "v_prediction_from_velocity",
        "velocity",
        "velocity_from_noise",
        "velocity_from_score",
        "velocity_from_trigflow_output",
        "velocity_from_v_prediction",
        "velocity_from_x0",
        "x0_from_velocity",
    ],
}
__all__ = NAMES["paths"]
__getattr__ = on_demand(__name__, NAMES)
