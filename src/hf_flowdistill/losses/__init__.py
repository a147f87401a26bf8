# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Losses: tensors in, a scalar and diagnostics out. They never see a model and need nothing but torch."""

from hf_flowdistill.losses.adversarial import adversarial_generator_loss, discriminator_loss
from hf_flowdistill.losses.sid import fake_score_loss, sid_generator_loss


__all__ = ["adversarial_generator_loss", "discriminator_loss", "fake_score_loss", "sid_generator_loss"]
