# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Tests ask no Hub but the one that they start themselves, in processes with an environment of their own."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
