# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Distillation methods: (networks, batch) -> (loss, metrics). They know nothing of launchers, devices or logging."""
