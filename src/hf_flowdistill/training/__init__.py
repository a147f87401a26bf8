# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a training script needs around the mathematics: several processes, optimizers, averages, checkpoints, logs."""
