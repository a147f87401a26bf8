# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a command line chooses networks by. No torch, which takes seconds to import."""

NETWORKS = ("full", "lora_fake", "lora")
ROLES = ("teacher", "generator", "fake_score")
TRAINED = ROLES[1:]
QUANTIZATIONS = ("none", "8bit", "nf4")
RANK = 64  # of LoRAs
