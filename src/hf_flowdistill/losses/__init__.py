# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Losses: tensors in, a scalar and diagnostics out. They never see a model and need nothing but torch."""

from hf_flowdistill import on_demand


NAMES = {
    "adversarial": ["adversarial_generator_loss", "discriminator_loss"],
    "sid": ["fake_score_loss", "sid_generator_loss"],
}
__all__ = [name for names in NAMES.values() for name in names]
__getattr__ = on_demand(__name__, NAMES)
