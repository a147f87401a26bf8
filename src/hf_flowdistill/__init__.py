# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Distil diffusers flow-matching text-to-image pipelines into few-step generators."""

__version__ = "0.1.0.dev0"
